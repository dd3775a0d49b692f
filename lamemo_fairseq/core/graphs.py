"""Segments as CUDA graphs: one launch for the layers' forward pass, and in training one for the backward.

The host needs longer to launch the kernels of a small segment than the GPU needs to run them; a graph records them.

Shapes: B streams, N tokens of a segment, d model width.
"""

import logging
from collections import deque
from functools import partial
from typing import Callable, ContextManager, Deque, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .aliases import OnLeaves, ReadSegment, run_on_aliases
from .gradients import Bucket, Reducer, copies_of, views_of, written_to
from .kernels.autograd import Context, Function
from .kernels.copies import copy_all
from .kernels.module_tree import ModuleTree, Signature, tree_of
from .memory import MemoryState, Passage

logger = logging.getLogger(__name__)

WARM_UP = 3  # passes before recording, in which kernels are compiled and workspaces allocated


class SegmentSignature(NamedTuple):
    """Everything that a recording depends on."""

    tokens: torch.Size
    state: List[torch.Size]
    module: Signature
    buckets: List[Bucket]


class _Recorded:
    """The last segments of training, or of evaluation, and the graphs that were recorded: one for each kind.

    Args:
        kinds: the number of kinds of segments, which take turns.
    """

    def __init__(self, kinds: int) -> None:
        self.kinds = kinds
        self.last: Deque[SegmentSignature] = deque(maxlen=kinds)
        self.recordings: List[Tuple[SegmentSignature, _Recording]] = []  # the oldest first

    def of(self, signature: SegmentSignature) -> "Optional[_Recording]":
        return next((recording for known, recording in self.recordings if known == signature), None)


class SegmentGraphs:
    """Reads a decoder's segments, from a graph where possible.

    A graph is recorded when two consecutive segments have the same shapes, once for training and once for evaluation.
    Shapes stay the same once the memory is full. If there are several kinds of segments, each has a graph of its own.
    Everything else runs without a graph: ragged segments, autocast, and modules with hooks, which a graph would not
    call. Only a recording's last forward pass can be followed by a backward pass.

    A host with several ranks may set a `reducer`, which reduces gradients while a recorded backward pass runs.

    Args:
        kinds: the number of kinds of segments, which take turns.
    """

    def __init__(self, kinds: int = 1) -> None:
        self.kinds = kinds
        self.reducer: Optional[Reducer] = None
        self._recorded = {True: _Recorded(kinds), False: _Recorded(kinds)}  # by whether gradients are computed
        self._begun: Optional[_Begun] = None

    def __reduce__(self) -> Tuple[object, ...]:
        return (SegmentGraphs, (self.kinds,))  # a copied or stored model records anew

    def __call__(self, read: ReadSegment, module: nn.Module, tokens: Tensor, state: Optional[MemoryState]) -> Passage:
        """Return ``read(tokens, state)``."""
        learns, begun = torch.is_grad_enabled(), None
        if learns:
            begun, self._begun = self._begun, None
        if state is None or module.training != learns or not self.takes(module, tokens):
            return read(tokens, state)
        tree = tree_of(module)
        recorded, signature = self._recorded[learns], self._signature(tree, tokens, state)
        known = recorded.of(signature)
        again = known is None and signature in recorded.last
        recorded.last.append(signature)
        if known is not None:
            if begun is not None and begun.serves(known, tokens, state):
                return begun.passage()
            return known(tokens, state)
        if not again:
            return read(tokens, state)
        if len(recorded.recordings) == self.kinds:
            del recorded.recordings[0]  # frees the oldest one's memory first
        begun = None
        with torch.random.fork_rng([tokens.device]):  # a resumed run records later, and draws the same
            if learns:
                trained = [p for p in tree.parameters if p.requires_grad]
                recording: _Recording = _TrainingRecording(read, module, trained, tokens, state, self.reducer)
            else:
                recording = _EvaluationRecording(read, tokens, state)
        recorded.recordings.append((signature, recording))
        logger.info(
            "recorded a CUDA graph for %s segments of %s tokens, which keeps %.2f GiB to itself",
            "training" if learns else "evaluation",
            " x ".join(map(str, tokens.shape)),
            recording.memory / 2**30,
        )
        return recording(tokens, state)

    def takes(self, module: nn.Module, tokens: Tensor) -> bool:
        """Tell whether segments like ``tokens [B, N]`` can be recorded: on a GPU, outside autocast, without hooks."""
        return _recordable(tokens) and not tree_of(module).hooked

    def begin(self, module: nn.Module, tokens: Tensor, state: MemoryState, seed: int) -> Optional[Tensor]:
        """Run the forward pass of a recorded segment before it is asked for, with the random numbers of *seed*.

        The next call uses the result if it is for these very tensors and the device's generator begins at *seed*. It
        discards the result if a parameter has changed, or a module was replaced. The generator is left as it was.

        Returns:
            The features ``[B, N, d]`` that this call would return; None if nothing was begun.
        """
        self._begun, recorded = None, self._recorded[True]
        if not recorded.recordings or not module.training:
            return None
        tree = tree_of(module)
        recording = None if tree.hooked else recorded.of(self._signature(tree, tokens, state))
        if not isinstance(recording, _TrainingRecording):
            return None
        self._begun = recording.begin(tokens, state, seed)
        return self._begun.features

    def _signature(self, tree: ModuleTree, tokens: Tensor, state: MemoryState) -> SegmentSignature:
        buckets = [] if self.reducer is None else list(self.reducer.buckets)
        return SegmentSignature(tokens.shape, [t.shape for t in state.tensors()], tree.signature(), buckets)


def _recordable(tokens: Tensor) -> bool:
    autocast = torch.is_autocast_enabled(tokens.device.type)
    return tokens.is_cuda and not autocast and not torch.is_inference_mode_enabled()


class _Recording:
    """A segment's forward pass, and tensors that it reads and writes."""

    passage: Passage  # the one recorded
    memory: int  # bytes that it keeps to itself

    def __init__(self, tokens: Tensor, state: MemoryState):
        self.tokens = tokens.clone()
        self.state = state.map(lambda t: t.to(tokens.device, copy=True))
        self.passes = 0
        self.forward_graph = torch.cuda.CUDAGraph()

    def __call__(self, tokens: Tensor, state: MemoryState) -> Passage:
        """Replay the graph on other tokens and another state."""
        raise NotImplementedError

    def _run(self, tokens: Tensor, state: MemoryState) -> None:
        with torch.no_grad():
            self.tokens.copy_(tokens)
            copy_all(self.state.tensors(), state.tensors())
        self.forward_graph.replay()
        self.passes += 1

    def _after(self) -> MemoryState:
        """Return copies of the state after the segment, as the next replay overwrites it."""
        after = self.passage.state.map(torch.empty_like)
        copy_all(after.tensors(), self.passage.state.tensors())
        return after


class _EvaluationRecording(_Recording):
    """A segment's forward pass alone."""

    def __init__(self, read: ReadSegment, tokens: Tensor, state: MemoryState):
        super().__init__(tokens, state)
        self.memory = warmed_up(lambda: read(self.tokens, self.state), lambda: self._record(read))

    def _record(self, read: ReadSegment) -> None:
        with recorded_to(self.forward_graph):
            self.passage = read(self.tokens, self.state)

    def __call__(self, tokens: Tensor, state: MemoryState) -> Passage:
        self._run(tokens, state)
        return self.passage._replace(features=self.passage.features.clone(), state=self._after())


class _TrainingRecording(_Recording):
    """A segment's forward pass and its backward pass."""

    def __init__(
        self,
        read: ReadSegment,
        module: nn.Module,
        parameters: Sequence[nn.Parameter],
        tokens: Tensor,
        state: MemoryState,
        reducer: Optional[Reducer] = None,
    ):
        self.parameters = list(parameters)
        self.reducer = reducer
        self.buckets = [] if reducer is None else list(reducer.buckets)
        super().__init__(tokens, state)
        run: OnLeaves = partial(run_on_aliases, read, module)
        self.memory = warmed_up(lambda: self._warm_up(run), lambda: self._record(run))

    def _warm_up(self, run: OnLeaves) -> None:
        leaves, passage = run(self.parameters, self.tokens, self.state)
        outputs = _outputs(passage)
        gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs], allow_unused=True)
        # The output layer's own parameters take no part.
        self.parameters = [p for p, g in zip(self.parameters, gradients, strict=True) if g is not None]

    def _record(self, run: OnLeaves) -> None:
        with recorded_to(self.forward_graph):
            leaves, passage = run(self.parameters, self.tokens, self.state)
        outputs = _outputs(passage)
        self.output_grads = [torch.empty_like(output) for output in outputs]
        self.backward_graph = torch.cuda.CUDAGraph()
        gathered = {p for bucket in self.buckets for p in bucket.parameters}
        self.others = [p for p in self.parameters if p not in gathered]
        leaf_of = dict(zip(self.parameters, leaves, strict=True))
        recorded = recorded_to(self.backward_graph, shared=self.forward_graph)
        with recorded, written_to(self.buckets, leaf_of) as self.ready:
            grads = torch.autograd.grad(outputs, leaves, self.output_grads)
            given = zip(self.parameters, grads, strict=True)
            self.grads = [g.flatten().view_as(g) for p, g in given if p not in gathered]
        # Detached outputs, since the graph of the backward pass has the operations that made them.
        self.outputs = [output.detach() for output in outputs]
        self.passage = passage._replace(features=self.outputs[0], losses={})
        self.losses = list(passage.losses)

    def __call__(self, tokens: Tensor, state: MemoryState) -> Passage:
        self._run(tokens, state)
        return self.passed(*self._connected())

    def _connected(self) -> Tuple[Tensor, ...]:
        """Return the outputs of the last replay, connected to every parameter; that takes the host a while."""
        outputs: Tuple[Tensor, ...] = _Replay.apply(self, *self.parameters)
        return outputs

    def passed(self, features: Tensor, *losses: Tensor) -> Passage:
        """Return the passage of the last replay, with these outputs of it."""
        by_name: Dict[str, Tensor] = dict(zip(self.losses, losses, strict=True))
        return self.passage._replace(features=features, state=self._after(), losses=by_name)

    def backward(self) -> List[Optional[Tensor]]:
        """Replay the backward pass: the gradients of the parameters, but for those that the reducer takes."""
        reducer = self.reducer
        reduces = reducer is not None and reducer.begin()
        self.backward_graph.replay()
        # These are copies, as in the forward pass.
        given: Dict[nn.Parameter, Tensor] = {}
        if self.grads:
            given.update(zip(self.others, copies_of(self.grads), strict=True))
        for bucket, ready in zip(self.buckets, self.ready, strict=True):
            if reducer is not None and reduces:
                reducer.reduce(bucket, ready)
            else:
                given.update(zip(bucket.parameters, views_of(bucket.flat.clone(), bucket.parameters), strict=True))
        return [given.get(p) for p in self.parameters]

    def begin(self, tokens: Tensor, state: MemoryState, seed: int) -> "_Begun":
        """Replay the forward pass with the random numbers of *seed*; the device's generator stays as it is."""
        device = tokens.device
        with torch.random.fork_rng([device]), torch.cuda.device(device), torch.enable_grad():
            torch.cuda.manual_seed(seed)
            before = torch.cuda.get_rng_state(device)
            self._run(tokens, state)
            after = torch.cuda.get_rng_state(device)
            return _Begun(self, tokens, state, before, after, *self._connected())

    def versions(self) -> List[int]:
        """Return how often each parameter has been changed in place. PyTorch counts no change through ``.data``."""
        return [p._version for p in self.parameters]


class _Begun:
    """A forward pass of training that was begun before it was asked for."""

    def __init__(
        self,
        recording: _TrainingRecording,
        tokens: Tensor,
        state: MemoryState,
        random_before: Tensor,  # state of the device's generator
        random_after: Tensor,
        *outputs: Tensor,
    ):
        self._recording, self._tokens, self._state = recording, tokens, state
        self._random_before, self._random_after = random_before, random_after
        self._versions = recording.versions()
        self._outputs = outputs
        self.features = outputs[0]

    def serves(self, recording: _Recording, tokens: Tensor, state: MemoryState) -> bool:
        """Return whether the recording would compute the same for these."""
        return (
            self._recording is recording
            and self._tokens is tokens
            and self._state is state
            and self._versions == self._recording.versions()
            and torch.equal(self._random_before, torch.cuda.get_rng_state(tokens.device))
        )

    def passage(self) -> Passage:
        """Return the results, and leave the device's generator as a call would."""
        torch.cuda.set_rng_state(self._random_after, self._tokens.device)
        return self._recording.passed(*self._outputs)


class _ReplayContext(Context):
    recording: _TrainingRecording
    number: int


class _Replay(Function):
    @staticmethod
    def forward(ctx: _ReplayContext, recording: _TrainingRecording, *parameters: Tensor) -> Tuple[Tensor, ...]:
        ctx.recording, ctx.number = recording, recording.passes
        return tuple(output.clone() for output in recording.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: _ReplayContext, *grads: Tensor) -> Tuple[Optional[Tensor], ...]:
        recording = ctx.recording
        if ctx.number != recording.passes:
            raise RuntimeError(
                "a segment was read between another's forward and backward pass, but a CUDA graph keeps the "
                "last activations only: leave out --cuda-graphs"
            )
        copy_all(recording.output_grads, grads)
        return (None, *recording.backward())


def warmed_up(warm_up: Callable[[], object], record: Callable[[], None]) -> int:
    """Record after warming up; return the bytes that the recording keeps, which PyTorch does not count as allocated.

    The callables are not stored: they hold the module, which holds the recording.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            warm_up()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = _unallocated()
    record()
    return max(0, _unallocated() - before)


def recorded_to(graph: torch.cuda.CUDAGraph, shared: Optional[torch.cuda.CUDAGraph] = None) -> ContextManager[None]:
    """Record to a graph, in the memory of a *shared* graph. Other threads, such as loaders of data, may use the GPU."""
    pool = None if shared is None else shared.pool()
    recorded: ContextManager[None] = torch.cuda.graph(graph, capture_error_mode="thread_local", pool=pool)
    return recorded


def _unallocated() -> int:
    """Return the bytes of the device that PyTorch holds without a tensor in them."""
    return torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def _outputs(passage: Passage) -> List[Tensor]:
    """Return the tensors that gradients come from."""
    return [passage.features, *passage.losses.values()]
