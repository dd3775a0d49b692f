"""A step of one new token a sequence through all layers, by the fastest means there are.

Shapes: B sequences, V words, H heads, D size of a head, d model width, n words drawn.
"""

from functools import cache
from typing import Callable, Optional, Tuple

import torch
from torch import Tensor, nn

from ..attention import Attended, RelativeBias
from ..kernels.module_tree import is_plain, is_product
from ..kernels.residual import chance, is_affine
from ..layers import DecoderLayer, SelfAttention
from ..layers.heads import split_heads
from ..layers.layer import FeedForward
from ..positions import LayerBias, PositionEncoding
from .attention import Columns
from .cache import LayerCache
from .drawn import Drawn
from .state import DecodingState

LaterColumns = Callable[[], Columns]  # computed in the first call
PendingNorm = Tuple[Tensor, Optional[nn.LayerNorm]]  # [B, d], and the norm that they have yet to pass


def kernel_step(state: DecodingState) -> Optional["KernelStep"]:
    """Return the kernels' step where they are installed and support the positions, else None.

    Positions that rotate queries and keys, are counted in the text, or are added to embeddings, use plain operations.
    ``--attention-backend eager`` asks for plain operations, and the kernels' float32 would be too coarse for float64.
    """
    backend, positions = state.layers[0].self_attn.config.backend, state.decoder.positions
    wanted = backend != "eager" and state.cache.layers[0].keys.dtype.itemsize < 8
    by_distance = type(positions).embed is PositionEncoding.embed and all(
        bias.rotation is None and bias.counted is None for bias in state.biases
    )
    if not wanted or not by_distance:
        return None
    if not all(map(_is_plain, state.layers)):
        return None
    try:
        return KernelStep(state)
    except ImportError:  # no Triton
        return None


def _is_plain(layer: DecoderLayer) -> bool:
    """Return whether a layer's parameters alone determine its results."""
    if not is_plain(layer.feed_forward, FeedForward):
        return False
    attention, feed_forward = layer.self_attn, layer.feed_forward
    return (
        is_product(attention.qkv_proj)
        and is_product(attention.out_proj)
        and all(is_plain(linear, nn.Linear) for linear in (feed_forward.fc1, feed_forward.fc2))
        and all(is_affine(norm) for norm in (layer.self_attn_layer_norm, layer.final_layer_norm))
        and all(chance(dropout) == 0 for dropout in (layer.dropout, feed_forward.activation_dropout))
    )


class KernelStep:
    """Computes `DecodingState.step` for one token a sequence, by five launches a layer; positions may differ.

    Touches tensors only, and leaves each sequence's position as it is. A memory whose layers keep or change their
    inputs, or add something to read-outs, uses plain operations between the launches.
    """

    def __init__(self, state: DecodingState):
        from ..kernels.row_kernels import normalized, row_map
        from .attention_kernel import Workspace, cached_attention
        from .word_kernels import embed

        self.state = state
        self._attention, self._map, self._normalized, self._embed = cached_attention, row_map, normalized, embed
        self._workspace = Workspace.empty(state.cache.layers[0].keys)

    def __call__(self, words: Tensor) -> Tensor:
        """Return features ``[B, 1, d]`` of words ``[B, 1]``."""
        return self._normalized(*self._through_layers(words)).unsqueeze(1)

    def scores(self, words: Tensor) -> Tensor:
        """Return the decoder's output for words ``[B, 1]``; of a full softmax the scores in float32."""
        output = self.state.decoder.output
        rows, norm = self._through_layers(words)
        if output is None or len(output.projections):
            return self.state.decoder.output_layer(self._normalized(rows, norm).unsqueeze(1))
        return self._map(rows, output.weights[0], output.biases[0], norm=norm, dtype=torch.float32).unsqueeze(1)

    def _through_layers(self, words: Tensor) -> PendingNorm:
        state = self.state
        # Most memories need no columns, whose tensors would take two launches.
        columns = cache(lambda: state.columns(1, 0, state.mem_len + state.length))
        pending: PendingNorm = (self._embedded(words, columns), None)
        for layer, cached, bias in zip(state.layers, state.cache.layers, state.biases, strict=True):
            pending = self._layer(layer, cached, bias, columns, *pending)
        if state.cache.keeps_features:
            pending = self._normalized(*pending), None
            state.cache.store_features(pending[0].unsqueeze(1), columns())
        return pending

    def _embedded(self, words: Tensor, columns: LaterColumns) -> Tensor:
        """Return the words' embeddings ``[B, d]``, and store them if the memory needs them."""
        state, embedding = self.state, self.state.decoder.embed_tokens
        if len(embedding.bands.tables) == 1 and not len(embedding.projections):
            buffer = state.cache.embeddings_buffer()
            return self._embed(words, embedding.table(0), embedding.scale, state.cache.tokens, state.mem_len, buffer)
        x: Tensor = embedding(words)
        state.cache.store_embeddings(x, columns())
        return x[:, 0]

    def _layer(
        self,
        layer: DecoderLayer,
        cached: LayerCache,
        bias: LayerBias,
        columns: LaterColumns,
        rows: Tensor,
        norm: Optional[nn.LayerNorm],
    ) -> PendingNorm:
        """Run one layer. Its final norm is returned unapplied; the next layer's first product applies it."""
        feed_forward, pre_norm = layer.feed_forward, layer.config.normalize_before
        first, second = layer.self_attn_layer_norm, layer.final_layer_norm
        if cached.keeps_inputs or cached.changes_inputs or cached.joins_heads:
            entering = cached.enter(layer.self_attn, self._normalized(rows, norm).unsqueeze(1))
            cached.store_inputs(entering, columns())
            rows, norm = entering.squeeze(1), None
        qkv = self._map(rows, layer.self_attn.qkv_proj.weight, norm=first if pre_norm else norm)
        heads = self._heads(layer, cached, bias.causal, columns, qkv)
        if cached.joins_heads:
            normed = self._normalized(rows, first if pre_norm else norm).unsqueeze(1)
            by_head = heads.unflatten(1, (layer.self_attn.config.heads, 1, -1))
            heads = cached.join(layer.self_attn, normed, by_head).squeeze(2).flatten(1)
        x = self._map(heads, layer.self_attn.out_proj.weight, residual=rows, residual_norm=norm)
        relu = layer.config.activation_fn == "relu"
        into, out = feed_forward.fc1, feed_forward.fc2
        hidden = self._map(x, into.weight, into.bias, norm=second if pre_norm else first, relu=relu)
        if not relu:
            hidden = feed_forward.activation_fn(hidden)
        x = self._map(hidden, out.weight, out.bias, residual=x, residual_norm=None if pre_norm else first)
        return x, None if pre_norm else second

    def _heads(
        self, layer: DecoderLayer, cached: LayerCache, bias: RelativeBias, columns: LaterColumns, qkv: Tensor
    ) -> Tensor:
        """Attend with new queries, keys and values ``[B, 3 H D]``, and combine the read-outs: ``[B, H D]`` or wider."""
        state, config, past = self.state, layer.self_attn.config, cached.attended()
        if type(layer.self_attn).prepare is not SelfAttention.prepare:
            q, k, v = split_heads(qkv.unsqueeze(1), 3, config.heads)
            qkv = torch.cat([t.flatten(1) for t in (*layer.self_attn.prepare(q, k), v)], dim=1)
        read_out = self._attention(
            qkv,
            cached.keys,
            cached.values,
            bias,
            state.cache.tokens,
            state.cache.slots,
            state.mem_len,
            self._workspace,
            past,
            state.span,
            state.nearest,
        )
        if type(cached).combine is LayerCache.combine:
            return read_out
        shape = (len(qkv), config.heads, 1, config.head_dim)
        q = qkv[:, : read_out.size(1)].view(shape)
        normalizer = read_out.new_empty(0) if past is None else columns().take(past.normalizer)
        heads = cached.combine(layer.self_attn, q, Attended(read_out.view(shape), normalizer))
        return heads.squeeze(2).flatten(1)


class KernelDrawing:
    """Adjusts, draws and stores the next words by one launch; `drawing.py` says what the arguments mean."""

    def __init__(self, temperature: float, added: Optional[Tensor], top_k: int, top_p: float, like: Tensor):
        from .word_kernels import draw_next

        self._draw_next = draw_next
        self._temperature, self._added, self._top_k, self._top_p = temperature, added, top_k, top_p
        self._seed = torch.zeros(1, dtype=torch.int64, device=like.device)

    @staticmethod
    def most_words() -> int:
        from .word_kernels import MOST_WORDS

        return MOST_WORDS

    def reseed(self) -> None:
        """Take other random numbers from here on.

        With one seed, a position among the drawn words always gets the same random numbers.
        """
        self._seed.random_()

    def __call__(self, scores: Tensor, words: Tensor, tokens: Tensor, drawn: Drawn) -> None:
        """Draw the next words as `word_kernels.draw_next` does."""
        space = torch.empty_like(scores)
        self._draw_next(
            scores, words, tokens, drawn, self._seed, space, self._temperature, self._added, self._top_k, self._top_p
        )
