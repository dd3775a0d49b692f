"""Read a split with a trained model, and average its attention, its memory and its loss.

Shapes: B streams, H heads, N tokens of a segment, K keys, m memory slots, n tokens that are read at a time, V words.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, Optional

import torch
from fairseq import utils
from torch import Tensor

from ..core.memory.lookahead import LookaheadWindow
from ..core.memory.position import real_tokens
from ..evaluation.evaluate import finite_sum
from ..evaluation.output import TokenLog
from .documents import DocumentLosses
from .recording import record


class _Sums:
    """Sums by layer, over streams, heads and segments. Only segments with the largest memory so far count."""

    def __init__(self) -> None:
        self.sums: Dict[int, Tensor] = {}  # a layer: [..], float64
        self.counts: Dict[int, int] = {}  # a layer: streams and heads whose values are in the sum

    def add(self, layer: int, values: Tensor) -> None:
        """Add ``values [B, H, ..]`` of a segment."""
        total = self.sums.get(layer)
        if total is None or values.size(-1) > total.size(-1):
            total = torch.zeros(values.shape[2:], dtype=torch.float64)
            self.sums[layer], self.counts[layer] = total, 0
        if values.shape[2:] == total.shape:
            total += values.double().sum((0, 1)).cpu()
            self.counts[layer] += values.size(0) * values.size(1)

    def mean(self, layer: int) -> Tensor:
        """Return the mean ``[..]`` of a layer."""
        return self.sums[layer] / self.counts[layer]


class Attention(_Sums):
    """Means of the weights ``[N, K]`` that current tokens give to each key, with a full memory."""

    def by_distance(self, layer: int) -> Tensor:
        """Return the mean weight at distances ``0 .. K-1`` from the query, over queries with a key there: ``[K]``."""
        weights = self.mean(layer)
        queries, keys = weights.shape
        # Distance between query i, at position K - N + i, and key j.
        distance = torch.arange(keys - queries, keys).unsqueeze(1) - torch.arange(keys)
        seen = distance >= 0
        sums = torch.zeros(keys, dtype=torch.float64).index_add_(0, distance[seen], weights[seen])
        return sums / torch.bincount(distance[seen], minlength=keys)

    def by_slot(self, layer: int) -> Tensor:
        """Return the mean weight of each memory slot, oldest first, over all queries of a segment: ``[m]``."""
        weights = self.mean(layer)
        return weights[:, : weights.size(1) - weights.size(0)].mean(0)


class Mixing(_Sums):
    """Means of alpha ``[m]``, the share that a slot keeps of its former content."""

    def by_age(self, layer: int, segment_length: int) -> Tensor:
        """Return the mean alpha of the slots written 1, 2, ... segments ago: ``[ceil(m / N)]``."""
        alpha = self.mean(layer)
        age = (torch.arange(alpha.size(0), 0, -1) + segment_length - 1) // segment_length
        sums = torch.zeros(int(age.max()), dtype=torch.float64).index_add_(0, age - 1, alpha)
        return sums / torch.bincount(age - 1)


class Losses:
    """Sums of the loss at each position in the segment, in bits."""

    def __init__(self, segment_length: int):
        self.sums = torch.zeros(segment_length, dtype=torch.float64)
        self.counts = torch.zeros(segment_length, dtype=torch.int64)

    def add(self, log_probs: Tensor, target: Tensor, lengths: Tensor) -> None:
        """Add log-probabilities ``[B, N, V]`` of the words ``target [B, N]``; streams have *lengths* ``[B]``."""
        log_likelihood = log_probs.gather(2, target.unsqueeze(2)).squeeze(2).double()
        real = real_tokens(target, lengths)
        bits = -log_likelihood.masked_fill(~real, 0).sum(0).cpu() / math.log(2)
        self.sums[: bits.size(0)] += bits
        self.counts[: bits.size(0)] += real.sum(0).cpu()

    def by_position(self) -> Tensor:
        """Return the mean loss ``[N]``."""
        return self.sums / self.counts

    def mean(self) -> float:
        """Return the loss of the split."""
        return float(self.sums.sum() / self.counts.sum())


@dataclass
class Collected:
    """Attention, mixing weights and losses of one model."""

    segment_length: int
    layers: int
    losses: Losses
    attention: Attention = field(default_factory=Attention)
    mixing: Mixing = field(default_factory=Mixing)
    log: TokenLog = field(default_factory=TokenLog)
    curves: Dict[int, DocumentLosses] = field(default_factory=dict)  # by memory slots; first, the model's own
    segments: int = 0

    @property
    def attending_layers(self) -> List[int]:
        return sorted(self.attention.sums)

    @property
    def slots(self) -> int:
        """Keys of the attention before the segment."""
        return max((weights.size(1) - weights.size(0) for weights in self.attention.sums.values()), default=0)

    @property
    def mixing_layers(self) -> List[int]:
        return sorted(self.mixing.sums)


class _Listener:
    """Adds up the attention of current tokens, unless the batch is padded or its segment is short.

    Args:
        collected: the sums.
        tokens: n, the tokens that are read at a time. Memory tokens may stand behind them, which no token sees.
    """

    def __init__(self, collected: Collected, tokens: int):
        self.collected, self.tokens = collected, tokens
        self.counts = False

    def causal(self, layer: int, weights: Tensor) -> None:
        if self.counts:
            queries, keys = weights.shape[2:]
            behind = max(0, queries - self.tokens)
            self.collected.attention.add(layer, weights[:, :, : queries - behind, : keys - behind])

    def lookahead(self, layer: int, weights: Tensor, alpha: Tensor, window: LookaheadWindow) -> None:
        if self.counts:
            self.collected.mixing.add(layer, alpha)


@torch.no_grad()
def collect(model: Any, batches: Iterable[Dict[str, Any]], device: Optional[torch.device] = None) -> Collected:
    """Read *batches* of consecutive segments, as the task feeds them, and average.

    Args:
        model: a language model of this package in evaluation mode.
        batches: of a split, from its beginning.
        device: of the model; None for the CPU.

    Raises:
        DivergenceError: a token has no probability, or the features of a stream are not finite.
    """
    decoder = model.decoder
    collected = Collected(decoder.segment_length, len(decoder.layers), Losses(decoder.segment_length))
    listener = _Listener(collected, decoder.memory.period)
    with record(decoder, listener):
        for batch in batches:
            if device is not None and device.type == "cuda":
                batch = utils.move_to_cuda(batch, device=device)
            inputs = batch["net_input"]
            whole = inputs["src_tokens"].size(1) == collected.segment_length
            listener.counts = whole and not inputs["position"].ragged
            output = model(**inputs)
            log_probs = model.get_normalized_probs(output, log_probs=True, sample=batch)
            target, lengths = batch["target"], inputs["src_lengths"]
            collected.losses.add(log_probs, target, lengths)
            of_target, real = log_probs.gather(2, target.unsqueeze(2)).squeeze(2), real_tokens(target, lengths)
            finite_sum(of_target[real], inputs["position"])
            collected.log.add(inputs["position"].streams, lengths.tolist(), target[real], of_target[real])
            collected.segments += 1
    return collected
