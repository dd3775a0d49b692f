"""Training segments as CUDA graphs: one launch for the layers' forward pass, and one for the backward.

The host needs longer to launch the kernels of a small segment than the GPU needs to run them; a graph records them.

Shapes: B streams, N tokens of a segment, d model width.
"""

import logging
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .copies import copy_all
from .parameters import parameters_of

logger = logging.getLogger(__name__)

# A memory's `Passage` comes of tokens and a state: features [B, N, d], the state after the segment, and losses.
Step = Callable[[Tensor, Any], Any]
WARM_UP = 3  # passes before recording, in which kernels are compiled and workspaces allocated


class SegmentGraphs:
    """Runs a step of a decoder, from a graph where it can.

    A graph is recorded when two training segments in a row have the same shapes, which is so once the memory is full.
    Anything else runs as it is: evaluation, ragged segments, autocast. Only a recording's last forward pass can be
    followed by a backward pass.
    """

    def __init__(self) -> None:
        self._last: Any = None
        self._recorded: Any = None
        self._recording: Optional[_Recording] = None

    def __reduce__(self) -> Tuple[Any, ...]:
        return (SegmentGraphs, ())  # a copied or stored model records anew

    def __call__(self, step: Step, module: nn.Module, tokens: Tensor, state: Any) -> Any:
        """``step(tokens, state)``."""
        usable = module.training and torch.is_grad_enabled() and not torch.is_autocast_enabled(tokens.device.type)
        if state is None or not usable or not tokens.is_cuda:
            return step(tokens, state)
        parameters = _trained(module)
        signature = _signature(parameters, tokens, state)
        if signature == self._recorded:
            assert self._recording is not None
            return self._recording(tokens, state)
        if signature != self._last:
            self._last = signature
            return step(tokens, state)
        self._recording = None  # frees the old one's memory first
        with torch.random.fork_rng([tokens.device]):  # a resumed run records at another update, and draws the same
            self._recording = _Recording(step, module, parameters, tokens, state)
        self._recorded = signature
        logger.info("recorded a CUDA graph for segments of %s tokens", " x ".join(map(str, tokens.shape)))
        return self._recording(tokens, state)

    def begin(self, module: nn.Module, tokens: Tensor, state: Any, seed: int) -> None:
        """Run the forward pass of a recorded segment before it is asked for, with the random numbers of *seed*.

        The next call takes it over if it is for these very tensors, the device's generator begins at *seed*, and no
        parameter has changed; otherwise it was in vain. The generator is left as it was.
        """
        if self._recording is not None and module.training:
            parameters = _trained(module)
            if _signature(parameters, tokens, state) == self._recorded:
                self._recording.begin(tokens, state, seed)


def _trained(module: nn.Module) -> List[nn.Parameter]:
    return [p for p in parameters_of(module) if p.requires_grad]


def _signature(parameters: Sequence[nn.Parameter], tokens: Tensor, state: Any) -> Tuple[Any, ...]:
    """What a recording depends on. A parameter that moved would be read at its old place."""
    return tokens.shape, [t.shape for t in state.tensors()], [p.data_ptr() for p in parameters]


class _Begun(NamedTuple):
    """A forward pass that was begun before it was asked for."""

    tokens: Tensor
    state: Any
    versions: List[int]  # of the parameters: how often they have been changed in place
    random_before: Tensor  # state of the device's generator
    random_after: Tensor


class _Recording:
    def __init__(self, step: Step, module: nn.Module, parameters: Sequence[nn.Parameter], tokens: Tensor, state: Any):
        self.tokens = tokens.clone()
        self.state = state.map(lambda t: t.to(tokens.device, copy=True))
        self.passes = 0
        self.begun: Optional[_Begun] = None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                leaves, passage = run_on_aliases(step, module, parameters, self.tokens, self.state)
                outputs = _outputs(passage)
                found = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs], allow_unused=True)
        torch.cuda.current_stream().wait_stream(stream)
        # The output layer's own parameters take no part.
        used = [n for n, g in enumerate(found) if g is not None]
        self.parameters = [parameters[n] for n in used]
        del passage, outputs, found, leaves
        torch.cuda.synchronize()

        # Other threads may use the GPU meanwhile, those that load data for one.
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward_graph, capture_error_mode="thread_local"):
            leaves, passage = run_on_aliases(step, module, parameters, self.tokens, self.state)
        outputs = _outputs(passage)
        self.output_grads = [torch.empty_like(output) for output in outputs]
        with torch.cuda.graph(self.backward_graph, pool=self.forward_graph.pool(), capture_error_mode="thread_local"):
            grads = torch.autograd.grad(outputs, [leaves[n] for n in used], self.output_grads)
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

    def _run(self, tokens: Tensor, state: Any) -> None:
        with torch.no_grad():
            self.tokens.copy_(tokens)
            copy_all(self.state.tensors(), state.tensors())
        self.forward_graph.replay()
        self.passes += 1


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: _Recording, *parameters: Tensor) -> Tuple[Any, ...]:
        ctx.recording, ctx.number = recording, recording.passes
        # Copies, as the next replay writes over what this one made.
        after = recording.passage.state.map(torch.empty_like)
        copy_all(after.tensors(), recording.passage.state.tensors())
        return (after, *(output.clone() for output in recording.outputs))

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
        # Copies, as above.
        parts = torch.cat(recording.grads).split([g.numel() for g in recording.grads])
        return (None, *(g.view_as(p) for g, p in zip(parts, recording.parameters, strict=True)))


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
