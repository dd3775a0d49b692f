"""Memory belongs to streams: no order of forwards can give a segment another memory than its own."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamemo_fairseq.core import StreamMemory
from lamemo_fairseq.core.memory import MissingMemoryError
from lamemo_fairseq.core.memory.position import SegmentPosition, real_tokens

from .helpers import (
    TINY,
    VARIANTS,
    first_of_each_memory,
    random_tokens,
    read_streams,
    read_texts,
    segments_of,
    tiny_decoder,
)

LENGTH = TINY["segment_length"]
MEMORIES = [variant for name, variant in first_of_each_memory().items() if name != "none"]
memories = pytest.mark.parametrize("variant", MEMORIES, ids="-".join)


class Reader:
    """A model that reads segments with the memory of their streams; copied, it takes the memory along as a host does.

    Calls return the scores of ``segment [B, N]`` at a position.
    """

    def __init__(self, variant, training=False):
        self.model = tiny_decoder(variant).train(training)
        self.streams = StreamMemory(self.model.memory.state)

    def __call__(self, segment, position, lengths=None):
        state = self.streams.read(position, self.model.training)
        features, state, _ = self.model(segment, state, lengths)
        self.streams.write(position, self.model.training, state)
        return self.model.output_layer(features)

    def read(self, tokens, split="train"):
        """Scores of ``tokens [B, T]`` in streams of a split."""
        return torch.cat([self(segment, position) for position, segment in positions(tokens, split)], dim=1)


def positions(tokens, split="train"):
    """The positions and tokens of all segments, in order."""
    segments = tokens.split(LENGTH, dim=1)
    for index, segment in enumerate(segments):
        yield (
            SegmentPosition(split, 1, 100, LENGTH, tuple(range(len(tokens))), index, index == len(segments) - 1),
            segment,
        )


@memories
def test_streams_give_what_whole_texts_give(variant):
    reader = Reader(variant)
    tokens = random_tokens(2, 14)
    torch.testing.assert_close(reader.read(tokens), read_texts(reader.model, tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_whole_texts_do_not_depend_on_their_neighbours(variant):
    decoder = tiny_decoder(variant)
    tokens, lengths = random_tokens(3, 11), torch.tensor([11, 7, 2])
    together = read_texts(decoder, tokens.masked_fill(torch.arange(11) >= lengths.unsqueeze(1), 1), lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = read_texts(decoder, tokens[row : row + 1, :length])
        torch.testing.assert_close(together[row : row + 1, :length], alone, rtol=0, atol=1e-12)


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
        together = read_streams(decoder, tokens, lengths)
        apart = [
            read_streams(decoder, part, of_part.tolist())
            for part, of_part in zip(tokens.split(cut), torch.tensor(lengths).split(cut), strict=True)
        ]
    real = real_tokens(tokens, torch.tensor(lengths))
    torch.testing.assert_close(together[real], torch.cat(apart)[real], rtol=0, atol=1e-12)


@memories
@pytest.mark.parametrize("training", [True, False])
def test_a_segment_fed_again_changes_nothing(variant, training):
    reader = Reader(variant, training)
    tokens = random_tokens(2, 15)
    expected = reader.read(tokens)
    again = []
    for position, segment in positions(tokens):
        first = reader(segment, position)
        again.append(reader(segment, position))
        assert torch.equal(first, again[-1])
    assert torch.equal(torch.cat(again, dim=1), expected)


def interruptions(reader, tokens):
    """What a trainer may do between two segments of training."""

    def validation(split):
        reader.model.eval()
        reader.read(random_tokens(3, 8, seed=1), split)
        reader.model.train()

    def first_batch_of_validation():
        position, segment = next(positions(random_tokens(3, 8, seed=1), "valid"))
        reader(segment, position)

    def a_text():
        reader.model.read_text(tokens[:1])

    return {
        "validation": lambda: validation("valid"),
        "two validation sets": lambda: (validation("valid"), validation("valid1")),
        "validation on the training split": lambda: validation("train"),
        "dummy batch": first_batch_of_validation,
        "hub call": a_text,
        "average": lambda: copy.deepcopy(reader),
    }


@memories
@pytest.mark.parametrize("name", interruptions(None, None))
def test_nothing_between_two_segments_reaches_the_memory_of_training(variant, name):
    reader = Reader(variant, training=True)
    tokens = random_tokens(2, 15)
    expected = reader.read(tokens)
    read = []
    for position, segment in positions(tokens):
        read.append(reader(segment, position))
        interruptions(reader, tokens)[name]()
    assert torch.equal(torch.cat(read, dim=1), expected)


@memories
def test_a_new_epoch_starts_from_an_empty_memory(variant):
    reader = Reader(variant, training=True)
    tokens = random_tokens(2, 9)
    first = reader.read(tokens)
    position, segment = next(positions(tokens))
    assert torch.equal(reader(segment, replace(position, epoch=2)), first[:, :3])


@memories
@pytest.mark.parametrize(
    "wrong",
    [
        {"index": 2},
        {"index": 4},
        {"epoch": 2},
        {"streams": (1, 2)},
        {"num_streams": 7},
        {"segment_length": 4},
        {"split": "valid"},
    ],
    ids=str,
)
def test_a_segment_without_its_predecessor_is_an_error(variant, wrong):
    reader = Reader(variant, training=True)
    (first, segment), (second, _), *_ = positions(random_tokens(2, 15))
    reader(segment, first)
    with pytest.raises(MissingMemoryError, match="has to be fed first"):
        reader(segment, replace(second, **wrong))
    reader(segment, second)  # and the right one still works


@memories
def test_memory_is_let_go_where_streams_end(variant):
    reader = Reader(variant)
    *_, (last, segment) = positions(random_tokens(2, 9))
    reader.read(random_tokens(2, 9))
    with pytest.raises(MissingMemoryError):
        reader(segment, replace(last, index=last.index + 1))


@memories
def test_memory_of_segments_long_past_is_let_go(variant):
    reader = Reader(variant)
    segments = list(positions(random_tokens(2, 60)))
    for position, segment in segments[:-1]:
        reader(segment, position)
    with pytest.raises(MissingMemoryError):
        reader(segments[1][1], segments[1][0])


@memories
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))], ids=["deepcopy", "pickle"])
def test_a_copied_model_has_read_nothing(variant, copied):
    reader = Reader(variant, training=True)
    (first, segment), (second, _), *_ = positions(random_tokens(2, 9))
    reader(segment, first)
    other = copied(reader)
    with pytest.raises(MissingMemoryError):
        other(segment, second)
    assert torch.equal(other(segment, first), reader(segment, first))


@memories
def test_memory_holds_no_gradient(variant):
    decoder = tiny_decoder(variant).train()
    _, state, _ = decoder.read_segment(random_tokens(2, 3), None)
    tensors = []
    state.map(lambda t: tensors.append(t) or t)
    assert tensors and not any(t.requires_grad for t in tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_normalizers_stay_in_float32_or_wider(dtype):
    decoder = tiny_decoder(dtype=dtype)
    state = None
    for segment in random_tokens(2, 9).split(3, dim=1):
        _, state, _ = decoder.read_segment(segment, state)
    assert {t.dtype for t in state.normalizers} == {torch.promote_types(dtype, torch.float32)}
    assert {t.dtype for t in (state.embeddings, *state.outputs)} == {dtype}


def test_probabilities_are_computed_in_float32_or_wider():
    decoder = tiny_decoder(dtype=torch.bfloat16)
    features = decoder.read_text(random_tokens(2, 3))
    assert decoder.output_layer(features).dtype == torch.bfloat16
    assert decoder.log_probs(features).dtype == torch.float32


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
@pytest.mark.parametrize("layers", [1, 2])
def test_every_parameter_has_a_gradient_from_the_first_segment_on(variant, layers):
    decoder = tiny_decoder(variant, decoder_layers=layers).train()
    state = None
    for segment, _ in segments_of(decoder, random_tokens(2, 9)):
        decoder.zero_grad()
        features, state, losses = decoder(segment, state)
        (decoder.output_layer(features).logsumexp(-1).sum() + sum(losses.values())).backward()
        assert [name for name, p in decoder.named_parameters() if p.grad is None] == []


@memories
def test_recomputed_activations_give_the_same_gradients(variant):
    passes = []

    def gradients(checkpoint):
        decoder = tiny_decoder(variant, checkpoint_activations=checkpoint, decoder_layers=3).train()
        passes.append(0)
        decoder.layers[1].feed_forward.register_forward_hook(lambda *_: passes.append(passes.pop() + 1))
        scores = read_streams(decoder, random_tokens(2, 9))
        scores.logsumexp(-1).sum().backward()
        return {name: p.grad for name, p in decoder.named_parameters()}

    plain, recomputed = gradients(False), gradients(True)
    assert passes == [3, 6]  # once a segment, and twice when the backward pass runs the layer again
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name], rtol=1e-12, atol=1e-12)
