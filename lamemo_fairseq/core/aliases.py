"""Segments read on other leaves over the parameters' memory, for graphs that are recorded.

Shapes: B streams, N tokens of a segment, d model width.
"""

from typing import Callable, List, Optional, Protocol, Sequence, Tuple

import torch
from torch import Tensor, nn

from .memory import MemoryState, Passage


class ReadSegment(Protocol):
    """Reads one segment: its features, the state after it, and losses."""

    def __call__(self, tokens: Tensor, state: Optional[MemoryState]) -> Passage: ...


OnLeaves = Callable[[Sequence[nn.Parameter], Tensor, MemoryState], Tuple[List[Tensor], Passage]]


def run_on_aliases(
    read: ReadSegment, module: nn.Module, parameters: Sequence[nn.Parameter], tokens: Tensor, state: MemoryState
) -> Tuple[List[Tensor], Passage]:
    """Return ``read(tokens, state)`` on other leaves over the parameters' memory, and these leaves.

    Graphs of operations that are still alive, such as that of the last loss, tie a parameter to their stream. A
    recording must not touch another stream.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    leaves = [p.detach().requires_grad_() for p in parameters]
    replaced = {f"module.{names[id(p)]}": leaf for p, leaf in zip(parameters, leaves, strict=True)}
    return leaves, torch.func.functional_call(_Call(read, module), replaced, (tokens, state))


class _Call(nn.Module):
    """A method of a module as a module: only a module can be called on other parameters."""

    def __init__(self, method: ReadSegment, module: nn.Module):
        super().__init__()
        self.method, self.module = method, module

    def forward(self, tokens: Tensor, state: MemoryState) -> Passage:
        return self.method(tokens, state)
