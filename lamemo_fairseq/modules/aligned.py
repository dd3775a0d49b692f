"""Products whose widths break the 16-byte alignment that tensor cores are fast with.

Widths such as 410 and 2100 are padded with zeros for the product alone; parameters keep their shapes.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor


def misaligned(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of ``x [.., d]`` and ``weight [e, d]`` is worth padding: in half precision on a GPU."""
    if not x.is_cuda or x.element_size() != 2 or torch.is_autocast_enabled("cuda"):
        return False
    return any(size % 8 for size in (x.size(-1), *weight.shape))


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None, keep_padding: bool = False) -> Tensor:
    """``x [.., d]`` times ``weight [e, d]`` as `F.linear`: ``[.., e]``.

    x may already be wider than d, by zeros or by anything finite. With *keep_padding* the result may be wider than
    e, by zeros, which saves a copy where another product takes it.
    """
    if not misaligned(x, weight):
        return F.linear(x, weight, bias)
    product = F.linear(padded(x), padded(weight, 2), None if bias is None else padded(bias))
    return product if keep_padding else product[..., : weight.size(0)]


def padded(t: Tensor, dims: int = 1) -> Tensor:
    """Zeros behind the last *dims* dimensions, up to multiples of 8."""
    amounts = [amount for size in reversed(t.shape[-dims:]) for amount in (0, -size % 8)]
    return F.pad(t, amounts) if any(amounts) else t
