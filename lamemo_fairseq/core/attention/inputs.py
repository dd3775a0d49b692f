"""The check of what attention gets: kernels would read beyond tensors of other shapes, or numbers of other heads.

Shapes: B streams, H heads, Q queries, K keys, D size of a head, U distances.
"""

from typing import Literal, Mapping, NoReturn, Optional, Sequence

import torch
from torch import Tensor

from .types import RelativeBias

Give = Literal["pass", "return"]


def check_causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: RelativeBias,
    span: Optional[int] = None,
    dropout: float = 0.0,
    scale: Optional[float] = None,
    need_normalizer: bool = True,
    nearest: int = 0,
    added: Optional[Tensor] = None,
) -> None:
    """Refuse arguments of `causal_attention` that do not fit together.

    Raises:
        ValueError: the message names the argument and what to pass.
    """
    check_heads(q, k, v)
    check_bias("bias", bias, q.size(1), q.size(3), k.size(2))
    check_dtypes(q, k, v, {"bias": bias})
    check_span(span, dropout)
    if nearest < 0:
        raise ValueError(f"nearest is {nearest}: pass 0, or the distance of the nearest key that a query sees")
    if k.size(2) < q.size(2) + nearest:
        raise ValueError(
            f"there are {q.size(2)} queries and {k.size(2)} keys: pass at least {q.size(2) + nearest} keys, those of "
            f"the memory before those of the queries' own positions"
        )


def check_heads(q: Tensor, k: Tensor, v: Tensor, keys: Optional[int] = None) -> None:
    """Refuse keys and values of other streams, heads or sizes than the queries ``[B, H, Q, D]``.

    Args:
        keys: K; None for any number.

    Raises:
        ValueError: the message names the tensor and the shape to pass.
    """
    if q.dim() != 4:
        _refuse("q", q, "[B, H, Q, D]")
    batch, heads, _, size = q.shape
    if keys is None and k.dim() == 4:
        keys = k.size(2)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != (batch, heads, keys, size):
            _refuse(name, tensor, "[B, H, K, D]", [batch, heads, "K" if keys is None else keys, size])


def check_bias(
    name: str, bias: Optional[RelativeBias], heads: int, size: int, distances: int, give: Give = "pass"
) -> None:
    """Refuse a bias of other shapes than those for *heads* of a *size* and so many *distances*.

    Args:
        give: the remedy's verb.

    Raises:
        ValueError: it is no bias, or a field has another shape; the message names the field and the shape to give.
    """
    if not isinstance(bias, RelativeBias):
        raise ValueError(f"{name} is of type {type(bias).__name__}: {give} a RelativeBias, RelativeBias() for none")
    for field, tensor, letters, shape in (
        ("content", bias.content, "[H, D]", (heads, size)),
        ("position", bias.position, "[H, D]", (heads, size)),
        ("table", bias.table, "[H, U, D]", (heads, distances, size)),
        ("score", bias.score, "[H, U]", (heads, distances)),
    ):
        if tensor is not None and tensor.shape != shape:
            _refuse(f"{name}.{field}", tensor, letters, shape, give)


def check_dtypes(q: Tensor, k: Tensor, v: Tensor, biases: Mapping[str, RelativeBias]) -> None:
    """Refuse tensors of several dtypes, which some backends would compute in the widest; autocast converts them.

    Args:
        biases: by name.

    Raises:
        ValueError: the message names both dtypes.
    """
    parts = [k, v, *(t for bias in biases.values() for t in bias if t is not None)]
    if all(t.dtype == q.dtype for t in parts) or torch.is_autocast_enabled(q.device.type):
        return
    named = {"k": k, "v": v}
    named.update((f"{name}.{field}", t) for name, bias in biases.items() for field, t in bias._asdict().items())
    name, other = next((name, t.dtype) for name, t in named.items() if t is not None and t.dtype != q.dtype)
    raise ValueError(f"{name} is {other}, and q is {q.dtype}: pass all in one dtype, as by t.to(q)")


def check_span(span: Optional[int], dropout: float) -> None:
    """Refuse a span without keys, and a probability that is none.

    Raises:
        ValueError: the message names the argument.
    """
    if span is not None and span < 1:
        raise ValueError(f"span is {span}: pass at least 1, or None for all keys")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}: pass at least 0 and less than 1")


def check_shape(name: str, tensor: Tensor, letters: str, shape: Sequence[int], give: Give = "pass") -> None:
    """Refuse a tensor of another shape.

    Raises:
        ValueError: the message names the tensor and the shape to *give*, the remedy's verb.
    """
    if tensor.shape != tuple(shape):
        _refuse(name, tensor, letters, shape, give)


def _refuse(
    name: str, tensor: Tensor, letters: str, shape: Optional[Sequence[object]] = None, give: Give = "pass"
) -> NoReturn:
    here = "" if shape is None else f", which is [{', '.join(map(str, shape))}] here"
    raise ValueError(f"{name} is {list(tensor.shape)}: {give} {letters}{here}")
