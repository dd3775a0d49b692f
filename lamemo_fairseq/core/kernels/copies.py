"""Many small copies in few launches, and copies that the host does not wait for."""

from typing import Callable, Dict, List, Sequence, Tuple

import torch
from torch import Tensor

LARGE = 1 << 24  # bytes; a launch of its own then costs nothing, and copies faster than one for many tensors


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, of the same shape and any dtype.

    One launch serves all pairs of like dtypes, but for large tensors.
    """
    groups: Dict[Tuple[torch.dtype, torch.dtype], Tuple[List[Tensor], List[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        if target.numel() * target.element_size() >= LARGE:
            target.copy_(source)
            continue
        like = groups.setdefault((target.dtype, source.dtype), ([], []))
        like[0].append(target)
        like[1].append(source)
    for pair in groups.values():
        torch._foreach_copy_(*pair)


def copy_to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to the host, and return a function that waits for the copy and returns it.

    The wait ends when the work submitted to the device before the copy is done.
    """
    if not tensor.is_cuda:
        return lambda: tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> Tensor:
        copied.synchronize()
        return copy

    return wait
