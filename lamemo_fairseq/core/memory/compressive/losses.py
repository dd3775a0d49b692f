"""Losses that train the compression, by name (Rae et al. 2020, section 3.2.1 and algorithm 2).

Gradients reach the compression alone: all other inputs of a loss are constant.

Shapes: B streams, N current tokens, G compressed rows, r compression rate, H heads, D size of a head, d model width.
"""

from typing import ClassVar, Type

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers import DecoderLayer
from ...registry import Registry


class CompressionLoss(nn.Module):
    """Base of all losses; every layer has one of its own."""

    trains: ClassVar[bool] = True

    def __init__(self, rate: int, embed_dim: int):
        super().__init__()

    def forward(self, layer: DecoderLayer, rows: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """Return the loss of each stream, ``[B]``, in float32 or wider.

        Args:
            layer: the `DecoderLayer` that the rows go into.
            rows: ``[B, N, d]`` the current rows going into it, constant.
            old: ``[B, G r, d]`` rows that leave the memory, constant.
            new: ``[B, G, d]`` the compressed rows.
        """
        raise NotImplementedError


LOSSES: Registry[Type[CompressionLoss]] = Registry("--compression-loss")


@LOSSES.register("none")
class NoLoss(CompressionLoss):
    """For compressions without weights."""

    trains: ClassVar[bool] = False


@LOSSES.register("attention-reconstruction")
class AttentionReconstruction(CompressionLoss):
    """``mean (attn(h, old) - attn(h, new))^2`` over tokens and components (algorithm 2).

    ``attn`` is the layer's own attention by content alone, before its output projection: no positions and no biases.
    The paper has the norm of the whole difference; the mean square does not grow with the sizes.
    """

    def forward(self, layer: DecoderLayer, rows: Tensor, old: Tensor, new: Tensor) -> Tensor:
        # Other tensors stand in for the weights. Detaching the weights themselves would freeze them for good.
        constant = {f"layer.{name}": p.detach() for name, p in layer.named_parameters()}
        seen, approximated = torch.func.functional_call(_ContentAttention(layer), constant, (rows, old, new))
        return _square_distance(seen, approximated)


@LOSSES.register("auto-encoding")
class AutoEncoding(CompressionLoss):
    """``mean (old - decoded(new))^2`` over rows and components, decoded by a transposed convolution of stride r."""

    def __init__(self, rate: int, embed_dim: int):
        super().__init__(rate, embed_dim)
        self.decoder = nn.ConvTranspose1d(embed_dim, embed_dim, rate, stride=rate)

    def forward(self, layer: DecoderLayer, rows: Tensor, old: Tensor, new: Tensor) -> Tensor:
        return _square_distance(old, self.decoder(new.transpose(1, 2)).transpose(1, 2))


class _ContentAttention(nn.Module):
    """A layer's attention to old and to compressed rows: read-outs ``[B, H, N, D]`` of both."""

    def __init__(self, layer: DecoderLayer):
        super().__init__()
        self.layer = layer

    def forward(self, rows: Tensor, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():  # otherwise the backward pass would go through the attention for nothing
            q, k, v = self._project(torch.cat([old, rows], dim=1), rows.size(1))
            seen = self._attend(q, k[:, :, : old.size(1)], v[:, :, : old.size(1)])
        _, k, v = self._project(new.to(rows), 0)
        return seen, self._attend(q, k, v)

    def _project(self, rows: Tensor, queries: int) -> tuple[Tensor, Tensor, Tensor]:
        # Heads of a size that PyTorch's attention would have to pad, and copy, come padded.
        q, k, v = self.layer.self_attn.project(self.layer.attention_input(rows), queries, keep_padding=True)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attention = self.layer.self_attn
        return F.scaled_dot_product_attention(q, k, v, scale=attention.scale)[..., : attention.config.head_dim]


def _square_distance(one: Tensor, other: Tensor) -> Tensor:
    exact = torch.promote_types(one.dtype, torch.float32)
    return (one.to(exact) - other.to(exact)).square().mean(tuple(range(1, one.dim())))
