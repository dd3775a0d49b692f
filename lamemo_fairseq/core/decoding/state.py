"""Token-by-token decoding: the texts read so far as a cache, and new tokens read into it.

Shapes: B sequences, N tokens of a segment, M memory slots, k new tokens, d model width.
"""

from typing import Callable, Dict, List, Optional, Sequence, Tuple, cast

import torch
from torch import Tensor

from ..attention import RelativeBias
from ..kernels.copies import copy_all
from ..kernels.padded import WideRows
from ..layers import DecoderLayer
from ..positions import LayerBias
from .attention import Columns, cached_attention
from .cache import AnyCache, AnyMemory, LayerCache, SequencePosition
from .interfaces import Decoder, Network, layers_of

# Longer prompts are read in chunks of this size, which bounds the scores held at a time.
TOKENS_AT_ONCE = 256

LayerStep = Callable[[DecoderLayer, Tensor, LayerCache, Columns, LayerBias], Tensor]


class DecodingState:
    """The texts that a batch has read with one model.

    Reading is exact: every token's features are those of the pass over whole segments. The rest of the last segment is
    not known yet. It counts as having the full length N, which the look-ahead and absolute positions depend on.

    Args:
        decoder: a model in evaluation mode.
        batch_size: B.
    """

    def __init__(self, decoder: Decoder, batch_size: int):
        self.decoder = decoder
        memory = cast(AnyMemory, decoder.memory)
        self.mem_len = memory.slots
        self.length = memory.period
        self.layers = layers_of(decoder)
        self.network = Network(memory, self.layers, decoder.positions)
        device = decoder.embed_tokens.table(0).device
        like = decoder.embed_tokens(torch.zeros(1, 1, dtype=torch.int64, device=device))
        self.cache: AnyCache = memory.cache.empty(memory, batch_size, like)
        if decoder.positions.reads_words:
            self.cache.words = self.cache.tokens.new_zeros(batch_size, self.mem_len + self.length)
        self.cache.check(batch_size, len(self.layers), self.mem_len + self.length)
        if self.has_read:  # of a memory with slots from the beginning
            self.cache.sync()
        # Biases are the same in every step: sinusoids and their projections are computed once a text, not once a token.
        biases = decoder.positions(self.mem_len + self.length, None, like)
        self.biases: List[LayerBias] = [
            layer.self_attn.own_bias(bias._replace(causal=_laid_out(bias.causal)))
            for layer, bias in zip(self.layers, biases, strict=True)
        ]
        self.layer_step: LayerStep = layer_step
        self.span, self.nearest = _seen_by_all(self.layers)

    def read(self, tokens: Tensor, counts: Optional[Sequence[int]] = None) -> Tensor:
        """Read ``tokens [B, k]``, of sequence b the first ``counts[b]`` (None: all).

        Returns:
            Features ``[B, k, d]``; those beyond a sequence's count mean nothing.
        """
        total = tokens.size(1)
        left = list(counts) if counts is not None else [total] * tokens.size(0)
        features, start = [], 0
        while start < total:
            room = [self.length - p.tokens for p, n in zip(self.cache.positions, left, strict=True) if n > 0]
            size = min(total - start, TOKENS_AT_ONCE, *room) if room else total - start
            now = [min(n, size) for n in left]
            chunk = tokens[:, start : start + size]
            if room:
                features.append(self._read_chunk(chunk, now))
            else:
                features.append(features[-1].new_zeros(*chunk.shape, features[-1].size(-1)))
            left = [n - m for n, m in zip(left, now, strict=True)]
            start += size
        return torch.cat(features, dim=1)

    @property
    def has_read(self) -> bool:
        """Return whether a sequence has read something."""
        return any(position != SequencePosition() for position in self.cache.positions)

    def begin_after(self, parts: Sequence[Tuple[Tensor, ...]]) -> None:
        """Begin after whole segments that have filled the memory; *parts* are those of its layers."""
        cast(AnyMemory, self.decoder.memory).fill_cache(self.cache, parts, self.layers)
        self.cache.positions = [SequencePosition(slots=self.mem_len)] * len(self.cache.positions)
        self.cache.sync()

    def _read_chunk(self, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """Read tokens as `read` does, where no sequence crosses the end of its segment."""
        cache, x = self.cache, self.embed(tokens, self.common_column())
        self.refresh(x[:, :1], counts)
        active = [p for p, n in zip(cache.positions, counts, strict=True) if n > 0]
        first = self.mem_len - max(p.slots for p in active)
        end = self.mem_len + max(p.tokens for p in active) + tokens.size(1)
        x = self.step(x, first, min(end, self.mem_len + self.length), self.common_column())
        cache.advance(counts, self.network)
        return x

    def embed(self, tokens: Tensor, at: Optional[int] = None) -> Tensor:
        """Return the embeddings ``[B, k, d]`` of new ``tokens [B, k]``, and keep the words if positions depend on them.

        *at* is as for `step`. Tokens may be embedded again before they are read.
        """
        cache, decoder = self.cache, self.decoder
        if cache.words is not None:
            self.columns(tokens.size(1), 0, self.mem_len + self.length, at).write(cache.words, tokens, 1)
        return decoder.positions.embed(decoder.embed_tokens(tokens), self.length - cache.tokens)

    def refresh(self, first: Tensor, counts: Sequence[int]) -> None:
        """Refresh the memory of sequences whose segment begins with the embeddings ``first [B, 1, d]``."""
        cache = self.cache
        groups: Dict[int, List[int]] = {}
        for sequence, (position, count) in enumerate(zip(cache.positions, counts, strict=True)):
            if count > 0 and not position.ready:
                groups.setdefault(position.slots, []).append(sequence)
        for slots, sequences in groups.items():
            index = cache.index(sequences)
            if slots > 0:
                begin = first if index is None else first[index]
                cache.refresh(index, slots, begin, self.network)
            for sequence in sequences:
                cache.positions[sequence] = cache.positions[sequence]._replace(ready=True)

    def common_column(self) -> Optional[int]:
        """Return the next token's column, None unless all sequences share it and have equally many slots."""
        first, *others = self.cache.positions
        same = all(p.tokens == first.tokens and p.slots == first.slots for p in others)
        return self.mem_len + first.tokens if same else None

    def step(self, x: Tensor, first: int, end: int, at: Optional[int] = None) -> Tensor:
        """Pass new embeddings ``x [B, k, d]`` through the layers, over the cache's columns ``first .. end-1``.

        Touches tensors only, and leaves each sequence's position as it is. *at* is the `common_column`; a step without
        it serves any positions.
        """
        cache = self.cache
        columns = self.columns(x.size(1), first, end, at)
        if cache.words is not None:
            columns.count(self.decoder.positions.counts(cache.words))
        cache.store_embeddings(x, columns)
        for layer, cached, bias in zip(self.layers, cache.layers, self.biases, strict=True):
            x = self.layer_step(layer, x, cached, columns, bias)
        cache.store_features(x, columns)
        return x

    def columns(self, new: int, first: int, end: int, at: Optional[int] = None) -> Columns:
        """Return the columns of *new* tokens; arguments as for `step`."""
        query = self.mem_len + self.cache.tokens.unsqueeze(1)
        if new > 1:
            query = query + torch.arange(new, device=query.device)
        last = self.mem_len + self.length - 1
        return Columns(first, end, query, self.mem_len - self.cache.slots, last, self.span, at, self.nearest)

    def reorder(self, order: Tensor) -> None:
        """Let sequence i go on from sequence ``order[i]``."""
        self.cache.reorder(order)

    def copy_(self, other: "DecodingState") -> None:
        """Go on from the tokens that *other* has read, in the same tensors: graphs of steps refer to them.

        *other* is of the same decoder and sizes; the decoder's weights may have changed in place meanwhile.
        """
        self.cache.copy_(other.cache)
        for mine, new in zip(map(_tables, self.biases), map(_tables, other.biases), strict=True):
            changed = [pair for pair in zip(mine, new, strict=True) if pair[0].data_ptr() != pair[1].data_ptr()]
            copy_all([tensor for tensor, _ in changed], [fresh for _, fresh in changed])  # others are parameters


def _seen_by_all(layers: Sequence[DecoderLayer]) -> Tuple[Optional[int], int]:
    """Return the span and the nearest distance of the keys that every layer sees, as columns are those of all layers.

    Raises:
        ValueError: layers of a user's own memory see others.
    """
    seen = {(layer.self_attn.span, layer.self_attn.nearest): type(layer.self_attn).__name__ for layer in layers}
    if len(seen) > 1:
        raise ValueError(
            f"{' and '.join(seen.values())} differ in span or nearest, and decoding token by token has one of each: "
            "give all layers the same"
        )
    (pair,) = seen
    return pair


def _tables(bias: LayerBias) -> List[Tensor]:
    """Return the tensors of a layer's positions, of which some are computed from parameters."""
    tables = [*bias.causal, None if bias.counted is None else bias.counted.past]
    return [table for table in tables if table is not None]


def _laid_out(bias: RelativeBias) -> RelativeBias:
    """Lay out a table with distances contiguous on a CPU: the product with one query is then a third faster."""
    if bias.table is None or bias.table.is_cuda:
        return bias
    return bias._replace(table=bias.table.transpose(1, 2).contiguous().transpose(1, 2))


def layer_step(layer: DecoderLayer, x: Tensor, cached: LayerCache, columns: Columns, bias: LayerBias) -> Tensor:
    """Pass the rows ``x [B, k, d]`` of new tokens through one layer; their keys and values go into its cache.

    A function of tensors, the same for every layer, so that it is compiled once.
    """
    attention, past = layer.self_attn, cached.attended()
    x = cached.enter(attention, x)
    cached.store_inputs(x, columns)

    def attend(normed: Tensor) -> Tuple[WideRows, None]:
        q, k, v = attention.project(normed, normed.size(1))
        columns.write(cached.keys, k, 2)
        columns.write(cached.values, v, 2)
        attended = cached_attention(
            q, cached.keys, cached.values, bias.causal, columns, past is not None, bias.rotation, bias.counted
        )
        if past is not None:
            columns.write(past.output, attended.output, 2)
            columns.write(past.normalizer, attended.normalizer, 2)
        heads = cached.combine(attention, q, attended)
        return attention.merge_heads(cached.join(attention, normed, heads)), None

    return layer.around(x, attend)[0]
