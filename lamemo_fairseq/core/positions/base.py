"""Position encodings: the base class, whose biases and rotations attention takes.

Shapes: B streams, R rows, L layers, H heads, D size of a head, U distances, P kinds of counts, d model width.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Dict, Iterator, List, Optional, Protocol, Tuple, Type

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import Counted
from ..names import check_spelling
from ..registry import Registry
from .bias import LayerBias, PositionConfig
from .shapes import check_biases


class Positions(Protocol):
    """The positions of the rows of one segment, as a memory uses them: those of `PositionEncoding.forward`."""

    def __call__(self, causal: int, ahead: Optional[range], like: Tensor) -> List[LayerBias]: ...


Request = Tuple[int, Optional[range], torch.dtype, torch.device]  # the arguments of `biases`
KNOWN = 2  # number of shapes whose biases are stored


class PositionEncoding(nn.Module):
    """Base of all position encodings; one serves all layers of a decoder."""

    reaches_memory: ClassVar[bool] = True  # whether it tells memory rows from a segment's own
    reads_words: ClassVar[bool] = False  # whether distances are counted in the text, by `counts`

    def __init__(self, config: PositionConfig):
        self.check(config.looks_ahead)
        super().__init__()
        self.config = config
        self._known: Optional[Dict[Request, List[LayerBias]]] = None  # while parameters do not change

    @classmethod
    def check(cls, looks_ahead: bool) -> None:
        """Refuse a memory that attends to the right, or one that does not; most encodings take both.

        Raises:
            ValueError: with the encoding's name and the remedy.
        """

    def forward(self, causal: int, ahead: Optional[range], like: Tensor) -> List[LayerBias]:
        """Return `biases`; in evaluation within `unchanged`, those that were computed before.

        A CUDA graph computes them in every replay, as the graph may outlive the context.
        """
        known = self._known
        recorded = like.is_cuda and torch.cuda.is_current_stream_capturing()
        if known is None or recorded or self.training or torch.is_grad_enabled():
            return self._checked(causal, ahead, like)
        request = (causal, ahead, like.dtype, like.device)
        if request not in known:
            if len(known) == KNOWN:  # shapes change while a memory fills, and with the last segment
                del known[next(iter(known))]
            known[request] = self._checked(causal, ahead, like)
        return known[request]

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """A context in which parameters do not change: evaluation computes the biases of a segment's shape once."""
        outside, self._known = self._known, {}
        try:
            yield
        finally:
            self._known = outside

    def embed(self, x: Tensor, lengths: Optional[Tensor] = None) -> Tensor:
        """Add positions to the embeddings ``[B, N, d]`` of a segment; most encodings leave them alone.

        ``lengths [B]`` counts the tokens that are not padding; None if none is.
        """
        return x

    def of(self, words: Tensor) -> Positions:
        """Return the positions of rows that stand for ``words [B, R]``, the memory slots' before the current ones."""
        return _CountedPositions(self, self.counts(words)) if self.reads_words else self

    def counts(self, words: Tensor) -> Tensor:
        """Return the counts ``[P, B, R]`` of rows that stand for ``words [B, R]``, int64 and growing from row to row.

        Only differences matter. The difference of two rows depends on the words between the rows alone, their own words
        included. An encoding that `reads_words` defines it, and gives each `LayerBias` the tables for the differences.
        """
        raise NotImplementedError

    def upgrade(self, weights: Dict[str, Any], prefix: str) -> bool:
        """Replace weights, in place, that an older version stored in another form; return whether there were any.

        Args:
            prefix: of the names of this encoding's weights.
        """
        return False

    def biases(self, causal: int, ahead: Optional[range], like: Tensor) -> List[LayerBias]:
        """Return the biases of every layer for one segment.

        Args:
            causal: number of keys, for the distances ``causal-1 .. 0`` and the positions ``0 .. causal-1``.
            ahead: signed distances ``key - slot`` of the look-ahead attention, or None.
            like: any tensor of the model's device and dtype.
        """
        raise NotImplementedError

    def _checked(self, causal: int, ahead: Optional[range], like: Tensor) -> List[LayerBias]:
        biases = self.biases(causal, ahead, like)
        check_biases(type(self).__name__, self.config, biases, causal, ahead)
        return biases

    def _clamp(self, distances: Tensor) -> Tensor:
        """Clamp distances to ``clamp_len``; negative ones, to the right, are left alone.

        Raises:
            TypeError: the distances are no tensor, as the ``range`` that `biases` gets is none.
        """
        if not isinstance(distances, Tensor):  # also without a limit, so that --clamp-len does not fail later
            raise TypeError(f"_clamp takes a tensor of distances, not a {type(distances).__name__}: make it one first")
        return distances.clamp(max=self.config.clamp_len) if self.config.clamp_len > 0 else distances

    def _sinusoids(self, distances: range, like: Tensor, width: Optional[int] = None) -> Tensor:
        """Return sinusoids ``[U, d]`` of the distances, or of another *width*, dropped out like embeddings."""
        values = torch.arange(distances.start, distances.stop, distances.step, device=like.device)
        table = sinusoid(self._clamp(values), width or self.config.embed_dim, like.dtype)
        return F.dropout(table, self.config.dropout, self.training)


@dataclass(frozen=True)
class _CountedPositions:
    """Positions of rows whose words are known. The tables are those of any words, and computed as for any encoding."""

    encoding: PositionEncoding
    counts: Tensor  # [P, B, R]

    def __call__(self, causal: int, ahead: Optional[range], like: Tensor) -> List[LayerBias]:
        if causal != self.counts.size(2):
            raise ValueError(f"positions of {causal} rows were asked for, and words of {self.counts.size(2)} are known")
        biases: List[LayerBias] = self.encoding(causal, ahead, like)
        return [bias._replace(counted=self._with_counts(bias.counted)) for bias in biases]

    def _with_counts(self, counted: Optional[Counted]) -> Counted:
        assert counted is not None
        return counted._replace(counts=self.counts)


def sinusoid(positions: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Return ``[sin | cos]`` of positions ``[U]`` at ``dim/2`` wavelengths: ``[U, dim]`` (Vaswani et al. 2017).

    Sinusoids are computed in float32, or float64 for a float64 model, and then rounded to *dtype*. Half precision has
    too few values to tell 800 positions apart.
    """
    exact = torch.promote_types(dtype, torch.float32)
    angles = positions.to(exact).unsqueeze(1) * inverse_frequencies(dim, exact, positions.device)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[:, :dim].to(dtype)


def inverse_frequencies(dim: int, dtype: torch.dtype, device: Optional[torch.device] = None) -> Tensor:
    """Return ``10000^(-2i/dim)`` for i from 0 to ``dim/2 - 1``: ``[dim/2]``."""
    return 10000.0 ** -(torch.arange(0, dim, 2, device=device, dtype=dtype) / dim)


def require_pairs(embed_dim: int) -> None:
    """Refuse a model width that sinusoids do not fit.

    Raises:
        ValueError: the width is odd.
    """
    if embed_dim % 2:
        raise ValueError(
            f"--decoder-embed-dim {embed_dim} is odd, but sinusoids come in pairs: pass an even one, or a "
            "--position-encoding without sinusoids"
        )


POSITIONS: Registry[Type[PositionEncoding]] = Registry(
    "position encoding",
    lambda encoding: check_spelling(encoding, PositionEncoding),
    own="one of your own goes into lamemo_fairseq/core/positions",
)
