"""Presets have the released models' sizes: slots, and the parameter counts of the released code."""

import pytest
import torch
from fairseq.models import MODEL_DATACLASS_REGISTRY

import lamemo_fairseq  # noqa: F401  (registers the models)
from lamemo_fairseq.core.memory import MEMORIES
from lamemo_fairseq.models.decoder import FairseqMemoryDecoder

from .helpers import dictionary_of

WIKITEXT_WORDS, ENWIK8_SYMBOLS = 267_735, 204


def parameters(name: str, words: int, **options) -> int:
    config = MODEL_DATACLASS_REGISTRY[name](tokens_per_sample=None, **options)
    with torch.device("meta"):  # sizes without the weights
        decoder = FairseqMemoryDecoder(config, dictionary_of(words))
    return sum(p.numel() for p in decoder.parameters())


@pytest.mark.parametrize(("preset", "released"), [("wt103", 150), ("enwik8", 512), ("text8", 512)])
@pytest.mark.parametrize("memory", [name for name in MEMORIES.names() if MEMORIES[name].remembers])
def test_memories_have_as_many_slots_as_the_released_models(memory, preset, released):
    """Of all kinds together, and as many tokens of a segment; the paper's memory tokens come on top of its cache."""
    config = MODEL_DATACLASS_REGISTRY[f"{MEMORIES[memory].architecture.name}_{preset}"](tokens_per_sample=None)
    with torch.device("meta"):
        found = FairseqMemoryDecoder(config, dictionary_of(10)).memory
    assert found.period == released
    if MEMORIES[memory].has_slots:
        slots = found.slots + (config.num_basis_functions if memory == "continuous" else 0)
        expected = released + (config.memory_tokens if (memory, preset) == ("token", "wt103") else 0)
        assert slots == expected, "let a preset of the memory's Architecture choose fewer"


@pytest.mark.parametrize(
    ("name", "words", "options", "count"),
    [
        ("transformer_xl_lm_wt103", WIKITEXT_WORDS, {}, 151_106_305),
        ("lamemo_lm_wt103", WIKITEXT_WORDS, {}, 151_106_305 + 410),
        ("transformer_xl_lm_wt103", WIKITEXT_WORDS, {"position_encoding": "shaw"}, 150_438_445),
        ("recurrent_memory_transformer_lm_wt103", WIKITEXT_WORDS, {}, 151_106_305 + 10 * 410),
        # A gate a head.
        ("infini_attention_lm_wt103", WIKITEXT_WORDS, {}, 151_106_305 + 16 * 10),
        ("infini_attention_lm_enwik8", ENWIK8_SYMBOLS, {}, 41_055_436 + 12 * 8),
        ("infini_attention_lm_text8", ENWIK8_SYMBOLS, {"memory_update_rule": "delta"}, 41_055_436 + 12 * 8),
        ("relative_transformer_lm_wt103", WIKITEXT_WORDS, {"position_encoding": "absolute"}, 148_415_885),
        # W_Q, W_K, W_V, w_beta and its bias a layer.
        (
            "associative_recurrent_memory_transformer_lm_wt103",
            WIKITEXT_WORDS,
            {},
            151_106_305 + 16 * 410 + 16 * (410 * (2 * 96 + 410 + 1) + 1),
        ),
        # For sinusoids, 32 biases a head; its scale. One layer has two more maps, a scale, and a cell: first states and
        # identities, six maps' worth and two scales, three vectors.
        (
            "block_recurrent_transformer_lm_wt103",
            WIKITEXT_WORDS,
            {},
            151_106_305 - (2 + 16 * 410) * 410 + 16 * 10 * (32 + 1) + 8 * 410 * 410 + 3 * 10 + (2 * 150 + 3) * 410,
        ),
        ("transformer_xl_lm_enwik8", ENWIK8_SYMBOLS, {}, 41_055_436),
        ("ernie_doc_lm_enwik8", ENWIK8_SYMBOLS, {}, 41_055_436),
        # A scale for each head of one layer, and a gate.
        ("memorizing_transformer_lm_wt103", WIKITEXT_WORDS, {}, 151_106_305 + 2 * 10),
        ("memorizing_transformer_lm_enwik8", ENWIK8_SYMBOLS, {"retrieval": "dense"}, 41_055_436 + 8),
        # An output projection, W_k and W_v, and w_mu and w_sigma a layer.
        ("infinity_former_lm_wt103", WIKITEXT_WORDS, {}, 151_106_305 + 16 * (3 * 410 * 410 + 2 * 76)),
        ("lamemo_lm_enwik8", ENWIK8_SYMBOLS, {}, 41_055_436 + 512),
        ("lamemo_lm_text8", ENWIK8_SYMBOLS, {}, 41_055_436 + 512),
        # Transformer-XL and, in every layer, a convolution over r rows.
        ("compressive_transformer_lm_wt103", WIKITEXT_WORDS, {}, 151_106_305 + 16 * (3 * 410 + 1) * 410),
        ("compressive_transformer_lm_enwik8", ENWIK8_SYMBOLS, {}, 41_055_436 + 12 * (4 * 512 + 1) * 512),
        ("compressive_transformer_lm_text8", ENWIK8_SYMBOLS, {"compression": "most-used"}, 41_055_436),
    ],
)
def test_parameter_counts(name, words, options, count):
    assert parameters(name, words, **options) == count
