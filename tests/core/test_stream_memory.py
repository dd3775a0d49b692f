"""Memory belongs to streams: no order of forwards can give a segment another memory than its own."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamemo_fairseq.core.memory import MissingMemoryError
from lamemo_fairseq.core.memory.position import real_tokens

from .helpers import VARIANTS, random_tokens, read_streams, segments_of, tiny_decoder

# Of every memory the first variant.
MEMORIES = [v for v in {variant[0]: variant for variant in reversed(VARIANTS)}.values() if v[0] != "none"]
memories = pytest.mark.parametrize("variant", MEMORIES, ids="-".join)


def forward(decoder, segment, position):
    return decoder(segment, position=position)[0]


@memories
def test_streams_give_what_whole_texts_give(variant):
    decoder = tiny_decoder(variant)
    tokens = random_tokens(2, 14)
    torch.testing.assert_close(read_streams(decoder, tokens), decoder(tokens)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_whole_texts_do_not_depend_on_their_neighbours(variant):
    decoder = tiny_decoder(variant)
    tokens, lengths = random_tokens(3, 11), torch.tensor([11, 7, 2])
    together = decoder(tokens.masked_fill(torch.arange(11) >= lengths.unsqueeze(1), 1), lengths)[0]
    for row, length in enumerate(lengths.tolist()):
        alone = decoder(tokens[row : row + 1, :length])[0]
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
def test_a_new_epoch_starts_from_an_empty_memory(variant):
    decoder = tiny_decoder(variant).train()
    tokens = random_tokens(2, 9)
    first = read_streams(decoder, tokens, split="train")
    position, segment = next(segments_of(decoder, tokens, split="train"))
    assert torch.equal(forward(decoder, segment, replace(position, epoch=2)), first[:, :3])


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
    decoder = tiny_decoder(variant).train()
    (first, segment), (second, _), *_ = segments_of(decoder, random_tokens(2, 15), split="train")
    forward(decoder, segment, first)
    with pytest.raises(MissingMemoryError, match="has to be fed first"):
        forward(decoder, segment, replace(second, **wrong))
    forward(decoder, segment, second)  # and the right one still works


@memories
def test_memory_is_let_go_where_streams_end(variant):
    decoder = tiny_decoder(variant)
    *_, (last, segment) = segments_of(decoder, random_tokens(2, 9))
    read_streams(decoder, random_tokens(2, 9))
    with pytest.raises(MissingMemoryError):
        forward(decoder, segment, replace(last, index=last.index + 1))


@memories
def test_memory_of_segments_long_past_is_let_go(variant):
    decoder = tiny_decoder(variant)
    segments = list(segments_of(decoder, random_tokens(2, 60)))
    for position, segment in segments[:-1]:
        forward(decoder, segment, position)
    with pytest.raises(MissingMemoryError):
        forward(decoder, segments[1][1], segments[1][0])


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


@memories
def test_memory_holds_no_gradient(variant):
    decoder = tiny_decoder(variant).train()
    _, state, _ = decoder.step(random_tokens(2, 3), None)
    tensors = []
    state.map(lambda t: tensors.append(t) or t)
    assert tensors and not any(t.requires_grad for t in tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_normalizers_stay_in_float32_or_wider(dtype):
    decoder = tiny_decoder(dtype=dtype)
    state = None
    for segment in random_tokens(2, 9).split(3, dim=1):
        _, state, _ = decoder.step(segment, state)
    assert {t.dtype for t in state.normalizers} == {torch.promote_types(dtype, torch.float32)}
    assert {t.dtype for t in (state.embeddings, *state.outputs)} == {dtype}


def test_probabilities_are_computed_in_float32_or_wider():
    decoder = tiny_decoder(dtype=torch.bfloat16)
    scores = decoder(random_tokens(2, 3))
    assert scores[0].dtype == torch.bfloat16
    for log_probs in (True, False):
        assert decoder.get_normalized_probs(scores, log_probs).dtype == torch.float32


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
@pytest.mark.parametrize("layers", [1, 2])
def test_every_parameter_has_a_gradient_from_the_first_segment_on(variant, layers):
    decoder = tiny_decoder(variant, decoder_layers=layers).train()
    for position, segment in segments_of(decoder, random_tokens(2, 9), split="train"):
        decoder.zero_grad()
        scores, losses = decoder(segment, position=position)
        (scores.logsumexp(-1).sum() + sum((losses or {}).values())).backward()
        assert [name for name, p in decoder.named_parameters() if p.grad is None] == []


@memories
def test_recomputed_activations_give_the_same_gradients(variant):
    passes = []

    def gradients(checkpoint):
        decoder = tiny_decoder(variant, checkpoint_activations=checkpoint, decoder_layers=3).train()
        passes.append(0)
        decoder.layers[1].feed_forward.register_forward_hook(lambda *_: passes.append(passes.pop() + 1))
        scores = read_streams(decoder, random_tokens(2, 9), split="train")
        scores.logsumexp(-1).sum().backward()
        return {name: p.grad for name, p in decoder.named_parameters()}

    plain, recomputed = gradients(False), gradients(True)
    assert passes == [3, 6]  # once a segment, and twice when the backward pass runs the layer again
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name], rtol=1e-12, atol=1e-12)
