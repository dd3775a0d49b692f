"""The biases of all layers in few operations, forward and backward; each layer would have some of its own.

Shapes: L layers, H heads, D size of a head, D' its padded size, U distances.
"""

from collections import defaultdict
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..attention import RelativeBias
from ..kernels import aligned
from ..kernels.padded import with_zeros
from .bias import LayerBias

_FIELDS = ("content", "position", "table")  # those with heads


def together(biases: Sequence[LayerBias], like: Tensor) -> List[LayerBias]:
    """Return the biases of a segment ``like [B, n, d]``, as wide as its padded heads.

    A tensor of several layers gets one gradient, the sum of theirs. Tensors of one layer each are padded together.
    """
    used: Dict[int, List[Tensor]] = defaultdict(list)
    layers = [{id(t): t for t in _tensors(bias.causal) + _tensors(bias.ahead)} for bias in biases]
    for tensors in layers:
        for key, tensor in tensors.items():
            used[key].append(tensor)
    pads = aligned.matters(like)
    alike: Dict[Tuple[torch.Size, torch.dtype], List[Tensor]] = defaultdict(list)
    given: Dict[int, Iterator[Tensor]] = {}
    for key, (tensor, *others) in used.items():
        if others:
            wide = with_zeros(tensor) if pads else tensor
            uses = 1 + len(others)
            summed = torch.is_grad_enabled() and wide.requires_grad
            given[key] = iter(wide.expand(uses, *wide.shape).unbind() if summed else [wide] * uses)
        elif pads and tensor.size(-1) % 8:
            alike[tensor.shape, tensor.dtype].append(tensor)
        else:
            given[key] = iter([tensor])
    for group in alike.values():
        for tensor, wide in zip(group, with_zeros(torch.stack(group)).unbind(), strict=True):
            given[id(tensor)] = iter([wide])

    # One tensor to the left and to the right stays one: attention may then take both sides in one call.
    of_layers = [{key: next(given[key]) for key in tensors} for tensors in layers]
    return [
        bias._replace(
            causal=_replaced(bias.causal, new), ahead=None if bias.ahead is None else _replaced(bias.ahead, new)
        )
        for bias, new in zip(biases, of_layers, strict=True)
    ]


def _replaced(bias: RelativeBias, new: Dict[int, Tensor]) -> RelativeBias:
    tensors = {name: getattr(bias, name) for name in _FIELDS}
    return bias._replace(**{name: new[id(t)] for name, t in tensors.items() if t is not None})


def _tensors(bias: Optional[RelativeBias]) -> List[Tensor]:
    fields = [] if bias is None else [getattr(bias, name) for name in _FIELDS]
    return [tensor for tensor in fields if tensor is not None]
