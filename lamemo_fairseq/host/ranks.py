"""Bring values of one rank to the others."""

import os
from typing import Any, Callable, List

import torch
import torch.distributed as dist
from fairseq import utils
from fairseq.distributed import utils as distributed_utils
from torch import Tensor

from .stand_in import stand_in


def gather_streams(tensors: List[Tensor], ranks: int) -> List[Tensor]:
    """Gather the streams of every rank's *tensors*, in order of rank, on the host.

    Tensors are gathered one at a time, so that the first rank's device holds copies of only one. Every rank has
    to call it, with tensors of the same shapes and dtypes.

    Returns:
        A tensor ``[ranks * B, ...]`` for each tensor ``[B, ...]``; on other ranks than the first, their own tensors.

    Raises:
        RuntimeError: the shapes differ.
    """
    if ranks == 1:
        return [t.cpu() for t in tensors]
    mine = [(tuple(t.shape), str(t.dtype)) for t in tensors]
    shapes: List[Any] = [None] * ranks
    dist.all_gather_object(shapes, mine)
    if any(other != mine for other in shapes):
        raise RuntimeError(f"the ranks hold memories of different shapes: {shapes}")
    return [_gather(t, ranks) for t in tensors]


def _gather(tensor: Tensor, ranks: int) -> Tensor:
    # As bytes, since not every backend knows every dtype.
    raw = tensor.to(_device()).contiguous().view(torch.uint8)
    first = dist.get_rank() == 0
    gathered = [torch.empty_like(raw) for _ in range(ranks)] if first else None
    if raw.numel() > 0:
        dist.gather(raw, gathered)
    return torch.cat(gathered).cpu().view(tensor.dtype) if gathered is not None else tensor


def group_between_hosts() -> Any:
    """Return a group of all ranks that exchanges tensors on their hosts, whatever the devices do.

    Raises:
        RuntimeError: the hosts do not reach each other.
    """
    try:
        return dist.new_group(backend="gloo")
    except RuntimeError as error:
        raise RuntimeError(
            f"ranks exchange losses and norms between their hosts by gloo, which failed ({error}): set "
            "GLOO_SOCKET_IFNAME to the network interface that joins the hosts"
        ) from error


def sum_over_ranks(*values: float) -> List[float]:
    """Return sums of numbers over all ranks."""
    total = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.all_reduce(total)
    return total.tolist()


def gather_objects(value: Any) -> List[Any]:
    """Return the values of all ranks, in order, on the first rank, and nothing on others. Every rank has to call it."""
    if not several_ranks():
        return [value]
    gathered: List[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered if dist.get_rank() == 0 else []


def several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first_rank() -> bool:
    return not several_ranks() or dist.get_rank() == 0


def launched_ranks() -> int:
    """Return the number of processes that torchrun has started for this job, 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def prepare_ranks() -> None:
    """Let ranks of this package's task gather objects of any size, and on CPUs too.

    fairseq-validate gathers one record a batch. fairseq's function needs a GPU, and fails where the records outgrow
    ``--all-gather-list-size``, as those of a long split do.
    """
    if not hasattr(distributed_utils.all_gather_list, "__wrapped__"):  # not yet
        stand_in(distributed_utils, "all_gather_list")(_all_gather_list)


def _all_gather_list(
    original: Callable[..., List[Any]], data: Any, group: Any = None, max_size: int = 16384
) -> List[Any]:
    gathered: List[Any] = [None] * distributed_utils.get_world_size(group or distributed_utils.get_global_group())
    dist.all_gather_object(gathered, utils.move_to_cpu(data), group=group)
    return gathered
