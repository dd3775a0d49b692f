"""A decoder layer: attention and feed-forward, each with its residual and layer norm.

Shapes: B streams, R rows going in, Q rows coming out, d model width.
"""

from dataclasses import dataclass
from typing import Any, Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels import aligned
from ..kernels.activation import relu_dropout
from ..kernels.module_tree import is_plain
from ..kernels.padded import WideRows, last_of, made_once, narrowed, newest_of
from ..kernels.residual import residual_norm, residual_sum_and_norm
from ..kernels.rows import fusable
from ..kernels.shared import as_residual
from .activations import ACTIVATIONS
from .self_attention import SelfAttention


@dataclass(frozen=True)
class LayerConfig:
    """Sizes and choices of everything in a layer but its attention."""

    embed_dim: int
    ffn_dim: int
    dropout: float = 0.0
    activation_dropout: float = 0.0
    activation_fn: str = "relu"
    normalize_before: bool = False
    checkpoint_activations: bool = False


class FeedForward(nn.Module):
    """Two linear maps with an activation between them, row by row."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        self.widths = config.embed_dim, config.ffn_dim
        self.fc1 = nn.Linear(config.embed_dim, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.embed_dim)
        self.activation_fn = ACTIVATIONS[config.activation_fn]
        self.activation_dropout = nn.Dropout(config.activation_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return narrowed(aligned.through(self.fc2, self._hidden(x), self.widths[1]), self.widths[0])

    def without_bias(self, x: Tensor) -> WideRows:
        """Return the output of `forward` without the last bias, perhaps wider."""
        return aligned.wide_linear(self._hidden(x), self.fc2.weight)

    def _hidden(self, x: Tensor) -> WideRows:
        dropout = self.activation_dropout
        known = is_plain(dropout, nn.Dropout)  # another kind of dropout does not expect padding
        if known and is_plain(self.fc1, nn.Linear) and self.activation_fn is F.relu and fusable(x):
            hidden = aligned.wide_linear(x, self.fc1.weight)
            return relu_dropout(hidden, dropout.p, dropout.training, self.fc1.bias)
        hidden = aligned.through(self.fc1, x, self.widths[0])
        return WideRows(dropout(self.activation_fn(hidden if known else narrowed(hidden, self.widths[1]))))


class DecoderLayer(nn.Module):
    """A decoder layer around the attention of a memory."""

    def __init__(self, config: LayerConfig, attention: SelfAttention):
        super().__init__()
        self.config = config
        self.self_attn = attention
        self.self_attn_layer_norm = nn.LayerNorm(config.embed_dim)
        self.feed_forward = FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.embed_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, rows: Tensor, *attention_args: object) -> tuple[Tensor, Any]:
        """Pass ``rows [B, R, d]`` through the layer.

        Returns:
            The last Q rows ``[B, Q, d]``, as many as the attention returned, and the attention's second result.
        """
        if self.config.checkpoint_activations and self.training:
            with made_once(active=False):  # else other tensors would be saved the second time
                passed: tuple[Tensor, Any] = checkpoint(self._forward, rows, *attention_args, use_reentrant=False)
            return passed
        return self._forward(rows, *attention_args)

    def _forward(self, rows: Tensor, *attention_args: object) -> tuple[Tensor, Any]:
        return self.around(rows, lambda normed: _attended(self.self_attn, self.self_attn(normed, *attention_args)))

    def attention_input(self, rows: Tensor) -> Tensor:
        """Return the attention's input for ``rows [B, R, d]``."""
        return self.self_attn_layer_norm(rows) if self.config.normalize_before else rows

    def around(self, rows: Tensor, attend: Callable[[Tensor], tuple[WideRows, Any]]) -> tuple[Tensor, Any]:
        """Run the layer with another attention: *attend* returns ``[B, Q, d]`` of its input, and a second result."""
        before = self.config.normalize_before
        if before:
            attended, carried = attend(self.attention_input(rows))
            last = last_of(rows, attended.size(1))
            x, normed = residual_sum_and_norm(attended, last, self.final_layer_norm, self.dropout)
            return x + self.dropout(self.feed_forward(normed)), carried
        newest = newest_of(rows)
        # Made before the products of these rows, which may add the residual's gradient to theirs.
        residuals = {t.size(1): as_residual(t) for t in ((rows,) if newest is rows else (rows, newest))}
        attended, carried = attend(self.attention_input(rows))
        queries = attended.size(1)
        last, shared = residuals.get(queries) or (last_of(rows, queries), None)
        x = residual_norm(attended, last, self.self_attn_layer_norm, self.dropout, shared=shared)
        # The kernel adds the bias and sums its gradient; a hook has to see the whole output.
        whole = is_plain(self.feed_forward, FeedForward) and is_plain(self.feed_forward.fc2, nn.Linear)
        apart = whole and fusable(x)
        last, shared = as_residual(x)
        y = self.feed_forward.without_bias(x) if apart else self.feed_forward(x)
        bias = self.feed_forward.fc2.bias if apart else None
        return residual_norm(y, last, self.final_layer_norm, self.dropout, bias, shared), carried


def _attended(attention: SelfAttention, returned: Any) -> tuple[WideRows, Any]:
    """Return what the ``forward`` of an attention has *returned*.

    Raises:
        ValueError: that is no pair.
    """
    if not isinstance(returned, tuple) or len(returned) != 2:  # two streams of a tensor would be taken for one
        raise ValueError(
            f"{type(attention).__name__}.forward returned type {type(returned).__name__}: return the rows of "
            "merge_heads and a second result, None if there is none"
        )
    return returned
