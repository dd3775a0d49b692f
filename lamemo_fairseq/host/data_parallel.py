"""Several ranks with ``--cuda-graphs``: gradients are reduced while a recorded backward pass runs.

PyTorch's data parallelism reduces a gradient when autograd hands it over, and a graph hands all of them over when it
has run. Here the graph fills buckets (`core/gradients.py`), each of which is reduced as soon as it is complete.
"""

from typing import Any, List, Optional, Sequence

import torch
import torch.distributed as dist
from fairseq.distributed import DistributedTimeoutWrapper, LegacyDistributedDataParallel, ModuleProxyWrapper
from torch import Tensor, nn

from ..core.gradients import Bucket, views_of

BACKENDS = ("pytorch_ddp", "c10d", "legacy_ddp", "no_c10d")


class GradientReducer:
    """Sums gradients over ranks: every bucket once an update, in the same order on every rank.

    The order depends on the parameters alone. A rank that replays a graph reduces its buckets while the backward pass
    runs. Any other rank reduces them after its backward pass. So no rank needs to know whether another rank has a
    graph, a ragged segment or a dummy batch, or has run out of memory.

    Args:
        parameters: all of the model, in the same order on every rank.
        outside: the parameters among them that also get gradients outside recorded segments: the output layer's.
        group: the process group.
        bucket_bytes: size of a bucket; a larger parameter has a bucket by itself.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], outside: Sequence[nn.Parameter], group: Any, bucket_bytes: int
    ):
        self._parameters = list(parameters)
        self._outside = {id(p) for p in outside}
        self._group = group
        self._ranks = dist.get_world_size(group)
        self._bucket_bytes = bucket_bytes
        self._stream: Optional[torch.cuda.Stream] = None
        self._lay_out()
        self._single = False  # whether the update has a single batch
        self._replayed = False  # whether a replay has filled the buckets in this update
        self._begun: List[Any] = []  # reductions of the first groups
        self._sums: List[Sequence[Tensor]] = []  # sums of these groups, shaped as the parameters are

    def _lay_out(self) -> None:
        """Form buckets of the parameters that are trained now, the last layers' first."""
        self._trained = [p.requires_grad for p in self._parameters]
        trained = [p for p in reversed(self._parameters) if p.requires_grad]
        inside = self._grouped([p for p in trained if id(p) not in self._outside])
        self.buckets = [Bucket(parameters) for parameters in inside]
        self._groups = [*inside, *self._grouped([p for p in trained if id(p) in self._outside])]

    def _grouped(self, parameters: Sequence[nn.Parameter]) -> List[List[nn.Parameter]]:
        groups: List[List[nn.Parameter]] = []
        size = 0
        for p in parameters:
            bytes_of_p = p.numel() * p.element_size()
            last = groups[-1][-1] if groups else None
            if (
                last is None
                or (p.dtype, p.device) != (last.dtype, last.device)
                or size + bytes_of_p > self._bucket_bytes
            ):
                groups.append([])
                size = 0
            groups[-1].append(p)
            size += bytes_of_p
        return groups

    def begin_update(self, batches: int) -> None:
        """Begin an update with this number of batches a rank."""
        if self._trained != [p.requires_grad for p in self._parameters]:
            self._lay_out()
        self._single, self._replayed = batches == 1, False
        self._begun, self._sums = [], []

    def begin(self) -> bool:
        """Return whether the buckets of the backward pass that is replayed next are reduced while it runs.

        They are not if the update has several batches, whose gradients are added up first.

        Raises:
            RuntimeError: the batch has had a backward pass already.
        """
        if self._replayed:  # the buckets are still being reduced
            raise RuntimeError(
                "a second backward pass in an update of one batch, after the gradients of the first were reduced over "
                "ranks: leave out --cuda-graphs"
            )
        self._replayed = self._single
        return self._single

    def reduce(self, bucket: Bucket, ready: Optional[torch.cuda.Event]) -> None:
        """Begin to reduce a bucket, on a stream that waits for it and not for the replay."""
        if not bucket.flat.is_cuda:
            return self._reduce(bucket.flat, bucket.views)
        self._stream = self._stream or torch.cuda.Stream(bucket.flat.device)
        if ready is None:
            self._stream.wait_stream(torch.cuda.current_stream())
        else:
            self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream):
            self._reduce(bucket.flat, bucket.views)

    def _reduce(self, flat: Tensor, views: Sequence[Tensor]) -> None:
        flat.div_(self._ranks)  # before the sum, as fairseq does it: half precision overflows
        self._sums.append(views)
        self._begun.append(dist.all_reduce(flat, group=self._group, async_op=True))

    def begin_rest(self) -> None:
        """Begin to reduce all buckets that have not been reduced yet, after the last backward pass of an update."""
        for group in self._groups[len(self._begun) :]:
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
            flat = gradients[0].flatten() if len(group) == 1 else torch.cat([g.flatten() for g in gradients])
            self._reduce(flat, views_of(flat, group))

    def finish(self) -> None:
        """Give every parameter its gradient of all ranks. The device waits for the reductions, the host does not.

        Raises:
            RuntimeError: a parameter got a gradient from a replayed pass, and another one from elsewhere.
        """
        self.begin_rest()
        for work in self._begun:
            work.wait()
        if self._replayed and any(p.grad is not None for bucket in self.buckets for p in bucket.parameters):
            raise RuntimeError(
                "a parameter of the layers got another gradient, such as from a loss of its own, after its "
                "first was reduced over ranks: leave out --cuda-graphs"
            )
        for group, sums in zip(self._groups, self._sums, strict=True):
            for p, gradient in zip(group, sums, strict=True):
                p.grad = gradient
        self._single, self._replayed, self._begun, self._sums = False, False, [], []


class GraphDataParallel(LegacyDistributedDataParallel):
    """fairseq's ``legacy_ddp``, except that a reducer chooses when gradients are reduced."""

    def __init__(self, module: nn.Module, reducer: GradientReducer, group: Any):
        super().__init__(module, group)
        self.reducer = reducer

    def all_reduce_grads(self) -> None:
        """Reduce the gradients of an update; fairseq calls this after its last backward pass."""
        if not self.accumulate_grads:
            self.reducer.finish()


def reducer_for(options: Any, model: nn.Module, group: Any) -> Optional[GradientReducer]:
    """Return the reducer for a model that records graphs; None if fairseq is to reduce its gradients.

    Args:
        options: the section ``distributed_training`` of the configuration.
        group: the process group.
    """
    decoder: Any = getattr(model, "decoder", None)
    graphs = getattr(decoder, "graphs", None)
    if graphs is None or options.ddp_backend not in BACKENDS or options.ddp_comm_hook != "none":
        return None
    outside = list(decoder.loss_layer.parameters())
    graphs.reducer = GradientReducer(list(model.parameters()), outside, group, options.bucket_cap_mb * 2**20)
    return graphs.reducer


def wrapped(options: Any, model: nn.Module, reducer: GradientReducer, group: Any) -> nn.Module:
    """Return the model as `DistributedFairseqModel` would wrap it, with weights and buffers of the first rank."""
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, src=dist.get_global_rank(group, 0), group=group)
    proxy: nn.Module = ModuleProxyWrapper(GraphDataParallel(model, reducer, group))
    timeout = options.heartbeat_timeout
    return DistributedTimeoutWrapper(proxy, timeout=timeout) if timeout > 0 else proxy
