"""The model: tokens and memory in, features and memory out.

Shapes: B streams, N tokens of a segment, T tokens of a text, V words, d model width.
"""

import logging
from dataclasses import replace
from typing import Dict, Iterable, List, Mapping, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from .config import ModelConfig
from .diagonal import Diagonals
from .graphs import SegmentGraphs
from .kernels.padded import made_once
from .layers import AttentionConfig, DecoderLayer, LayerConfig
from .layers.vocabulary import AdaptiveSoftmax, Bands, FullSoftmax, WordEmbedding
from .memory import MEMORIES, Memory, MemoryConfig, MemoryOptions, MemoryState, Passage
from .memory.base import last_rows
from .memory.checks import check_fields, check_parts, check_passage, check_unchanged, versions
from .memory.groups import GroupedState, read_groups
from .positions import POSITIONS, PositionConfig, PositionEncoding
from .segments import SegmentReader

logger = logging.getLogger(__name__)

_OF_MEMORY = ("memory.", "positions.ahead_")  # names of weights that only a memory uses


class MemoryDecoder(nn.Module):
    """Embeddings, layers, memory and output layer, chosen by name: the base of models."""

    def __init__(self, config: ModelConfig):
        nn.Module.__init__(self)  # not super(): a host's class with other arguments may come next
        self.config = config
        self.segment_length = config.segment_length
        self.graphs = SegmentGraphs(config.own_options.cycle) if config.cuda_graphs else None
        self.diagonals = Diagonals(config.reading_order)
        self._gradients_seen = False
        # The order of the modules is the order in which they draw random numbers.
        self.embed_tokens = _embedding(config)
        self.dropout = nn.Dropout(config.dropout)
        self.memory = _memory(config)
        self.positions = _positions(config, self.memory)
        for part in (self.memory, self.positions):
            check_parts(part)
        self.layers = _layers(config, self.memory)
        self.output: Optional[FullSoftmax] = None
        self.adaptive_softmax: Optional[AdaptiveSoftmax] = None
        if config.cutoffs:
            self.adaptive_softmax = _adaptive_softmax(config, self.embed_tokens)
        else:
            self.output = _full_softmax(config, self.embed_tokens)
        self.reset_parameters()

    def read(self, tokens: Tensor, state: Optional[MemoryState] = None, lengths: Optional[Tensor] = None) -> Passage:
        """Read one segment.

        Args:
            tokens: ``[B, N]`` word ids.
            state: the memory before the segment, left as it is; None for an empty one. `advance` clears single streams.
            lengths: ``[B]`` tokens that are not padding, which is on the right; None if none is.

        Returns:
            Features ``[B, N, d]`` after the final dropout, the memory after the segment, and the memory's losses.
        """
        if isinstance(state, GroupedState):
            return read_groups(self.read_segment, tokens, state, lengths)
        if self.graphs is not None and lengths is None:
            return self.graphs(self.read_segment, self, tokens, state)
        return self.read_segment(tokens, state, lengths)

    def read_segment(
        self, tokens: Tensor, state: Optional[MemoryState] = None, lengths: Optional[Tensor] = None
    ) -> Passage:
        """Read one segment as `read` does, without a CUDA graph."""
        x = self.embed(tokens, lengths)
        # The memory of a resumed run is still on the host.
        before = self._initial_state(x) if state is None else state.map(lambda t: t.to(x.device))
        words = self._words_of_rows(tokens, state) if self.positions.reads_words else None
        positions = self.positions if words is None else self.positions.of(words)
        unchanged = versions(before)
        with made_once(self.memory.carries_gradient):  # of an update's segments, which come in turn
            passage: Passage = self.memory(x, before, self.layers, positions, lengths)
        check_unchanged(self.memory, before, unchanged)
        check_passage(self.memory, passage, x)
        if words is None:
            return passage._replace(features=self.dropout(passage.features))
        after = replace(passage.state, words=last_rows(words, self.memory.slots) if self.memory.slots else None)
        return passage._replace(features=self.dropout(passage.features), state=after)

    def _initial_state(self, x: Tensor) -> MemoryState:
        state: MemoryState = self.memory.initial_state(x)
        check_fields(self.memory, state, x, "initial_state")
        return state

    def embed(self, tokens: Tensor, lengths: Optional[Tensor] = None) -> Tensor:
        """Return what goes into the first layer, ``[B, N, d]``, for the ``tokens [B, N]`` of a segment."""
        embedded: Tensor = self.dropout(self.positions.embed(self.embed_tokens(tokens), lengths))
        return embedded

    def segments(self, state: Optional[MemoryState] = None) -> SegmentReader:
        """Return a reader of consecutive segments, which reads on the anti-diagonal where ``reading_order`` lets it."""
        return SegmentReader(self, state)

    def _words_of_rows(self, tokens: Tensor, state: Optional[MemoryState]) -> Tensor:
        """Return the words ``[B, m + N]`` of the slots and of ``tokens [B, N]``."""
        if state is None or self.memory.slots == 0:
            return tokens
        if state.words is None:
            raise ValueError(
                f"--position-encoding {self.config.position_encoding} needs the words of the memory slots, and this "
                "memory is of a model with another one: begin with an empty memory"
            )
        return torch.cat([state.words.to(tokens.device), tokens], dim=1)

    def read_text(self, tokens: Tensor, lengths: Optional[Tensor] = None) -> Tensor:
        """Read whole texts of any length from an empty memory: features ``[B, T, d]`` of ``tokens [B, T]``.

        ``lengths [B]`` counts the tokens that are not padding, which is on the right; None if none is.
        """
        features: List[Tensor] = []
        state: Optional[MemoryState] = None
        for start in range(0, tokens.size(1), self.segment_length):
            segment = tokens[:, start : start + self.segment_length]
            left = None if lengths is None else (lengths - start).clamp(0, segment.size(1))
            passed, state, _ = self.read_segment(segment, state, left)
            features.append(passed)
        return torch.cat(features, dim=1)

    def loss(self, features: Tensor, target: Tensor) -> Tensor:
        """Return the sum of the negative log-likelihoods of ``target [B, N]``, a scalar in float32 or wider."""
        return self.loss_layer.loss(features, target)

    def log_probs(self, features: Tensor) -> Tensor:
        """Return log-probabilities ``[B, N, V]`` of features ``[B, N, d]``, in float32 or wider."""
        if self.adaptive_softmax is not None:
            return self.adaptive_softmax.log_probs(features)
        scores = self.output_layer(features)
        return torch.log_softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))

    def target_log_probs(self, features: Tensor, target: Tensor) -> Tensor:
        """Return log-probabilities ``[B, N]`` of the words ``target [B, N]``, in float32 or wider."""
        return self.loss_layer.target_log_probs(features, target)

    def output_layer(self, features: Tensor) -> Tensor:
        """Return scores ``[B, N, V]`` of features ``[B, N, d]``; an adaptive softmax leaves features as they are."""
        return features if self.output is None else self.output(features)

    @property
    def loss_layer(self) -> Union[FullSoftmax, AdaptiveSoftmax]:
        """The output layer that computes losses without all scores at once."""
        layer = self.adaptive_softmax if self.output is None else self.output
        assert layer is not None
        return layer

    def tell_without_gradient(self) -> None:
        """Warn, after the first backward pass, of a parameter to train that it has given no gradient."""
        if self._gradients_seen:
            return
        self._gradients_seen = True
        names = [name for name, p in self.named_parameters() if p.requires_grad and p.grad is None]
        if names:
            logger.warning(
                "%s: no gradient in the first update; it may never be trained, and several ranks would wait for it. "
                "Let features depend on it, as where slots are read, or add it by with_unread (core/memory/unread.py)",
                " and ".join(names) if len(names) < 3 else f"{names[0]}, one of {len(names)} such weights,",
            )

    def weights_left_out(self, names: Iterable[str], prefix: str = "") -> List[str]:
        """Return those weights by name that only a memory uses, if this model has none, and say so.

        So a model that was trained with memory is evaluated without it.
        """
        of_memory = () if self.memory.remembers else tuple(prefix + name for name in _OF_MEMORY)
        unused = [name for name in names if name.startswith(of_memory)]
        if unused:
            logger.info("--memory none leaves out weights of the saved model: %s", ", ".join(unused))
        return unused

    def weights_of_two_values(self, weights: Mapping[str, Tensor], prefix: str = "") -> Optional[Tuple[str, str]]:
        """Return the first two names of one weight, such as of tied embeddings, that *weights* give two values."""
        first: Dict[int, str] = {}
        for name, weight in self.state_dict(prefix=prefix, keep_vars=True).items():
            other = first.setdefault(id(weight), name)
            both = name in weights and other in weights and weights[name] is not weights[other]
            if both and not torch.equal(weights[name], weights[other]):
                return name, other
        return None

    def reset_parameters(self) -> None:
        """Draw weights N(0, .02), layer-norm gains N(1, .02), biases 0; positions and memories draw their own."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.normal_(module.weight, mean=1.0, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, (WordEmbedding, FullSoftmax, AdaptiveSoftmax)):
                module.reset_parameters()
        self.memory.reset_parameters()


def _embedding(config: ModelConfig) -> WordEmbedding:
    width = config.decoder_input_dim or config.decoder_embed_dim
    cutoffs, factor = (config.cutoffs, config.adaptive_softmax_factor) if config.adaptive_input else ([], 1.0)
    return WordEmbedding(Bands(config.vocabulary_size, width, cutoffs, factor), config.decoder_embed_dim)


def _memory(config: ModelConfig) -> Memory[MemoryState, MemoryOptions]:
    return MEMORIES[config.memory](
        MemoryConfig(
            mem_len=config.slots,
            layers=config.decoder_layers,
            heads=config.decoder_attention_heads,
            head_dim=config.head_dim,
            embed_dim=config.decoder_embed_dim,
            segment_length=config.segment_length,
            bptt_segments=config.bptt_segments,
            options=config.own_options,
            dropout=config.dropout,
        )
    )


def _positions(config: ModelConfig, memory: Memory[MemoryState, MemoryOptions]) -> PositionEncoding:
    return POSITIONS[config.position_encoding](
        PositionConfig(
            layers=config.decoder_layers,
            embed_dim=config.decoder_embed_dim,
            heads=config.decoder_attention_heads,
            head_dim=config.head_dim,
            looks_ahead=memory.looks_ahead,
            first_ahead=memory.first_ahead,
            trained_distances=memory.slots + memory.period,
            score_scale=memory.score_scale,
            clamp_len=config.clamp_len,
            dropout=config.dropout,
            sentence_ends=config.sentence_ends,
            paragraph_ends=config.paragraph_ends,
        )
    )


def _layers(config: ModelConfig, memory: Memory[MemoryState, MemoryOptions]) -> nn.ModuleList:
    attention = AttentionConfig(
        embed_dim=config.decoder_embed_dim,
        heads=config.decoder_attention_heads,
        head_dim=config.head_dim,
        dropout=config.attention_dropout,
        span=memory.slots if config.same_length else None,
        mem_len=config.slots,
        backend=config.attention_backend,
        counted=POSITIONS[config.position_encoding].reads_words,
        options=config.own_options,
        memory=config.memory,
    )
    layer = LayerConfig(
        embed_dim=config.decoder_embed_dim,
        ffn_dim=config.decoder_ffn_embed_dim,
        dropout=config.dropout,
        activation_dropout=config.dropout if config.activation_dropout is None else config.activation_dropout,
        activation_fn=config.activation_fn,
        normalize_before=config.decoder_normalize_before,
        checkpoint_activations=config.checkpoint_activations,
    )
    return nn.ModuleList(DecoderLayer(layer, memory.attention_of(n)(attention)) for n in range(config.decoder_layers))


def _adaptive_softmax(config: ModelConfig, embedding: WordEmbedding) -> AdaptiveSoftmax:
    bands = Bands(config.vocabulary_size, _output_dim(config), config.cutoffs, config.adaptive_softmax_factor)
    return AdaptiveSoftmax(bands, config.decoder_embed_dim, None if config.untie_output else embedding)


def _full_softmax(config: ModelConfig, embedding: WordEmbedding) -> FullSoftmax:
    tied = None if config.untie_output else embedding
    return FullSoftmax(config.vocabulary_size, _output_dim(config), config.decoder_embed_dim, tied)


def _output_dim(config: ModelConfig) -> int:
    return config.decoder_output_dim or config.decoder_input_dim or config.decoder_embed_dim
