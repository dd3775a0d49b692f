"""Token-by-token decoding: the texts read so far as a cache, and new tokens read into it.

Shapes: B rows, N tokens of a segment, M memory slots, k new tokens, d model width.
"""

from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..attention import RelativeBias
from ..attention.cached import cached_attention
from ..memory.incremental import Network, Record, SegmentCache, put

# Longer prompts are read in parts of this size, which bounds the scores held at a time.
TOKENS_AT_ONCE = 256


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
        like = decoder.embed_tokens(torch.zeros(1, 1, dtype=torch.int64, device=decoder.dictionary_version.device))
        self.cache: SegmentCache = decoder.memory.cache.empty(decoder.memory, rows, like)
        # The same in every step: sinusoids and their projections are computed once a text, not once a token.
        self.biases: List[RelativeBias] = [b.causal for b in decoder.positions(self.mem_len + self.length, None, like)]
        self.layer_step: Callable[..., Tensor] = layer_step
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
        x = self.step(x, first, min(end, self.mem_len + self.length))
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

    def step(self, x: Tensor, first: int, end: int) -> Tensor:
        """Pass new embeddings ``x [B, k, d]`` through the layers, over the cache's columns ``first .. end-1``.

        Touches tensors only, and leaves each row's place as it is.
        """
        cache = self.cache
        query = self.mem_len + cache.tokens.unsqueeze(1) + torch.arange(x.size(1), device=x.device)
        # Rows that are padded here may reach past their segment: what they write is never read.
        column = query.clamp(max=self.mem_len + self.length - 1)
        oldest = self.mem_len - cache.slots
        cache.record_embeddings(x, column)
        for i, layer in enumerate(self.decoder.layers):
            columns = (cache.keys[i], cache.values[i], column, slice(first, end))
            x = self.layer_step(layer, x, *columns, self.biases[i], query, oldest, cache.record(i))
        return x

    def reorder(self, order: Tensor) -> None:
        """Row i goes on from row ``order[i]``."""
        self.cache.reorder(order)


def layer_step(
    layer: Any,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    column: Tensor,
    looked_at: slice,
    bias: RelativeBias,
    query: Tensor,
    oldest: Tensor,
    record: Record,
) -> Tensor:
    """New rows ``x [B, k, d]`` through one layer; their keys and values go into *column* ``[B, k]`` of the cache.

    A function of tensors, the same for every layer, so that it is compiled once.
    """
    attn = layer.self_attn
    if record.inputs is not None:
        put(record.inputs, x, column, 1)

    def attend(normed: Tensor) -> Tuple[Tensor, None]:
        q, k, v = attn.project(normed, normed.size(1))
        put(keys, k, column, 2)
        put(values, v, column, 2)
        seen = (keys[:, :, looked_at], values[:, :, looked_at])
        span = attn.config.span
        attended = cached_attention(q, *seen, bias, query, oldest, looked_at.start, span, record.outputs is not None)
        if record.outputs is not None and record.normalizers is not None:
            put(record.outputs, attended.output, column, 2)
            put(record.normalizers, attended.normalizer, column, 2)
        return attn.merge_heads(attn.combine(q, attended.output, record.context)), None

    return layer.around(x, attend)[0]
