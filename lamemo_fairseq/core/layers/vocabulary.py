"""Word embeddings in, word scores out: full and adaptive, tied or not.

Frequent words come first in a dictionary. Cutoffs split it into bands (Grave et al. 2017). With a factor f, band i has
embeddings f^i times narrower than the first (Baevski and Auli 2019).

Shapes: B streams, N tokens of a segment, T = B N, V words, F classes of the first softmax, t tokens of a band,
d model width.
"""

import math
from typing import Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.copies import copy_to_host
from .chunked_loss import linear_cross_entropy, tokens_at_once


class Bands:
    """The split of a dictionary: band i holds the words ``starts[i] .. ends[i]-1``, embedded in ``dims[i]`` numbers.

    Bands of one width share a table; a band of another width has its own.

    Raises:
        ValueError: the cutoffs do not increase within the dictionary, or a band would have no width.
    """

    def __init__(self, words: int, dim: int, cutoffs: Sequence[int] = (), factor: float = 1.0):
        if list(cutoffs) != sorted({c for c in cutoffs if 0 < c < words}):
            raise ValueError(
                f"--adaptive-softmax-cutoff is {','.join(map(str, cutoffs))}: cutoffs must increase, and lie within "
                f"the dictionary of {words:,} words"
            )
        self.starts = [0, *cutoffs]
        self.ends = [*cutoffs, words]
        self.dims = [int(dim // factor**i) for i in range(len(self.starts))]
        if min(self.dims) < 1:
            raise ValueError(
                f"{len(self.starts)} bands do not fit: width {dim} divided by factor {factor} again and again "
                "leaves nothing; use fewer cutoffs or a smaller factor"
            )
        self.shared = len(set(self.dims)) == 1
        self.tables: List[Tuple[int, int]] = (
            [(words, dim)]
            if self.shared
            else [(e - s, d) for s, e, d in zip(self.starts, self.ends, self.dims, strict=True)]
        )

    def __len__(self) -> int:
        return len(self.starts)

    def table_of(self, band: int) -> Tuple[int, slice]:
        """Return the number of a band's table, and the band's entries in it."""
        if self.shared:
            return 0, slice(self.starts[band], self.ends[band])
        return band, slice(0, self.ends[band] - self.starts[band])


class WordEmbedding(nn.Module):
    """Embeddings, projected to the model's width where they are narrower, times ``sqrt(d)``."""

    def __init__(self, bands: Bands, embed_dim: int):
        super().__init__()
        self.bands = bands
        # No padding entry: padding of a stream stands behind all tokens that are scored.
        self.tables = nn.ModuleList(nn.Embedding(count, dim) for count, dim in bands.tables)
        narrow = not bands.shared or bands.dims[0] != embed_dim
        self.projections = nn.ParameterList(
            nn.Parameter(torch.empty(embed_dim, dim)) for _, dim in (bands.tables if narrow else [])
        )
        self.scale = math.sqrt(embed_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed words: ``[B, N] -> [B, N, d]``."""
        if self.bands.shared:
            return self._embed(0, tokens) * self.scale
        x = self._embed(0, tokens.clamp(max=self.bands.ends[0] - 1))
        for i in range(1, len(self.bands)):
            start, end = self.bands.starts[i], self.bands.ends[i]
            # Every band embeds every token: on a GPU this is cheaper than asking for the tokens of each band.
            banded = self._embed(i, (tokens - start).clamp(0, end - start - 1))
            x = torch.where((tokens >= start).unsqueeze(-1), banded, x)
        return x * self.scale

    def table(self, number: int) -> Tensor:
        """Return the weights of a table of embeddings."""
        weight: Tensor = self.tables[number].weight  # type: ignore[assignment]
        return weight

    def reset_parameters(self) -> None:
        """Draw weights N(0, .02)."""
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02)

    def _embed(self, table: int, entries: Tensor) -> Tensor:
        x = self.tables[table](entries)
        return F.linear(x, self.projections[table]) if len(self.projections) else x


class _Output(nn.Module):
    """Weights and biases of all words, band by band."""

    def __init__(self, bands: Bands, embed_dim: int, tied: Optional[WordEmbedding]):
        super().__init__()
        if tied is not None and tied.bands.tables != bands.tables:
            raise ValueError(
                f"the output layer cannot share the embeddings' weights of shapes {tied.bands.tables}, as it needs "
                f"{bands.tables}: give both the same width, cutoffs and factor (--adaptive-input, "
                "--decoder-output-dim), or pass --untie-output"
            )
        self.bands = bands
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(count, dim)) if tied is None else tied.tables[i].weight
            for i, (count, dim) in enumerate(bands.tables)
        )
        self.biases = nn.ParameterList(nn.Parameter(torch.empty(count)) for count, _ in bands.tables)
        self.projections = nn.ParameterList()
        if not bands.shared or bands.dims[0] != embed_dim:
            # As released: the first band projects back on its own, the others share the embeddings' projections.
            shared = tied is not None and len(tied.projections) > 0
            self.projections.append(nn.Parameter(torch.empty(embed_dim, bands.dims[0])))
            for i in range(1, len(bands)):
                table, _ = bands.table_of(i)
                new = nn.Parameter(torch.empty(embed_dim, bands.dims[i]))
                self.projections.append(tied.projections[table] if tied is not None and shared else new)

    def reset_parameters(self) -> None:
        """Draw weights N(0, .02); set biases to 0."""
        for weight in (*self.weights, *self.projections):
            nn.init.normal_(weight, std=0.02)
        for bias in self.biases:
            nn.init.zeros_(bias)

    def _project(self, features: Tensor, band: int) -> Tensor:
        return features @ self.projections[band] if len(self.projections) else features

    def _by_band(self) -> List[Tuple[Tensor, Tensor]]:
        """Return weights and biases of each band; one split of a shared table joins the gradients of its bands."""
        if not self.bands.shared:
            return list(zip(self.weights, self.biases, strict=True))
        sizes = [end - start for start, end in zip(self.bands.starts, self.bands.ends, strict=True)]
        return list(zip(self.weights[0].split(sizes), self.biases[0].split(sizes), strict=True))


class FullSoftmax(_Output):
    """Scores of all words."""

    def __init__(self, words: int, output_dim: int, embed_dim: int, tied: Optional[WordEmbedding] = None):
        super().__init__(Bands(words, output_dim), embed_dim, tied)

    def forward(self, features: Tensor) -> Tensor:
        """Score all words: ``[B, N, d] -> [B, N, V]``."""
        return F.linear(self._project(features, 0), self.weights[0], self.biases[0])

    def plan(self, target: Tensor, on_host: Optional[Tensor] = None) -> None:
        """Return nothing: a full softmax needs no plan."""

    def loss(self, features: Tensor, target: Tensor, plan: None = None) -> Tensor:
        """Return the sum of the negative log-likelihoods of *target* ``[B, N]``, a float32 scalar."""
        flat = self._project(features.flatten(0, 1), 0)
        return linear_cross_entropy(flat, self.weights[0], self.biases[0], target.reshape(-1))

    def target_log_probs(self, features: Tensor, target: Tensor) -> Tensor:
        """Return log-probabilities ``[B, N]`` of the words *target*, in float32 or wider."""
        size = tokens_at_once(*self.weights[0].shape)
        chunks = zip(features.flatten(0, 1).split(size), target.reshape(-1).split(size), strict=True)
        return torch.cat([_pick(_exact(self(chunk)), words) for chunk, words in chunks]).view_as(target)


class AdaptiveSoftmax(_Output):
    """A softmax over the first band and one entry for each other band, and a softmax within each of these.

    fairseq's ``adaptive_loss`` calls it.
    """

    def __init__(self, bands: Bands, embed_dim: int, tied: Optional[WordEmbedding] = None):
        super().__init__(bands, embed_dim, tied)
        self.cuts: Tensor
        # Class -i (from the end) stands for band i, as in the released checkpoints.
        self.cluster_weight = nn.Parameter(torch.empty(len(bands) - 1, bands.dims[0]))
        self.cluster_bias = nn.Parameter(torch.empty(len(bands) - 1))
        # Keep the cutoffs on the targets' device, to avoid a synchronising copy.
        self.register_buffer("cuts", torch.tensor(bands.starts[1:]), persistent=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.cluster_weight, std=0.02)
        nn.init.zeros_(self.cluster_bias)

    def forward(self, features: Tensor, target: Tensor) -> Tuple[List[Tensor], List[Optional[Tensor]]]:
        """Return scores and targets of each softmax, whose cross-entropies add up to the loss.

        Args:
            features: ``[B, N, d]``.
            target: ``[T]`` word ids.

        Returns:
            For the first band scores ``[T, F]``; for each other band scores of its own tokens, None if no target is in
            it.
        """
        flat = features.reshape(-1, features.size(-1))
        first = self.bands.ends[0]
        band = self._band_of(target)
        entry = torch.where(band > 0, first + len(self.bands) - 1 - band, target)
        logits: List[Tensor] = [self._head(flat)]
        targets: List[Optional[Tensor]] = [entry]
        if len(entry) == 0:
            # fairseq's criterion fails on no targets, and training needs a loss: one token with a single class costs 0.
            logits, targets = [logits[0].sum().view(1, 1)], [entry.new_zeros(1)]
        for i in range(1, len(self.bands)):
            tokens = (band == i).nonzero().squeeze(-1)
            logits.append(self._tail(flat[tokens], i))
            targets.append(target[tokens] - self.bands.starts[i] if len(tokens) else None)
        return logits, targets

    def plan(self, target: Tensor, on_host: Optional[Tensor] = None) -> "BandPlan":
        """Sort targets ``[B, N]`` by band; called before the layers, so that the counts are there in time.

        Args:
            target: word ids.
            on_host: the same, on the host if *target* is not; they are counted there, and nothing is waited for.
        """
        counts = None
        if on_host is not None:
            cuts = torch.tensor(self.bands.starts[1:])
            counts = torch.bincount(torch.bucketize(on_host.reshape(-1), cuts, right=True), minlength=len(self.bands))
        return BandPlan(self._band_of(target.reshape(-1)), len(self.bands), counts)

    def loss(self, features: Tensor, target: Tensor, plan: "Optional[BandPlan]" = None) -> Tensor:
        """Return the sum of the negative log-likelihoods of *target* ``[B, N]``, a float32 scalar."""
        plan = self.plan(target) if plan is None else plan
        flat, words = features.flatten(0, 1), target.reshape(-1)
        first = self.bands.ends[0]
        entry = torch.where(plan.band > 0, first + len(self.bands) - 1 - plan.band, words)
        by_band = self._by_band()
        weight, bias = self._with_clusters(*by_band[0])
        loss = linear_cross_entropy(self._project(flat, 0), weight, bias, entry)
        for i, tokens in plan.tokens():
            weight, bias = by_band[i]
            of_band = words[tokens] - self.bands.starts[i]
            loss = loss + linear_cross_entropy(self._project(flat[tokens], i), weight, bias, of_band)
        return loss

    def target_log_probs(self, features: Tensor, target: Tensor) -> Tensor:
        """Return log-probabilities ``[B, N]`` of the words *target*, in float32 or wider."""
        words = target.reshape(-1)
        logits, targets = self(features, words)
        band = self._band_of(words)
        log_probs = torch.zeros_like(words, dtype=logits[0].dtype)
        for i, entry in enumerate(targets):
            if entry is not None:
                tokens = (band == i).nonzero().squeeze(-1) if i else torch.arange(len(words), device=words.device)
                picked = _pick(logits[i], entry)[: len(tokens)]  # without words, not the class that stands in for them
                log_probs = log_probs.index_add(0, tokens, picked)
        return log_probs.view_as(target)

    def log_probs(self, features: Tensor) -> Tensor:
        """Return log-probabilities ``[B, N, V]`` of all words, in float32 or wider."""
        head = self._head(features).log_softmax(-1)
        first = self.bands.ends[0]
        by_band = [head[..., :first]]
        for i in range(1, len(self.bands)):
            by_band.append(self._tail(features, i).log_softmax(-1) + head[..., head.size(-1) - i].unsqueeze(-1))
        return torch.cat(by_band, dim=-1)

    def _head(self, features: Tensor) -> Tensor:
        weight, bias = self._with_clusters(*self._by_band()[0])
        return _exact(F.linear(self._project(features.to(weight.dtype), 0), weight, bias))

    def _with_clusters(self, weight: Tensor, bias: Tensor) -> Tuple[Tensor, Tensor]:
        return torch.cat([weight, self.cluster_weight]), torch.cat([bias, self.cluster_bias])

    def _tail(self, features: Tensor, band: int) -> Tensor:
        weight, bias = self._by_band()[band]
        return _exact(F.linear(self._project(features.to(weight.dtype), band), weight, bias))

    def _band_of(self, target: Tensor) -> Tensor:
        return torch.bucketize(target, self.cuts, right=True)


class BandPlan:
    """The tokens of each band.

    The counts decide shapes, so the host needs them. Where it cannot count, it asks for them before the layers are
    computed and reads them afterwards, so that it never waits for the device.

    Args:
        band: ``[T]``, the band of each token's target.
        bands: number of bands.
        counts: ``[bands]`` on the host, the number of tokens in each.
    """

    def __init__(self, band: Tensor, bands: int, counts: Optional[Tensor] = None):
        self.band = band
        self._order = band.argsort(stable=True)
        if counts is None:
            counts = torch.zeros(bands, dtype=torch.long, device=band.device)
            counts = counts.scatter_add_(0, band, torch.ones_like(band))
        self._counts = copy_to_host(counts)

    def tokens(self) -> Iterator[Tuple[int, Tensor]]:
        """Yield bands but the first, and the tokens ``[t]`` of each: with none, its weights still get a gradient."""
        by_band = self._order.split(self._counts().tolist())
        return ((i, tokens) for i, tokens in enumerate(by_band) if i > 0)


def _exact(logits: Tensor) -> Tensor:
    """Return scores in float32 or wider: sums of losses overflow half precision."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _pick(logits: Tensor, target: Tensor) -> Tensor:
    """Return log-probabilities ``[T]`` of one class a token."""
    return logits.log_softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1)
