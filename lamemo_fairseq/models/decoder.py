"""The decoder: tokens in, memory in, scores out, memory out.

Shapes: B streams, N tokens of a segment, V words, d model width.
"""

import logging
import zlib
from enum import Enum
from typing import Any, Dict, Optional, Tuple

import torch
from fairseq.data import Dictionary
from fairseq.models import FairseqIncrementalDecoder
from torch import Tensor, nn

from ..core.decoding.state import DecodingState, Spare
from ..core.graphs import SegmentGraphs
from ..core.layers import AttentionConfig, DecoderLayer, LayerConfig
from ..core.layers.vocabulary import AdaptiveSoftmax, Bands, FullSoftmax, WordEmbedding
from ..core.memory import MEMORIES, DivergenceError, MemoryConfig, MemoryState, Passage, StreamMemory
from ..core.memory.position import SegmentPosition, real_tokens
from ..core.names import option_name
from ..core.positions import POSITIONS, PositionConfig
from .config import MemoryLanguageModelConfig, check, cutoffs, memory_options

logger = logging.getLogger(__name__)

# Generation and scoring cut long inputs into segments themselves, so nothing has to be truncated.
UNLIMITED = 10**9

# What a model returns beside its scores: losses by name, of memories that have some.
Extra = Optional[Dict[str, Tensor]]


class MemoryDecoder(FairseqIncrementalDecoder):
    """A decoder whose memory and positions are chosen by name.

    Args:
        cfg: options of the model; ``cfg.tokens_per_sample`` is the segment length N.
        dictionary: the words.
    """

    def __init__(self, cfg: MemoryLanguageModelConfig, dictionary: Dictionary):
        super().__init__(dictionary)
        check(cfg)
        length = cfg.tokens_per_sample or cfg.preset_tokens_per_sample
        if length is None:
            raise ValueError("the segment length is not known: pass --tokens-per-sample")
        self.segment_length: int = length
        memory_class = MEMORIES[str(cfg.memory)]
        self.graphs = SegmentGraphs() if cfg.cuda_graphs else None
        width, heads = cfg.decoder_embed_dim, cfg.decoder_attention_heads
        head_dim = cfg.decoder_head_dim or width // heads
        mem_len = cfg.mem_len if memory_class.remembers else 0
        layout = {option_name(name): _plain(getattr(cfg, name)) for name in memory_class.layout}
        self.streams = StreamMemory(memory_class.state, {"--memory": str(cfg.memory), "--mem-len": mem_len, **layout})

        self.embed_tokens = self._build_embedding(cfg)
        self.dropout = nn.Dropout(cfg.dropout)
        self.memory = memory_class(
            MemoryConfig(
                mem_len=mem_len,
                layers=cfg.decoder_layers,
                heads=heads,
                head_dim=head_dim,
                embed_dim=width,
                segment_length=self.segment_length,
                options=memory_options(cfg),
                dropout=cfg.dropout,
            )
        )
        self.positions = POSITIONS[str(cfg.position_encoding)](
            PositionConfig(
                layers=cfg.decoder_layers,
                embed_dim=width,
                heads=heads,
                head_dim=head_dim,
                looks_ahead=memory_class.looks_ahead,
                trained_distances=self.memory.slots + self.memory.period,
                clamp_len=cfg.clamp_len,
                dropout=cfg.dropout,
            )
        )
        attention = AttentionConfig(
            embed_dim=width,
            heads=heads,
            head_dim=head_dim,
            dropout=cfg.attention_dropout,
            span=self.memory.slots if cfg.same_length else None,
            mem_len=mem_len,
            backend=str(cfg.attention_backend),
            options=memory_options(cfg),
        )
        layer = LayerConfig(
            embed_dim=width,
            ffn_dim=cfg.decoder_ffn_embed_dim,
            dropout=cfg.dropout,
            activation_dropout=cfg.dropout if cfg.activation_dropout is None else cfg.activation_dropout,
            activation_fn=str(cfg.activation_fn),
            normalize_before=cfg.decoder_normalize_before,
            checkpoint_activations=cfg.checkpoint_activations,
        )
        self.layers = nn.ModuleList(
            DecoderLayer(layer, memory_class.attention(attention)) for _ in range(cfg.decoder_layers)
        )
        self._build_output(cfg)
        self._planned: Tuple[Optional[Tensor], Any] = (None, None)  # targets, and what the loss will have to know
        # fairseq's moving average leaves alone what has "version" in its name, and fails on other integers.
        self.register_buffer("dictionary_version", vocabulary_checksum(dictionary))
        self._initialize()
        self.spare_samplers = Spare()  # with graphs that another sampling call may replay
        self.for_inference = False  # whether fairseq has prepared the model for it

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Optional[Tensor] = None,
        position: Optional[SegmentPosition] = None,
        encoder_out: Any = None,
        incremental_state: Optional[Dict[str, Any]] = None,
        target: Optional[Tensor] = None,
        real_only: bool = False,
    ) -> Tuple[Tensor, Extra]:
        """Scores of the word after each token, or with an adaptive softmax the features that it takes.

        Args:
            src_tokens: ``[B, N]`` word ids, padded on the right.
            src_lengths: ``[B]`` tokens of each row that are not padding. None: all.
            position: which streams the rows belong to and where in them. The model then reads and keeps their
                memory. None takes each row as a whole text of any length, read from an empty memory.
            encoder_out: not used; fairseq's generator passes it.
            incremental_state: what has been read of *src_tokens* before. Only the tokens beyond are read, and scored:
                N is their number.
            target: ``[B, N]`` the word after each token. Then the sum of their losses is returned in place of
                scores, which are never held all at once (`criterions/chunked_cross_entropy.py`).
            real_only: leave out the padding of streams: with R tokens in all rows, N is R and B is 1.

        Returns:
            Scores ``[B, N, V]`` (features ``[B, N, d]``), and in training the losses of memories that have some.
        """
        real = real_tokens(src_tokens, src_lengths) if real_only and src_lengths is not None else None
        if target is not None:
            planned, plan = self._planned
            target = target if real is None else target[real].unsqueeze(0)
            if planned is not target:
                plan = self._loss_layer.plan(target)
            self._planned = None, None
            features, extra = self.extract_features(src_tokens, src_lengths, position)
            features = features if real is None else features[real].unsqueeze(0)
            return self._loss_layer.loss(features, target, plan), extra
        features, extra = self.extract_features(src_tokens, src_lengths, position, incremental_state)
        return self.output_layer(features if real is None else features[real].unsqueeze(0)), extra

    def extract_features(
        self,
        src_tokens: Tensor,
        src_lengths: Optional[Tensor] = None,
        position: Optional[SegmentPosition] = None,
        incremental_state: Optional[Dict[str, Any]] = None,
        **unused: Any,
    ) -> Tuple[Tensor, Extra]:
        """The last layer's rows ``[B, N, d]`` after the final dropout, and losses; arguments as for `forward`.

        Raises:
            MissingMemoryError: the segment before *position* has not been read.
            DivergenceError: in evaluation, a row is not finite. (In training, asking would make the host wait for the
                device; there the task watches the loss.)
        """
        if incremental_state is not None:
            decoding = self.decoding_state(incremental_state)
            if decoding is None:
                decoding = DecodingState(self, src_tokens.size(0))
                self.set_decoding_state(incremental_state, decoding)
            new = src_tokens[:, decoding.seen :]
            decoding.seen = src_tokens.size(1)
            return decoding.read(new), None
        if position is not None:
            lengths = src_lengths if position.ragged else None
            before = self.streams.read(position, self.training)
            if self.graphs is not None and lengths is None:
                passage = self.graphs(self.step, self, src_tokens, before)
            else:
                passage = self.step(src_tokens, before, lengths)
            self.streams.write(position, self.training, passage.state)
            if not self.training:
                _check_finite(passage.features, position)
            return passage.features, passage.losses if self.memory.has_losses else None
        parts, text_state = [], None
        for start in range(0, src_tokens.size(1), self.segment_length):
            segment = src_tokens[:, start : start + self.segment_length]
            left = None if src_lengths is None else (src_lengths - start).clamp(0, segment.size(1))
            part, text_state, _ = self.step(segment, text_state, left)
            parts.append(part)
        return torch.cat(parts, dim=1), None

    def step(self, tokens: Tensor, state: Optional[MemoryState], lengths: Optional[Tensor] = None) -> Passage:
        """Read one segment.

        Args:
            tokens: ``[B, N]`` word ids.
            state: the memory before the segment, left as it is; None for an empty one.
            lengths: ``[B]`` tokens that are not padding, which is on the right; None if none is.

        Returns:
            Features ``[B, N, d]`` after the final dropout, the memory after the segment, and the memory's losses.
        """
        x = self.dropout(self.positions.embed(self.embed_tokens(tokens), lengths))
        # The memory of a resumed run is still on the host.
        before = self.memory.initial_state(x) if state is None else state.map(lambda t: t.to(x.device))
        passage = self.memory(x, before, self.layers, self.positions, lengths)
        return passage._replace(features=self.dropout(passage.features))

    def begin_segment(self, tokens: Tensor, target: Tensor, position: SegmentPosition, seed: int) -> None:
        """Run the layers on the next training segment, if a CUDA graph can, before `forward` is asked for it.

        Args:
            tokens, target: ``[B, N]`` word ids, the tensors that `forward` will get.
            position: where they stand.
            seed: of the random numbers that `forward` will draw.
        """
        state = self.streams.before(position)
        if self.graphs is not None and state is not None and not position.ragged:
            # The host waits for what a loss needs to know of its targets: not behind the layers.
            self._planned = target, self._loss_layer.plan(target)
            self.graphs.begin(self, tokens, state, seed)

    def decoding_state(self, incremental_state: Dict[str, Any]) -> Optional[DecodingState]:
        """What this model has read of a batch, None if nothing yet."""
        return self.get_incremental_state(incremental_state, "decoding")

    def set_decoding_state(self, incremental_state: Dict[str, Any], decoding: DecodingState) -> None:
        """Let decoding with *incremental_state* go on from what has been read."""
        self.set_incremental_state(incremental_state, "decoding", decoding)

    def reorder_incremental_state(self, incremental_state: Dict[str, Any], new_order: Tensor) -> None:
        """Row i goes on from what row ``new_order[i]`` has read."""
        decoding = self.decoding_state(incremental_state)
        if decoding is not None:
            decoding.reorder(new_order)

    @property
    def _loss_layer(self) -> Any:
        return self.adaptive_softmax if self.output is None else self.output

    def output_layer(self, features: Tensor) -> Tensor:
        """Scores ``[B, N, V]`` of features ``[B, N, d]``; an adaptive softmax leaves them as they are."""
        return features if self.output is None else self.output(features)

    def get_normalized_probs(
        self, net_output: Tuple[Tensor, Any], log_probs: bool, sample: Optional[Dict[str, Any]] = None
    ) -> Tensor:
        """(Log-)probabilities ``[B, N, V]``, in float32 or wider.

        With an adaptive softmax and a *sample*, only the entries of its targets are meant: all words have
        the target's probability, in the memory of one.
        """
        logits = net_output[0]
        if self.adaptive_softmax is not None:
            if sample is None:
                log_p = self.adaptive_softmax.log_probs(logits)
            else:
                found = self.adaptive_softmax.target_log_probs(logits, sample["target"].view(logits.shape[:-1]))
                log_p = found.unsqueeze(-1).expand(*found.shape, len(self.dictionary))
            return log_p if log_probs else log_p.exp()
        exact = torch.promote_types(logits.dtype, torch.float32)
        normalize = torch.log_softmax if log_probs else torch.softmax
        return normalize(logits, dim=-1, dtype=exact)

    def max_positions(self) -> int:
        return UNLIMITED

    def upgrade_state_dict_named(self, state_dict: Dict[str, Any], name: str) -> Dict[str, Any]:
        """Refuse weights that were trained on other words; without memory, leave out those that only a memory uses.

        So a model trained with memory can be evaluated without: ``--model-overrides "{'memory': 'none'}"``.

        Raises:
            ValueError: the checkpoint's dictionary is not this one.
        """
        saved = state_dict.get(f"{name}.dictionary_version")
        if saved is not None and int(saved) != int(self.dictionary_version):
            raise ValueError(
                "the checkpoint was trained with another dictionary than this data's dict.txt of "
                f"{len(self.dictionary):,} words. Evaluate on data binarized with the checkpoint's dictionary: "
                "fairseq-preprocess --srcdict DICT_OF_THE_TRAINING_DATA"
            )
        if not self.memory.remembers:
            unused = [k for k in state_dict if k.startswith((f"{name}.memory.", f"{name}.positions.ahead_"))]
            for key in unused:
                del state_dict[key]
            if unused:
                logger.info("--memory none leaves out weights of the checkpoint: %s", ", ".join(unused))
        return state_dict

    def _build_embedding(self, cfg: MemoryLanguageModelConfig) -> WordEmbedding:
        width = cfg.decoder_input_dim or cfg.decoder_embed_dim
        cuts, factor = (cutoffs(cfg), cfg.adaptive_softmax_factor) if cfg.adaptive_input else ([], 1.0)
        return WordEmbedding(Bands(len(self.dictionary), width, cuts, factor), cfg.decoder_embed_dim)

    def _build_output(self, cfg: MemoryLanguageModelConfig) -> None:
        words, cuts = len(self.dictionary), cutoffs(cfg)
        width = cfg.decoder_output_dim or cfg.decoder_input_dim or cfg.decoder_embed_dim
        tied = None if cfg.untie_output else self.embed_tokens
        self.output: Optional[FullSoftmax] = None
        if cuts:
            bands = Bands(words, width, cuts, cfg.adaptive_softmax_factor)
            self.adaptive_softmax = AdaptiveSoftmax(bands, cfg.decoder_embed_dim, tied)
        else:
            self.output = FullSoftmax(words, width, cfg.decoder_embed_dim, tied)

    def _initialize(self) -> None:
        """Weights N(0, .02), layer-norm gains N(1, .02), biases 0; positions and memories see to themselves."""
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


def _plain(value: Any) -> Any:
    """An option's value as a checkpoint may hold it: the choices that hydra makes cannot be stored."""
    return str(value) if isinstance(value, Enum) else value


def _check_finite(features: Tensor, position: SegmentPosition) -> None:
    finite = features.isfinite().flatten(1).all(1)
    if not finite.all():
        broken = position.named_streams(position.streams_but(finite))
        raise DivergenceError(
            f"NaN or infinity in the last layer for {broken} of '{position.split}', segment "
            f"{position.index}: the weights have diverged, or do not fit into this precision"
        )


def vocabulary_checksum(dictionary: Dictionary) -> Tensor:
    """A number that tells dictionaries apart: the CRC-32 of their words in order, an int64 scalar."""
    return torch.tensor(zlib.crc32("\n".join(dictionary.symbols).encode("utf-8")))
