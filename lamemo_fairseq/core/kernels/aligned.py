"""Products whose widths break the 16-byte alignment that tensor cores are fast with.

Widths such as 410 and 2100 are padded with zeros for the product alone (`padded.py`); parameters keep their shapes.

Shapes: d numbers of a row before a product, e after it.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .module_tree import is_plain
from .padded import WideRows, narrowed, of_weight, widened, with_zeros
from .shared import Shared, product, shared_of


def matters(x: Tensor) -> bool:
    """Return whether alignment makes products of *x* faster: in half precision on a GPU."""
    return x.is_cuda and x.element_size() == 2 and not torch.is_autocast_enabled("cuda")


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None, shared: Optional[Shared] = None) -> Tensor:
    """Return ``x [.., d]``, which may be `WideRows`, times ``weight [e, d]`` as `F.linear`: ``[.., e]``.

    Args:
        shared: of *x* before it was widened, if a residual shares it.
    """
    return narrowed(wide_linear(x, weight, bias, shared), weight.size(0))


def wide_linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None, shared: Optional[Shared] = None) -> WideRows:
    """Return `linear` without the copy that cuts off padding: zeros may follow the e columns."""
    shared, width = shared or shared_of(x), weight.size(1)
    fits = x.size(-1) in (width, width + -width % 8)
    if not fits or not any(size % 8 for size in (x.size(-1), *weight.shape)) or not matters(x):
        return WideRows(_product(x, weight, bias, shared))  # `F.linear` reports shapes that do not fit
    wide = of_weight(weight, "aligned", lambda: with_zeros(weight, 2))
    bias = None if bias is None else with_zeros(bias)
    return WideRows(_product(widened(x), wide, bias, shared))


def _product(x: Tensor, weight: Tensor, bias: Optional[Tensor], shared: Optional[Shared]) -> Tensor:
    return F.linear(x, weight, bias) if shared is None or bias is not None else product(x, weight, shared)


def through(layer: nn.Module, x: Tensor, width: int) -> WideRows:
    """Pass ``x [.., d]``, which may be `WideRows`, through a layer that takes d = *width*: as `wide_linear`.

    Any other layer, such as a low-rank adapter, and a layer with hooks are called.
    """
    if is_plain(layer, nn.Linear):
        return wide_linear(x, layer.weight, layer.bias)
    return WideRows(layer(narrowed(x, width)))


def mapped(layer: nn.Linear, x: Tensor) -> Tensor:
    """Pass ``x [.., d]`` through a linear layer as `through` does, without padding: ``[.., e]``."""
    return narrowed(through(layer, x, layer.in_features), layer.out_features)
