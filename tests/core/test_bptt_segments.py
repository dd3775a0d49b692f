"""Gradient from segment to segment of an update, for any memory that lets it through."""

from dataclasses import dataclass

import pytest
import torch

from lamemo_fairseq.core import MemoryState, ModelConfig, Passage
from lamemo_fairseq.core.memory import MEMORIES, Memory, MemoryConfig, MemoryOptions
from lamemo_fairseq.core.memory.block_recurrent import BlockRecurrentMemory
from lamemo_fairseq.core.memory.infini import InfiniMemory

from .helpers import first_of_each_memory, random_tokens, tiny_decoder


def test_any_memory_may_let_gradient_through():
    """The base reads an update in segments; a memory says that it carries gradient, and how one segment passes."""

    @dataclass(frozen=True)
    class Sums(MemoryState):
        total: torch.Tensor  # [B, 1, d]

    class SumMemory(Memory):
        """Adds the sum of all rows before a segment to each of its rows."""

        carries_gradient = True

        def initial_state(self, x):
            return Sums(x.new_zeros(x.size(0), 1, x.size(2)))

        def pass_segment(self, x, state, layers, positions, lengths=None):
            seen.append(None if lengths is None else lengths.tolist())
            losses = {"size": x.square().mean()}
            return Passage(x + state.total, Sums((state.total + x.sum(1, keepdim=True))[:, :]), losses)

    seen: list = []
    sizes = {"mem_len": 1, "layers": 1, "heads": 1, "head_dim": 2, "embed_dim": 2, "segment_length": 4}
    memory = SumMemory(MemoryConfig(**sizes, options=MemoryOptions(), bptt_segments=2))
    assert memory.period == 2
    x = torch.arange(12.0).view(2, 3, 2).requires_grad_()  # the last segment has one token
    passage = memory(x, memory.initial_state(x), [], None, torch.tensor([3, 1]))
    assert seen == [[2, 1], [1, 0]]
    assert torch.equal(passage.features[:, 2:], x[:, 2:] + x[:, :2].sum(1, keepdim=True))
    assert passage.losses["size"].isclose(x.square().mean())
    (gradient,) = torch.autograd.grad(passage.features[:, 2].sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))  # through the state
    assert not passage.state.total.requires_grad and not passage.state.total._is_view()
    assert torch.equal(passage.state.total, x.sum(1, keepdim=True))


@pytest.mark.parametrize("memory", [name for name in MEMORIES.names() if MEMORIES[name].carries_gradient])
def test_gradient_reaches_the_segment_before(memory):
    """Otherwise --bptt-segments would train as without it, and say nothing."""
    decoder = tiny_decoder(first_of_each_memory()[memory], segment_length=6, bptt_segments=2).train()
    features, _, _ = decoder.read_segment(torch.tensor([[4, 5, 6, 7, 8, 9]]), None)
    (gradient,) = torch.autograd.grad(features[:, 3:].logsumexp(-1).sum(), decoder.embed_tokens.table(0))
    assert gradient[4:7].any()


def test_gradient_between_segments_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match=r"--bptt-segments is 3, but --memory recurrent lets no gradient through"):
        ModelConfig(17, 3, memory="recurrent", position_encoding="transformer-xl", bptt_segments=3)


@pytest.mark.parametrize("tokens", [9, 11])
@pytest.mark.parametrize(
    "variant",
    [
        ("infini", "transformer-xl", "linear"),
        ("infini", "rotary", "delta"),
        ("block-recurrent", "t5", "fixed"),
        ("block-recurrent", "transformer-xl", "lstm"),
    ],
    ids="-".join,
)
def test_segments_that_layers_read_at_once_equal_those_read_in_turn(variant, tokens, monkeypatch):
    """Features, memory and every gradient, of an update after another; the last segment may be a part of one."""

    def results():
        decoder = tiny_decoder(variant, segment_length=12, bptt_segments=4, decoder_layers=3, mem_len=4).train()
        state, words, gradients = None, random_tokens(2, 12 + tokens), {}
        for update in words.split(12, dim=1):
            features, state, _ = decoder.read_segment(update, state)
            gradients = torch.autograd.grad(features.logsumexp(-1).sum(), [*decoder.parameters()], allow_unused=True)
        return [features, *state.tensors(), *gradients]

    calls: list = []
    plain = Memory.pass_segment
    monkeypatch.setattr(Memory, "pass_segment", lambda *args: calls.append(args[1].shape) or plain(*args))
    at_once, passes = results(), len(calls)
    monkeypatch.delattr(InfiniMemory, "forward")
    monkeypatch.setattr(BlockRecurrentMemory, "segments_at_once", 1)
    in_turn = results()
    assert passes < len(calls) - passes == 4 + -(-tokens // 3)
    for found, expected in zip(at_once, in_turn, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-11)
