"""A layer's step for one new token a row, by the fastest means there are."""

from typing import Any, Callable

import torch
from torch import Tensor

from ..attention import RelativeBias
from ..attention.cached import Columns
from ..memory.incremental import Record
from ..models.incremental import DecodingState, layer_step


def fastest_step(state: DecodingState) -> Callable[..., Tensor]:
    """The kernel's where it is installed and does all that positions and memory want, else the plain one.

    ``--attention-backend eager`` asks for the plain one, and the kernel's float32 would be too coarse for float64.
    """
    bias, config, record = state.biases[0], state.decoder.layers[0].self_attn.config, state.cache.record(0)
    sinusoids = bias.table is not None and bias.position is not None and bias.score is None
    exact = config.backend == "eager" or state.cache.keys[0].dtype == torch.float64
    more = record.inputs is not None or record.context is not None
    if exact or more or not sinusoids or config.span is not None:
        return layer_step
    try:
        from ..attention import cached_kernel  # noqa: F401  (whether Triton is there)
    except ImportError:
        return layer_step
    return kernel_step


def kernel_step(
    layer: Any,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    columns: Columns,
    bias: RelativeBias,
    record: Record,
) -> Tensor:
    """As `layer_step`, for one new token a row."""
    from ..attention.cached_kernel import cached_attention

    attn = layer.self_attn

    def attend(normed: Tensor) -> tuple[Tensor, None]:
        qkv = attn.qkv_proj(normed)[:, 0]
        query, oldest, end = columns.query[:, 0], columns.oldest, columns.end
        kept = None if record.outputs is None else record
        output = cached_attention(qkv, keys, values, bias, query, oldest, end, kept)
        return attn.out_proj(output.unsqueeze(1)), None

    return layer.around(x, attend)[0]
