"""CUDA graphs on a CPU, as far as tests need them: operations are noted when recorded, and done again when replayed.

As on a GPU, a replay reads and writes the memory that the recording read and wrote, and what asks for a value on the
host cannot be recorded.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ON_THE_HOST = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}


class FakeGraph:
    """In place of `torch.cuda.CUDAGraph`."""

    def __init__(self):
        self.operations = []

    def pool(self):
        return None

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, outputs in self.operations:
                again = tree_leaves(func(*args, **kwargs))
                for held, new in zip(outputs, again, strict=True):
                    if isinstance(held, torch.Tensor) and held.data_ptr() != new.data_ptr():
                        held.copy_(new)


class _Noting(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ON_THE_HOST:
            raise RuntimeError(f"{func._schema.name} makes the host wait: a CUDA graph cannot record it")
        result = func(*args, **(kwargs or {}))
        self.graph.operations.append((func, args, kwargs or {}, tree_leaves(result)))
        return result


class _Stream:
    def wait_stream(self, other):
        pass


def install(monkeypatch):
    """Put them in the place of those in `torch.cuda`."""
    for name, stand_in in {
        "CUDAGraph": FakeGraph,
        "graph": lambda graph, **_: _Noting(graph),
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": lambda _: contextlib.nullcontext(),
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
