"""A step of one new token a row through all layers, by the fastest means there are.

Shapes: B rows, V words, d model width, n words found.
"""

from typing import Any, Dict, Optional, Tuple

import torch
from torch import Tensor, nn

from ..kernels.parts import is_plain, is_product
from ..kernels.residual import chance, is_affine
from ..layers import DecoderLayer
from ..layers.layer import FeedForward
from .found import Found
from .state import DecodingState

Rows = Tuple[Tensor, Optional[nn.LayerNorm]]  # [B, d], and the norm that they have yet to pass


def kernel_step(state: DecodingState) -> Optional["KernelStep"]:
    """The kernels' step where they are installed and do all that positions and memory want, else None.

    ``--attention-backend eager`` asks for plain operations, and the kernels' float32 would be too coarse for float64.
    """
    bias, config, record = state.biases[0].causal, state.decoder.layers[0].self_attn.config, state.cache.record(0)
    sinusoids = bias.table is not None and bias.position is not None and bias.score is None
    sinusoids = sinusoids and state.biases[0].rotation is None
    wanted = config.backend != "eager" and state.cache.keys[0].dtype.itemsize < 8
    more = record.inputs is not None or record.context is not None
    if not wanted or more or not sinusoids or config.span is not None:
        return None
    if not all(map(_is_plain, state.decoder.layers)):
        return None
    try:
        return KernelStep(state)
    except ImportError:  # no Triton
        return None


def _is_plain(layer: DecoderLayer) -> bool:
    """Whether its parameters alone say what a layer's parts compute."""
    if not is_plain(layer.feed_forward, FeedForward):
        return False
    attention, feed_forward = layer.self_attn, layer.feed_forward
    return (
        is_product(attention.qkv_proj)
        and is_product(attention.out_proj)
        and all(is_plain(part, nn.Linear) for part in (feed_forward.fc1, feed_forward.fc2))
        and all(is_affine(norm) for norm in (layer.self_attn_layer_norm, layer.final_layer_norm))
        and all(chance(dropout) == 0 for dropout in (layer.dropout, feed_forward.activation_dropout))
    )


class KernelStep:
    """As `DecodingState.step` for one token a row, by five launches a layer. Rows may stand anywhere.

    Touches tensors only, and leaves each row's place as it is.
    """

    def __init__(self, state: DecodingState):
        from ..kernels.row_kernels import normalized, row_map
        from .attention_kernel import Parts, cached_attention
        from .word_kernels import embed

        self.state = state
        self._attention, self._map, self._normalized, self._embed = cached_attention, row_map, normalized, embed
        self._parts = Parts.empty(state.cache.keys[0])

    def __call__(self, words: Tensor) -> Tensor:
        """Features ``[B, 1, d]`` of words ``[B, 1]``."""
        return self._normalized(*self._through_layers(words)).unsqueeze(1)

    def scores(self, words: Tensor) -> Tensor:
        """What the decoder's output layer makes of the features of words ``[B, 1]``, a full softmax in float32."""
        output = self.state.decoder.output
        rows, norm = self._through_layers(words)
        if output is None or len(output.projections):
            return self.state.decoder.output_layer(self._normalized(rows, norm).unsqueeze(1))
        return self._map(rows, output.weights[0], output.biases[0], norm=norm, dtype=torch.float32).unsqueeze(1)

    def _through_layers(self, words: Tensor) -> Rows:
        rows: Rows = (self._embedded(words), None)
        for i, layer in enumerate(self.state.decoder.layers):
            rows = self._layer(i, layer, *rows)
        return rows

    def _embedded(self, words: Tensor) -> Tensor:
        """The words' embeddings ``[B, d]``, recorded as the memory wants it."""
        state, embedding = self.state, self.state.decoder.embed_tokens
        kept = state.cache.kept_embeddings()
        if len(embedding.bands.tables) == 1 and not len(embedding.projections):
            return self._embed(
                words, embedding.tables[0].weight, embedding.scale, state.cache.tokens, state.mem_len, kept
            )
        x = embedding(words)
        if kept is not None:
            state.columns(1, 0, state.mem_len + state.length).put(kept, x, 1)
        return x[:, 0]

    def _layer(self, i: int, layer: Any, rows: Tensor, norm: Optional[nn.LayerNorm]) -> Rows:
        """One layer. What normalises its rows after it, with the norm behind, is the next one's map."""
        state, attn, feed_forward = self.state, layer.self_attn, layer.feed_forward
        cache, record = state.cache, state.cache.record(i)
        pre_norm = layer.config.normalize_before
        first, second = layer.self_attn_layer_norm, layer.final_layer_norm
        qkv = self._map(rows, attn.qkv_proj.weight, norm=first if pre_norm else norm)
        read = self._attention(
            qkv,
            cache.keys[i],
            cache.values[i],
            state.biases[i].causal,
            cache.tokens,
            cache.slots,
            state.mem_len,
            self._parts,
            record.outputs,
            record.normalizers,
        )
        x = self._map(read, attn.out_proj.weight, residual=rows, residual_norm=norm)
        relu = layer.config.activation_fn == "relu"
        into, out = feed_forward.fc1, feed_forward.fc2
        hidden = self._map(x, into.weight, into.bias, norm=second if pre_norm else first, relu=relu)
        if not relu:
            hidden = feed_forward.activation_fn(hidden)
        x = self._map(hidden, out.weight, out.bias, residual=x, residual_norm=None if pre_norm else first)
        return x, None if pre_norm else second


class KernelDrawing:
    """Adjusts, draws and notes the next words by one launch; `sampler.py` says what the arguments mean."""

    def __init__(self, temperature: float, added: Optional[Tensor], top_k: int, top_p: float, like: Tensor):
        from .word_kernels import draw_next

        self._draw_next = draw_next
        self._options: Dict[str, Any] = {"temperature": temperature, "added": added, "top_k": top_k, "top_p": top_p}
        self._seed = torch.zeros(1, dtype=torch.int64, device=like.device)

    @staticmethod
    def most_words() -> int:
        from .word_kernels import MOST_WORDS

        return MOST_WORDS

    def reseed(self) -> None:
        """Take other random numbers from here on: a position in what has been found has the same ones in every step."""
        self._seed.random_()

    def __call__(self, scores: Tensor, words: Tensor, tokens: Tensor, found: Found) -> None:
        """As `word_kernels.draw_next`."""
        space = torch.empty_like(scores)
        self._draw_next(scores, words, tokens, found, self._seed, space, **self._options)
