"""Dropout acts in training alone, at every place that the released model has it."""

import pytest
import torch

from .helpers import random_tokens, read_streams, tiny_decoder


@pytest.mark.parametrize("option", ["dropout", "attention_dropout", "activation_dropout"])
def test_dropout_acts_in_training_alone(option):
    tokens = random_tokens(2, 9)
    expected = read_streams(tiny_decoder(), tokens)
    decoder = tiny_decoder(**{option: 0.5})
    assert torch.equal(read_streams(decoder, tokens), expected)
    assert not torch.equal(read_streams(decoder.train(), tokens), expected)


def test_dropout_reaches_embeddings_positions_and_the_last_rows():
    decoder = tiny_decoder(dropout=0.5).train()
    features, state, _ = decoder.read_segment(random_tokens(2, 3), None)
    table = decoder.positions._sinusoids(range(9), features)
    for dropped in (features, state.embeddings, table):
        assert 0.2 < dropped.eq(0).double().mean() < 0.8


def test_attention_dropout_reaches_memory_that_looks_ahead():
    decoder = tiny_decoder(attention_dropout=0.5).train()
    tokens = random_tokens(2, 6)
    _, state, _ = decoder.read_segment(tokens[:, :3], None)
    first, second = (decoder.read_segment(tokens[:, 3:], state)[1].outputs[0] for _ in range(2))
    # Of four slots, the first has looked ahead, the others were current tokens.
    assert not torch.equal(first[:, :, 0], second[:, :, 0])


def test_attention_dropout_reaches_memory_tokens():
    """In a single layer, what is written depends on the attention of memory tokens alone."""
    decoder = tiny_decoder(("token", "transformer-xl", "right"), attention_dropout=0.5, decoder_layers=1).train()
    tokens = random_tokens(2, 3)
    first, second = (decoder.read_segment(tokens, None)[1].tokens for _ in range(2))
    assert not torch.equal(first, second)
