"""Gradients of a recorded backward pass, in buckets that a host can reduce over ranks while the pass still runs.

The pass writes a bucket as soon as its last gradient is complete, and marks that moment for other streams. Buckets lie
outside the graph's own memory, which the next forward pass overwrites.
"""

from contextlib import contextmanager
from functools import partial, reduce
from typing import Dict, Iterator, List, Mapping, Optional, Protocol, Sequence

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors

from .kernels.copies import copy_all


class Bucket:
    """Gradients that are reduced together, side by side in one tensor.

    Args:
        parameters: of one dtype, on one device.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = list(parameters)
        like = self.parameters[0]
        size = sum(p.numel() for p in self.parameters)
        self.flat = torch.zeros(size, dtype=like.dtype, device=like.device)
        self.views = views_of(self.flat, self.parameters)


def views_of(flat: Tensor, tensors: Sequence[Tensor]) -> List[Tensor]:
    """Return the consecutive views of a flat tensor that are shaped as *tensors* are."""
    return list(_unflatten_dense_tensors(flat, tensors))


def copies_of(gradients: Sequence[Tensor]) -> List[Tensor]:
    """Return copies of contiguous gradients, at least one, side by side. `torch.cat` takes a GPU much longer."""
    size = sum(g.numel() for g in gradients)
    dtype = reduce(torch.promote_types, (g.dtype for g in gradients))
    copies = views_of(torch.empty(size, dtype=dtype, device=gradients[0].device), gradients)
    copy_all(copies, gradients)
    return copies


class Reducer(Protocol):
    """Sums gradients over ranks, for a host that has several."""

    @property
    def buckets(self) -> Sequence[Bucket]:
        """The gradients that come from recorded segments alone, in the order in which they are reduced."""

    def begin(self) -> bool:
        """Return whether the buckets of the backward pass that is replayed next are reduced while it runs.

        If not, copies of its gradients are returned to autograd, as without buckets.
        """

    def reduce(self, bucket: Bucket, ready: Optional[torch.cuda.Event]) -> None:
        """Begin to reduce a bucket in place. This is called for each of the buckets, in their order.

        Args:
            ready: an event of the replay, once the bucket is complete; None if it is complete when the replay ends.
        """


@contextmanager
def written_to(
    buckets: Sequence[Bucket], leaves: Mapping[nn.Parameter, Tensor]
) -> Iterator[List[Optional[torch.cuda.Event]]]:
    """A context in which the backward pass that is being recorded writes its gradients to buckets.

    Args:
        leaves: the tensors that stand for the parameters in the pass.

    Yields:
        An event for each bucket, which happens in every replay as soon as the bucket is complete; None where torch has
        no such events.
    """
    writings = [_Writing(bucket, leaves) for bucket in buckets]
    try:
        yield [writing.ready for writing in writings]
    finally:
        for writing in writings:
            writing.end()


class _Writing:
    """A bucket whose gradients are being recorded."""

    def __init__(self, bucket: Bucket, leaves: Mapping[nn.Parameter, Tensor]):
        self.ready = _external_event()
        self._gradients: Dict[int, Tensor] = {}
        self._bucket = bucket
        self._awaited = [n for n, p in enumerate(bucket.parameters) if p in leaves]
        # A hook is called with the whole gradient of its leaf, when that is complete.
        self._handles = [leaves[bucket.parameters[n]].register_hook(partial(self._take, n)) for n in self._awaited]
        if not self._awaited:
            self._write()

    def _take(self, n: int, gradient: Tensor) -> None:
        self._gradients[n] = gradient
        if len(self._gradients) == len(self._awaited):
            self._write()

    def _write(self) -> None:
        views, gradients = self._bucket.views, self._gradients
        without = [view for n, view in enumerate(views) if n not in gradients]
        if without:  # a segment that was not replayed may have left a gradient there
            torch._foreach_zero_(without)
        # One launch copies all gradients that have their view's layout; a gradient cut from a padded one has another.
        alike = [n for n, gradient in gradients.items() if gradient.stride() == views[n].stride()]
        copy_all([views[n] for n in alike], [gradients.pop(n) for n in alike])
        for n in list(gradients):
            views[n].copy_(gradients.pop(n))
        if self.ready is not None:
            self.ready.record()

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()


def _external_event() -> Optional[torch.cuda.Event]:
    """Return an event that can be recorded in a graph and waited for outside of it; None before torch 2.8."""
    try:
        return torch.cuda.Event(external=True)
    except TypeError:
        return None
