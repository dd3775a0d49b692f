"""Segments as CUDA graphs: one launch for the layers' forward pass, and in training one for the backward.

The host needs longer to launch the kernels of a small segment than the GPU needs to run them; a graph records them.

Shapes: B streams, N tokens of a segment, d model width.
"""

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, ContextManager, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .kernels.copies import copy_all
from .kernels.parts import Parts, parts_of

logger = logging.getLogger(__name__)

# A memory's `Passage` comes of tokens and a state: features [B, N, d], the state after the segment, and losses.
Step = Callable[[Tensor, Any], Any]
WARM_UP = 3  # passes before recording, in which kernels are compiled and workspaces allocated


@dataclass
class _Held:
    """What is known of the segments of training, or of those of evaluation."""

    last: Any = None  # signature of the last segment
    recorded: "Tuple[Any, Optional[_Recording]]" = (None, None)  # a signature, and the graph that goes with it


class SegmentGraphs:
    """Runs a step of a decoder, from a graph where it can.

    A graph is recorded when two segments in a row have the same shapes, which is so once the memory is full: one for
    training, one for evaluation. Anything else runs as it is: ragged segments, autocast, modules with hooks, which a
    graph would not call. Only a recording's last forward pass can be followed by a backward pass.
    """

    def __init__(self) -> None:
        self._held = {True: _Held(), False: _Held()}  # by whether gradients are computed

    def __reduce__(self) -> Tuple[Any, ...]:
        return (SegmentGraphs, ())  # a copied or stored model records anew

    def recording(self, training: bool = True) -> "Optional[_Recording]":
        """The graph of segments of training, or of evaluation; None if there is none yet."""
        return self._held[training].recorded[1]

    def __call__(self, step: Step, module: nn.Module, tokens: Tensor, state: Any) -> Any:
        """``step(tokens, state)``."""
        learns = torch.is_grad_enabled()
        if state is None or module.training != learns or not _recordable(tokens):
            return step(tokens, state)
        parts = parts_of(module)
        if parts.hooked:
            return step(tokens, state)
        held, signature = self._held[learns], _signature(parts, tokens, state)
        before, held.last = held.last, signature
        recorded, recording = held.recorded
        if recording is not None and signature == recorded:
            return recording(tokens, state)
        if signature != before:
            return step(tokens, state)
        recording, held.recorded = None, (None, None)  # frees the old one's memory first
        with torch.random.fork_rng([tokens.device]):  # a resumed run records at another update, and draws the same
            if learns:
                trained = [p for p in parts.parameters if p.requires_grad]
                recording = _TrainingRecording(step, module, trained, tokens, state)
            else:
                recording = _Recording(step, tokens, state)
        held.recorded = signature, recording
        logger.info(
            "recorded a CUDA graph for %s segments of %s tokens, which keeps %.2f GiB to itself",
            "training" if learns else "evaluation",
            " x ".join(map(str, tokens.shape)),
            recording.memory / 2**30,
        )
        return recording(tokens, state)

    def begin(self, module: nn.Module, tokens: Tensor, state: Any, seed: int) -> None:
        """Run the forward pass of a recorded segment before it is asked for, with the random numbers of *seed*.

        The next call takes it over if it is for these very tensors, the device's generator begins at *seed*, and no
        parameter has changed, nor a module been replaced; otherwise it was in vain. The generator is left as it was.
        """
        recorded, recording = self._held[True].recorded
        if not isinstance(recording, _TrainingRecording) or not module.training:
            return
        parts = parts_of(module)
        if not parts.hooked and _signature(parts, tokens, state) == recorded:
            recording.begin(tokens, state, seed)


def _recordable(tokens: Tensor) -> bool:
    autocast = torch.is_autocast_enabled(tokens.device.type)
    return tokens.is_cuda and not autocast and not torch.is_inference_mode_enabled()


def _signature(parts: Parts, tokens: Tensor, state: Any) -> Tuple[Any, ...]:
    """What a recording depends on."""
    return tokens.shape, [t.shape for t in state.tensors()], parts.signature()


class _Begun(NamedTuple):
    """A forward pass that was begun before it was asked for."""

    tokens: Tensor
    state: Any
    versions: List[int]  # of the parameters: how often they have been changed in place
    random_before: Tensor  # state of the device's generator
    random_after: Tensor


class _Recording:
    """A segment's forward pass in evaluation."""

    def __init__(self, run: Callable[..., Any], tokens: Tensor, state: Any):
        self.tokens = tokens.clone()
        self.state = state.map(lambda t: t.to(tokens.device, copy=True))
        self.passes = 0
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._warm_up(run)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = _unallocated()
        self.forward_graph = torch.cuda.CUDAGraph()
        self._record(run)
        self.memory = max(0, _unallocated() - before)  # bytes that PyTorch does not count as allocated

    def _warm_up(self, run: Callable[..., Any]) -> None:
        run(self.tokens, self.state)

    def _record(self, run: Callable[..., Any]) -> None:
        with _recorded_to(self.forward_graph):
            self.passage = run(self.tokens, self.state)

    def __call__(self, tokens: Tensor, state: Any) -> Any:
        self._run(tokens, state)
        return self.passage._replace(features=self.passage.features.clone(), state=self._after())

    def _run(self, tokens: Tensor, state: Any) -> None:
        with torch.no_grad():
            self.tokens.copy_(tokens)
            copy_all(self.state.tensors(), state.tensors())
        self.forward_graph.replay()
        self.passes += 1

    def _after(self) -> Any:
        """The state after the segment: copies, as the next replay writes over what this one made."""
        after = self.passage.state.map(torch.empty_like)
        copy_all(after.tensors(), self.passage.state.tensors())
        return after


class _TrainingRecording(_Recording):
    """A segment's forward pass and its backward pass."""

    def __init__(self, step: Step, module: nn.Module, parameters: Sequence[nn.Parameter], tokens: Tensor, state: Any):
        self.begun: Optional[_Begun] = None
        self.parameters = list(parameters)
        super().__init__(partial(run_on_aliases, step, module), tokens, state)

    def _warm_up(self, run: Callable[..., Any]) -> None:
        leaves, passage = run(self.parameters, self.tokens, self.state)
        outputs = _outputs(passage)
        found = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs], allow_unused=True)
        # The output layer's own parameters take no part.
        self.parameters = [p for p, g in zip(self.parameters, found, strict=True) if g is not None]

    def _record(self, run: Callable[..., Any]) -> None:
        with _recorded_to(self.forward_graph):
            leaves, passage = run(self.parameters, self.tokens, self.state)
        outputs = _outputs(passage)
        self.output_grads = [torch.empty_like(output) for output in outputs]
        self.backward_graph = torch.cuda.CUDAGraph()
        with _recorded_to(self.backward_graph, pool=self.forward_graph.pool()):
            grads = torch.autograd.grad(outputs, leaves, self.output_grads)
            self.grads = [g.flatten() for g in grads]
        # Without the operations that made them, which the graph of the backward pass has.
        self.outputs = [output.detach() for output in outputs]
        self.passage = passage._replace(features=self.outputs[0], losses=dict.fromkeys(passage.losses))

    def __call__(self, tokens: Tensor, state: Any) -> Any:
        begun, self.begun = self.begun, None
        if begun is not None and self._is(begun, tokens, state):
            torch.cuda.set_rng_state(begun.random_after, tokens.device)
        else:
            self._run(tokens, state)
        # With the device at work; to tie every parameter to the result takes the host a while.
        after, features, *losses = _Replay.apply(self, *self.parameters)
        by_name = dict(zip(self.passage.losses, losses, strict=True))
        return self.passage._replace(features=features, state=after, losses=by_name)

    def begin(self, tokens: Tensor, state: Any, seed: int) -> None:
        device = tokens.device
        with torch.random.fork_rng([device]), torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
            before = torch.cuda.get_rng_state(device)
            self._run(tokens, state)
            after = torch.cuda.get_rng_state(device)
        self.begun = _Begun(tokens, state, self._versions(), before, after)

    def _is(self, begun: _Begun, tokens: Tensor, state: Any) -> bool:
        return (
            begun.tokens is tokens
            and begun.state is state
            and begun.versions == self._versions()
            and torch.equal(begun.random_before, torch.cuda.get_rng_state(tokens.device))
        )

    def _versions(self) -> List[int]:
        return [p._version for p in self.parameters]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: _TrainingRecording, *parameters: Tensor) -> Tuple[Any, ...]:
        ctx.recording, ctx.number = recording, recording.passes
        return (recording._after(), *(output.clone() for output in recording.outputs))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Any, *grads: Tensor) -> Tuple[Optional[Tensor], ...]:
        recording = ctx.recording
        if ctx.number != recording.passes:
            raise RuntimeError(
                "another segment was read between a segment's forward and backward pass, and a CUDA graph keeps the "
                "activations of the last one only: leave out --cuda-graphs"
            )
        copy_all(recording.output_grads, grads)
        recording.backward_graph.replay()
        # Copies, as in the forward pass.
        parts = torch.cat(recording.grads).split([g.numel() for g in recording.grads])
        return (None, *(g.view_as(p) for g, p in zip(parts, recording.parameters, strict=True)))


def _recorded_to(graph: torch.cuda.CUDAGraph, **pool: Any) -> ContextManager[Any]:
    """Other threads may use the GPU meanwhile, those that load data for one."""
    return torch.cuda.graph(graph, capture_error_mode="thread_local", **pool)


def _unallocated() -> int:
    """Bytes of the device that PyTorch holds without a tensor in them."""
    return torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def _outputs(passage: Any) -> List[Tensor]:
    """What gradients come from."""
    return [passage.features, *passage.losses.values()]


def run_on_aliases(
    step: Step, module: nn.Module, parameters: Sequence[nn.Parameter], tokens: Tensor, state: Any
) -> Tuple[List[Tensor], Any]:
    """``step(tokens, state)`` on other leaves over the parameters' memory, and these leaves.

    A parameter is tied to the stream of any graph of operations that is still alive, such as that of the last loss,
    and a recording must not touch another stream.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    leaves = [p.detach().requires_grad_() for p in parameters]
    replaced = {f"module.{names[id(p)]}": leaf for p, leaf in zip(parameters, leaves, strict=True)}
    return leaves, torch.func.functional_call(_Call(step, module), replaced, (tokens, state))


class _Call(nn.Module):
    """A method of a module as a module, which is what can be called on other parameters."""

    def __init__(self, method: Step, module: nn.Module):
        super().__init__()
        self.method, self.module = method, module

    def forward(self, tokens: Tensor, state: Any) -> Any:
        return self.method(tokens, state)
