"""Many small copies in few launches."""

from typing import Dict, List, Sequence, Tuple

import torch
from torch import Tensor


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, of the same shape and any dtype; one launch serves all pairs of like dtypes."""
    groups: Dict[Tuple[torch.dtype, torch.dtype], Tuple[List[Tensor], List[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        like = groups.setdefault((target.dtype, source.dtype), ([], []))
        like[0].append(target)
        like[1].append(source)
    for pair in groups.values():
        torch._foreach_copy_(*pair)
