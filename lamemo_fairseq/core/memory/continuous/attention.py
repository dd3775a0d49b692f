"""Self-attention over the short-term memory, and continuous attention over the long-term one beside it.

Shapes: B streams, R = m + N rows, Q queries, H heads, D size of a head, J basis functions, d model width.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention.padding import as_wide
from ...kernels import aligned
from ...kernels.module_tree import is_product
from ...kernels.padded import WideRows, narrowed
from ...layers import AttentionConfig, SelfAttention
from ...positions import LayerBias
from .options import ContinuousOptions
from .sampling import Density

LEAST_VARIANCE = 1e-6  # as in the authors' code: far below the narrowest basis function


class LongTerm(NamedTuple):
    """Keys and values of a signal, for queries."""

    keys: Tensor  # [B, H, 2, D], which give a query's mean and variance, in float32 or wider
    values: Tensor  # [B, H, J, D]


class ContinuousSelfAttention(SelfAttention):
    """The short-term read-outs, and behind their heads as many long-term ones, each with an output projection."""

    def __init__(self, config: AttentionConfig):
        super().__init__(config)
        assert isinstance(config.options, ContinuousOptions)
        width, self.basis = config.heads * config.head_dim, config.options.basis()
        self.out_proj = nn.Linear(2 * width, config.embed_dim, bias=False)
        self.long_term_k_proj = nn.Linear(config.embed_dim, width, bias=False)
        self.long_term_v_proj = nn.Linear(config.embed_dim, width, bias=False)
        self.density_proj = nn.Linear(self.basis.count, 2, bias=False)  # w_mu and w_sigma

    def forward(self, rows: Tensor, bias: LayerBias, queries: int, coefficients: Tensor) -> tuple[WideRows, Density]:
        """Let the last *queries* of ``rows [B, R, d]`` attend to all rows before them, and to a signal.

        Args:
            coefficients: ``[B, J, d]`` of the signal; zeros stand for a signal of which nothing is read.

        Returns:
            ``[B, Q, d]``, and the densities of the queries' attention to the signal.
        """
        q, k, v = self.project(rows, queries, keep_padding=True)
        short_term = self.causal(q, k, v, bias, need_normalizer=False).output
        heads, density = self.combine(q, short_term, self.long_term(coefficients))
        return self.merge_heads(heads), density

    def combine(self, q: Tensor, short_term: Tensor, long_term: LongTerm) -> tuple[Tensor, Density]:
        """Read the signal with queries ``[B, H, Q, D or D']``.

        Returns:
            ``[B, 2 H, Q, D or D']``, the short-term read-outs and then the long-term ones, and the densities of the
            queries' attention.
        """
        density = self.locate(q[..., : self.config.head_dim], long_term)
        read_out = self.read(density, long_term._replace(values=as_wide(q, long_term.values)))
        return torch.cat([short_term, read_out], dim=1), density

    def long_term(self, coefficients: Tensor) -> LongTerm:
        """Return keys and values of a signal with *coefficients* ``[B, J, d]``.

        The scores of a query over the basis functions are ``s = (B W_k) q / sqrt(D)``, and its mean and variance take
        nothing but ``w_mu . s`` and ``w_sigma . s``. So ``w^T B W_k`` serves as one key each, and no score is held for
        every query and basis function.
        """
        with torch.autocast(coefficients.device.type, enabled=False):
            keys = self._density_keys(coefficients)
        stored = coefficients.to(_dtype_of(self.long_term_v_proj))
        values = aligned.through(self.long_term_v_proj, stored, self.config.embed_dim)
        return LongTerm(self._split_heads(keys), self._split_heads(narrowed(values, keys.size(2))))

    def _density_keys(self, coefficients: Tensor) -> Tensor:
        """Return ``w^T B W_k`` ``[B, 2, H D]``. Maps that are no plain products are called, one after the other."""
        if is_product(self.density_proj) and is_product(self.long_term_k_proj):
            exact = coefficients.dtype
            summed = self.density_proj.weight.to(exact) @ coefficients  # [B, 2, d]
            return F.linear(summed, self.long_term_k_proj.weight.to(exact))
        keys = self.long_term_k_proj(coefficients.to(_dtype_of(self.long_term_k_proj)))
        density: Tensor = self.density_proj(keys.transpose(1, 2))
        return density.transpose(1, 2).to(coefficients.dtype)

    def locate(self, q: Tensor, long_term: LongTerm) -> Density:
        """Locate ``q [B, H, Q, D]``: ``mu = sigmoid(w_mu . s)``, ``sigma^2 = softplus(w_sigma . s)``."""
        with torch.autocast(q.device.type, enabled=False):
            keys = long_term.keys
            mean, variance = (q.to(keys.dtype) @ keys.transpose(-1, -2) / math.sqrt(q.size(-1))).unbind(-1)
            return Density(mean.sigmoid(), F.softplus(variance).clamp(min=LEAST_VARIANCE))

    def read(self, density: Density, long_term: LongTerm) -> Tensor:
        """Return ``E[psi(t)] . B W_v``: ``[B, H, Q, D]``."""
        with torch.autocast(density.mean.device.type, enabled=False):
            weights = self.basis.expectation(*density, long_term.values.dtype)
        read_out: Tensor = weights @ long_term.values
        return read_out


def _dtype_of(layer: nn.Linear) -> torch.dtype:
    return layer.weight.dtype if is_product(layer) else next(layer.parameters()).dtype


def divergence(density: Density, sigma: float) -> Tensor:
    """Return ``KL(N(mu, sigma^2) || N(mu, sigma_0^2))`` of every query: ``[B, H, Q]``."""
    ratio = density.variance / sigma**2
    return 0.5 * (ratio - ratio.log() - 1)
