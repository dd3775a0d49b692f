"""Token-by-token decoding: the texts read so far as a cache, and new tokens read into it.

Shapes: B rows, N tokens of a segment, M memory slots, k new tokens, d model width.
"""

from collections import deque
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..attention import RelativeBias
from ..positions import LayerBias
from .attention import Columns, cached_attention
from .cache import Network, Record, SegmentCache

# Longer prompts are read in parts of this size, which bounds the scores held at a time.
TOKENS_AT_ONCE = 256


class Spare(deque):
    """The last thing put there, of use to the next call; copied and stored models begin without."""

    def __init__(self) -> None:
        super().__init__(maxlen=1)

    def __reduce__(self) -> Tuple[Any, ...]:
        return (Spare, ())


class DecodingState:
    """The texts that a batch has read, for one model; fairseq's ``incremental_state`` holds it.

    Reading is exact: every token's features are those of the pass over whole segments. As the rest of a segment is
    not known yet, the last one is taken to go on to its full length N, which matters for the look-ahead
    and for absolute positions.

    Args:
        decoder: a `MemoryDecoder` in evaluation mode.
        rows: B.
    """

    def __init__(self, decoder: Any, rows: int):
        self.decoder = decoder
        self.mem_len: int = decoder.memory.slots
        self.length: int = decoder.memory.period
        self.network = Network(decoder.memory, decoder.layers, decoder.positions)
        like = decoder.embed_tokens(
            torch.zeros(1, 1, dtype=torch.int64, device=decoder.embed_tokens.tables[0].weight.device)
        )
        self.cache: SegmentCache = decoder.memory.cache.empty(decoder.memory, rows, like)
        # The same in every step: sinusoids and their projections are computed once a text, not once a token.
        biases = decoder.positions(self.mem_len + self.length, None, like)
        self.biases: List[LayerBias] = [b._replace(causal=_laid_out(b.causal)) for b in biases]
        self.layer_step: Callable[..., Tensor] = layer_step
        self.span: Optional[int] = decoder.layers[0].self_attn.config.span
        self.seen = 0  # tokens of fairseq's generator that have been read

    def read(self, tokens: Tensor, counts: Optional[Sequence[int]] = None) -> Tensor:
        """Read ``tokens [B, k]``, of row b the first ``counts[b]`` (None: all): features ``[B, k, d]``."""
        total = tokens.size(1)
        left = list(counts) if counts is not None else [total] * tokens.size(0)
        parts, start = [], 0
        while start < total:
            room = [self.length - p.tokens for p, n in zip(self.cache.places, left, strict=True) if n > 0]
            size = min(total - start, TOKENS_AT_ONCE, *room) if room else total - start
            now = [min(n, size) for n in left]
            part = tokens[:, start : start + size]
            if room:
                parts.append(self._read_part(part, now))
            else:
                parts.append(parts[-1].new_zeros(*part.shape, parts[-1].size(-1)))
            left = [n - m for n, m in zip(left, now, strict=True)]
            start += size
        return torch.cat(parts, dim=1)

    def _read_part(self, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """As `read`, where no row crosses the end of its segment."""
        cache, decoder = self.cache, self.decoder
        x = decoder.positions.embed(decoder.embed_tokens(tokens), self.length - cache.tokens)
        self.open(x[:, :1], counts)
        active = [p for p, n in zip(cache.places, counts, strict=True) if n > 0]
        first = self.mem_len - max(p.slots for p in active)
        end = self.mem_len + max(p.tokens for p in active) + tokens.size(1)
        x = self.step(x, first, min(end, self.mem_len + self.length), self.common_column())
        cache.advance(counts, self.network)
        return x

    def open(self, first: Tensor, counts: Sequence[int]) -> None:
        """Refresh the memory of rows whose segment begins with the embeddings ``first [B, 1, d]``."""
        cache = self.cache
        groups: Dict[int, List[int]] = {}
        for row, (place, count) in enumerate(zip(cache.places, counts, strict=True)):
            if count > 0 and not place.open:
                groups.setdefault(place.slots, []).append(row)
        for slots, rows in groups.items():
            index = cache.index(rows)
            if slots > 0:
                begin = first if index is None else first[index]
                cache.open(index, slots, begin, self.network)
            for row in rows:
                cache.places[row] = cache.places[row]._replace(open=True)

    def common_column(self) -> Optional[int]:
        """The column of the next token, None unless it is every row's, with as many slots before it."""
        first, *others = self.cache.places
        same = all(p.tokens == first.tokens and p.slots == first.slots for p in others)
        return self.mem_len + first.tokens if same else None

    def step(self, x: Tensor, first: int, end: int, at: Optional[int] = None) -> Tensor:
        """Pass new embeddings ``x [B, k, d]`` through the layers, over the cache's columns ``first .. end-1``.

        Touches tensors only, and leaves each row's place as it is. *at* is the `common_column`; the same step may
        serve other places if it is left out.
        """
        cache = self.cache
        columns = self.columns(x.size(1), first, end, at)
        cache.record_embeddings(x, columns)
        for i, layer in enumerate(self.decoder.layers):
            x = self.layer_step(layer, x, cache.keys[i], cache.values[i], columns, self.biases[i], cache.record(i))
        return x

    def columns(self, new: int, first: int, end: int, at: Optional[int] = None) -> Columns:
        """Where *new* tokens stand; arguments as for `step`."""
        query = self.mem_len + self.cache.tokens.unsqueeze(1)
        if new > 1:
            query = query + torch.arange(new, device=query.device)
        last = self.mem_len + self.length - 1
        return Columns(first, end, query, self.mem_len - self.cache.slots, last, self.span, at)

    def reorder(self, order: Tensor) -> None:
        """Row i goes on from row ``order[i]``."""
        self.cache.reorder(order)

    def copy_(self, other: "DecodingState") -> None:
        """Go on from what *other* has read, in the same tensors: graphs of steps hold on to them.

        *other* is of the same decoder and sizes; the decoder's weights may have changed in place meanwhile.
        """
        self.cache.copy_(other.cache)
        for mine, new in zip((b.causal for b in self.biases), (b.causal for b in other.biases), strict=True):
            if mine.table is not None and new.table is not None:
                mine.table.copy_(new.table)
            if mine.score is not None and new.score is not None:
                mine.score.copy_(new.score)
        self.seen = other.seen


def _laid_out(bias: RelativeBias) -> RelativeBias:
    """On a CPU, distances next to each other: the product with one query reads a table a third faster so."""
    if bias.table is None or bias.table.is_cuda:
        return bias
    return bias._replace(table=bias.table.transpose(1, 2).contiguous().transpose(1, 2))


def layer_step(
    layer: Any,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    columns: Columns,
    bias: LayerBias,
    record: Record,
) -> Tensor:
    """New rows ``x [B, k, d]`` through one layer; their keys and values go into the cache.

    A function of tensors, the same for every layer, so that it is compiled once.
    """
    attn = layer.self_attn
    if record.inputs is not None:
        columns.put(record.inputs, x, 1)

    def attend(normed: Tensor) -> Tuple[Tensor, None]:
        q, k, v = attn.project(normed, normed.size(1))
        columns.put(keys, k, 2)
        columns.put(values, v, 2)
        need_normalizer = record.outputs is not None
        attended = cached_attention(q, keys, values, bias.causal, columns, need_normalizer, bias.rotation)
        if record.outputs is not None and record.normalizers is not None:
            columns.put(record.outputs, attended.output, 2)
            columns.put(record.normalizers, attended.normalizer, 2)
        return attn.merge_heads(attn.combine(q, attended.output, record.context)), None

    return layer.around(x, attend)[0]
