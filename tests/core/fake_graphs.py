"""CUDA graphs on a CPU, as far as tests need them: operations are noted when recorded, and done again when replayed.

As on a GPU, a replay reads and writes the memory that the recording read and wrote, and what asks for a value on the
host cannot be recorded.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lamemo_fairseq.core import graphs

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


class FakeEvent:
    """In place of `torch.cuda.Event`: when it happens, what waits for it is called."""

    recorded_to = None  # the graph that is being recorded

    def __init__(self, external=False):
        self.external = external
        self.happened = 0
        self.waiting = []

    def record(self, stream=None):
        if FakeEvent.recorded_to is None:
            self.happen()
        elif self.external:
            FakeEvent.recorded_to.operations.append((self.happen, (), {}, [None]))
        else:
            raise RuntimeError("an event within a CUDA graph is seen outside of it only if it is external")

    def happen(self):
        self.happened += 1
        for do in self.waiting:
            do()


class _Noting(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __enter__(self):
        FakeEvent.recorded_to = self.graph
        return super().__enter__()

    def __exit__(self, *error):
        FakeEvent.recorded_to = None
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ON_THE_HOST:
            raise RuntimeError(f"{func._schema.name} makes the host wait: a CUDA graph cannot record it")
        result = func(*args, **(kwargs or {}))
        # The memory of now: a tensor may be given other memory later.
        args, kwargs, outputs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}, result))
        self.graph.operations.append((func, args, kwargs, tree_leaves(outputs)))
        return result


class _Stream:
    def wait_stream(self, other):
        pass


def install(monkeypatch):
    """Put them in the place of those in `torch.cuda`, and let a CPU's segments be recorded."""
    for name, stand_in in {
        "CUDAGraph": FakeGraph,
        "graph": lambda graph, **_: _Noting(graph),
        "Event": FakeEvent,
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": lambda _: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "device": contextlib.nullcontext,  # a type, as `torch.cuda.memory_reserved` asks for
        "manual_seed": torch.default_generator.manual_seed,
        "get_rng_state": lambda _: torch.get_rng_state(),
        "set_rng_state": lambda state, _: torch.set_rng_state(state),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.random, "fork_rng", lambda _: _random_numbers_kept())
    monkeypatch.setattr(graphs, "_recordable", lambda tokens: not torch.is_inference_mode_enabled())


@contextlib.contextmanager
def _random_numbers_kept():
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)
