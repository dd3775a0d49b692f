"""Fairseq's decoder reads streams through their memory, whatever its trainer does between two segments."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamemo_fairseq.core.memory import MEMORIES as MEMORY_CLASSES
from lamemo_fairseq.core.memory import MissingMemoryError
from lamemo_fairseq.core.memory.position import real_tokens

from .core.helpers import first_of_each_memory
from .helpers import VARIANTS, random_tokens, read_streams, segments_of, tiny_decoder

MEMORIES = [variant for name, variant in first_of_each_memory().items() if name != "none"]
memories = pytest.mark.parametrize("variant", MEMORIES, ids="-".join)


def forward(decoder, segment, position):
    return decoder(segment, position=position)[0]


@memories
def test_streams_give_what_whole_texts_give(variant):
    decoder = tiny_decoder(variant)
    tokens = random_tokens(2, 14)
    torch.testing.assert_close(read_streams(decoder, tokens), decoder(tokens)[0], rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    variant=st.sampled_from(VARIANTS),
    cut=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 11), min_size=4, max_size=4),
)
def test_streams_do_not_depend_on_their_neighbours(variant, cut, lengths):
    decoder = tiny_decoder(variant)
    tokens = random_tokens(4, max(lengths))
    with torch.no_grad():
        together = read_streams(decoder, tokens, lengths=lengths)
        apart = [
            read_streams(decoder, part, streams=range(len(part)), lengths=of_part.tolist())
            for part, of_part in zip(tokens.split(cut), torch.tensor(lengths).split(cut), strict=True)
        ]
    real = real_tokens(tokens, torch.tensor(lengths))
    torch.testing.assert_close(together[real], torch.cat(apart)[real], rtol=0, atol=1e-12)


@memories
@pytest.mark.parametrize("training", [True, False])
def test_a_segment_fed_again_changes_nothing(variant, training):
    decoder = tiny_decoder(variant).train(training)
    tokens = random_tokens(2, 15)
    expected = read_streams(decoder, tokens)
    again = []
    for position, segment in segments_of(decoder, tokens):
        first = forward(decoder, segment, position)
        again.append(forward(decoder, segment, position))
        assert torch.equal(first, again[-1])
    assert torch.equal(torch.cat(again, dim=1), expected)


def interruptions(decoder, tokens):
    """What a trainer may do between two segments of training."""

    def validation(split):
        decoder.eval()
        read_streams(decoder, random_tokens(3, 8, seed=1), split=split)
        decoder.train()

    def first_batch_of_validation():
        position, segment = next(segments_of(decoder, random_tokens(3, 8, seed=1), split="valid"))
        forward(decoder, segment, position)

    def a_text():
        decoder(tokens[:1])

    return {
        "validation": lambda: validation("valid"),
        "two validation sets": lambda: (validation("valid"), validation("valid1")),
        "validation on the training split": lambda: validation("train"),
        "dummy batch": first_batch_of_validation,
        "hub call": a_text,
        "average": lambda: copy.deepcopy(decoder),
    }


@memories
@pytest.mark.parametrize("name", interruptions(None, None))
def test_nothing_between_two_segments_reaches_the_memory_of_training(variant, name):
    decoder = tiny_decoder(variant).train()
    tokens = random_tokens(2, 15)
    expected = read_streams(decoder, tokens, split="train")
    read = []
    for position, segment in segments_of(decoder, tokens, split="train"):
        read.append(forward(decoder, segment, position))
        interruptions(decoder, tokens)[name]()
    assert torch.equal(torch.cat(read, dim=1), expected)


@memories
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))], ids=["deepcopy", "pickle"])
def test_a_copied_model_has_read_nothing(variant, copied):
    decoder = tiny_decoder(variant).train()
    (first, segment), (second, _), *_ = segments_of(decoder, random_tokens(2, 9), split="train")
    forward(decoder, segment, first)
    other = copied(decoder)
    with pytest.raises(MissingMemoryError):
        forward(other, segment, second)
    assert torch.equal(forward(other, segment, first), forward(decoder, segment, first))


def test_probabilities_are_computed_in_float32_or_wider():
    decoder = tiny_decoder(dtype=torch.bfloat16)
    scores = decoder(random_tokens(2, 3))
    assert scores[0].dtype == torch.bfloat16
    for log_probs in (True, False):
        assert decoder.get_normalized_probs(scores, log_probs).dtype == torch.float32


@memories
def test_layers_that_read_other_segments_give_the_same_features(variant):
    """Two readings in one go, the first of them left before its end; memory is there for a segment fed after them."""
    options = {"tokens_per_sample": 4, "compressed_len": 2, "decoder_layers": 3, "cuda_graphs": True}
    order = "diagonal" if MEMORY_CLASSES[variant[0]].is_layered() else "auto"
    plain, diagonal = (tiny_decoder(variant, **options, reading_order=o).eval() for o in ("plain", order))
    tokens = random_tokens(1, 58)
    segments = list(segments_of(plain, tokens))
    batches = [
        {"src_tokens": segment, "src_lengths": torch.tensor([segment.size(1)]), "position": position}
        for position, segment in [*segments[:-2], *segments[:-1]]
    ]
    with torch.no_grad():
        expected = [plain.extract_features(**batch)[0] for batch in batches]
        found = list(diagonal.read_streams(batches))
        position, segment = segments[-1]
        for decoder, features in ((plain, expected), (diagonal, found)):
            features.append(decoder.extract_features(segment, position=position)[0])
    assert len(found) == len(expected)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
