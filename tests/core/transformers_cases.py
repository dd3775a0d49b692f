"""Texts, models and comparisons of the tests of transformers."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

from lamemo_fairseq.huggingface import LamemoCache, LamemoForCausalLM

from .helpers import random_tokens, tiny_decoder, whole_segments

LENGTHS = [9, 4, 11]


def texts(lengths=LENGTHS):
    return [random_tokens(1, length, seed=length)[0] for length in lengths]


def padded(given, side="left"):
    """Texts in one tensor, and its mask."""
    ids = torch.nn.utils.rnn.pad_sequence(given, batch_first=True, padding_value=1, padding_side=side)
    ones = [torch.ones_like(text) for text in given]
    return {"input_ids": ids, "attention_mask": torch.nn.utils.rnn.pad_sequence(ones, True, 0, side)}


def tiny_model() -> LamemoForCausalLM:
    return LamemoForCausalLM.of(tiny_decoder())


@torch.no_grad()
def read(model, ids) -> LamemoCache:
    """A cache that has read words."""
    cache = LamemoCache(model)
    model(ids, cache=cache)
    return cache


def expected(model, text):
    """Log-probabilities ``[T, V]`` after every word of a text, by the core's pass over whole segments."""
    with torch.no_grad():
        return model.model.log_probs(whole_segments(model.model, text[None]))[0]


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
