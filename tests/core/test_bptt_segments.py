"""Gradient from segment to segment of an update, for any memory that lets it through."""

from dataclasses import dataclass

import pytest
import torch

from lamemo_fairseq.core import MemoryState, ModelConfig, Passage
from lamemo_fairseq.core.memory import Memory, MemoryConfig, MemoryOptions


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


def test_gradient_between_segments_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match=r"--bptt-segments is 3, but --memory recurrent lets no gradient through"):
        ModelConfig(17, 3, memory="recurrent", position_encoding="transformer-xl", bptt_segments=3)
