"""Heads followed by zeros, which leave scores and read-outs as they are.

Shapes: H heads, D size of a head, D' its padded size.
"""

import torch.nn.functional as F
from torch import Tensor

from .types import RelativeBias


def as_wide(q: Tensor, t: Tensor) -> Tensor:
    """Pad ``t [.., D]`` with as many zeros as heads ``q [.., D or D']`` have."""
    return t if t.size(-1) == q.size(-1) else F.pad(t, (0, q.size(-1) - t.size(-1)))


def bias_for(q: Tensor, bias: RelativeBias) -> RelativeBias:
    """Return the bias, as wide as the heads that it is for."""
    tensors = {"content": bias.content, "position": bias.position, "table": bias.table}
    return bias._replace(**{name: as_wide(q, tensor) for name, tensor in tensors.items() if tensor is not None})
