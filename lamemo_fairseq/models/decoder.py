"""The model as fairseq's decoder: the memory of streams, fairseq's incremental state, its checkpoints' words.

Shapes: B streams, N tokens of a segment, V words, d model width.
"""

import zlib
from collections import deque
from dataclasses import dataclass
from itertools import chain, groupby
from operator import itemgetter
from typing import Any, Deque, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from fairseq.data import Dictionary
from fairseq.models import FairseqIncrementalDecoder
from torch import Tensor

from ..core.decoder import MemoryDecoder
from ..core.decoding.state import DecodingState
from ..core.memory import DivergenceError, StreamMemory
from ..core.memory.groups import GroupedState
from ..core.memory.position import SegmentPosition, real_tokens
from ..core.names import option_name
from ..core.segments import Piece
from ..data.text_encoding import PREPROCESS
from .config import model_config

# Generation and scoring cut long inputs into segments themselves, so nothing has to be truncated.
UNLIMITED = 10**9

# A model's second result beside its scores: losses by name, of memories that have losses.
Extra = Optional[Dict[str, Tensor]]


class TextsRead(NamedTuple):
    """An entry of fairseq's incremental state."""

    state: DecodingState
    tokens: int  # how many tokens of each sequence have been read


@dataclass(frozen=True)
class _Ahead:
    """The next segment's targets and the plan of their loss; with features the loss itself."""

    target: Tensor
    plan: Any
    features: Optional[Tensor] = None
    loss: Optional[Tensor] = None
    versions: Sequence[int] = ()  # of the loss layer's weights: how often they have been changed in place

    def __reduce__(self) -> Tuple[object, ...]:
        return (type(None), ())  # a copied or stored model has nothing ahead


class FairseqMemoryDecoder(MemoryDecoder, FairseqIncrementalDecoder):
    """The core's decoder, as fairseq builds and calls it.

    Args:
        cfg: options of the model; ``cfg.tokens_per_sample`` is the segment length N.
        dictionary: the words.
    """

    dictionary_version: Tensor

    def __init__(self, cfg: Any, dictionary: Dictionary):
        MemoryDecoder.__init__(self, model_config(cfg, dictionary))
        self.dictionary = dictionary
        self.onnx_trace = False  # fairseq asks
        FairseqIncrementalDecoder.init_incremental_state(self)
        chosen = {
            "--memory": self.config.memory,
            "--mem-len": self.config.slots,
            **{option_name(name): getattr(self.config.own_options, name) for name in self.memory.layout},
        }
        self.streams = StreamMemory(self.memory.state, chosen)
        self._ahead: Optional[_Ahead] = None
        self._scores = False  # whether the last training segment was asked for its loss
        # fairseq's moving average skips names with "version" in them, and fails on other integers.
        self.register_buffer("dictionary_version", vocabulary_checksum(dictionary))
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
        """Return scores of the word after each token, or with an adaptive softmax the features that it takes.

        Args:
            src_tokens: ``[B, N]`` word ids, padded on the right.
            src_lengths: ``[B]`` tokens of each sequence that are not padding. None: all.
            position: the streams that the sequences belong to, and the segment in them. The model then reads and keeps
                their memory. None takes each sequence as a whole text of any length, read from an empty memory.
            encoder_out: not used; fairseq's generator passes it.
            incremental_state: the state of the tokens of *src_tokens* that have been read before. Only the tokens after
                those are read and scored: N is their number.
            target: ``[B, N]`` the word after each token. Then the sum of their losses is returned in place of scores,
                which are never computed all at once (`criterions/chunked_cross_entropy.py`).
            real_only: leave out the padding of streams: with R tokens in all, N is R and B is 1.

        Returns:
            Scores ``[B, N, V]`` (features ``[B, N, d]``), and in training the losses of memories that have losses.
        """
        real = real_tokens(src_tokens, src_lengths) if real_only and src_lengths is not None else None
        if self.training:
            self._scores = target is not None
        if target is not None:
            ahead, self._ahead = self._ahead, None  # validation lets a loss go, as it may need the device's memory
            target = target if real is None else target[real].unsqueeze(0)
            plan: Any = ahead.plan if ahead is not None and ahead.target is target else self.loss_layer.plan(target)
            features, extra = self.extract_features(src_tokens, src_lengths, position)
            if ahead is not None and ahead.loss is not None and self._same(ahead, features, target):
                return ahead.loss, extra
            features = features if real is None else features[real].unsqueeze(0)
            return self.loss_layer.loss(features, target, plan), extra
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
        """Return features ``[B, N, d]`` after the final dropout, and losses; arguments as for `forward`.

        Raises:
            MissingMemoryError: the segment before *position* has not been read.
            DivergenceError: in evaluation, a stream's features are not finite. (In training, this check would make the
                host wait for the device; there the task watches the loss.)
        """
        if incremental_state is not None:
            texts = self._texts_read(incremental_state) or TextsRead(DecodingState(self, src_tokens.size(0)), 0)
            FairseqIncrementalDecoder.set_incremental_state(
                self, incremental_state, "decoding", texts._replace(tokens=src_tokens.size(1))
            )
            return texts.state.read(src_tokens[:, texts.tokens :]), None
        if position is not None:
            lengths = src_lengths if position.ragged else None
            before = self.streams.read(position, self.training)
            passage = self.read(src_tokens, before, lengths)
            self.streams.write(position, self.training, passage.state)
            if not self.training:
                _check_finite(passage.features, position)
            return passage.features, passage.losses if self.memory.has_losses else None
        return self.read_text(src_tokens, src_lengths), None

    def move_on(self, src_tokens: Tensor, src_lengths: Tensor, position: SegmentPosition, **unused: Any) -> None:
        """Read a segment without gradients, so that the memory moves on although the batch is dropped."""
        with torch.no_grad():
            self.extract_features(src_tokens, src_lengths, position)

    def read_streams(self, batches: Iterable[Mapping[str, Any]]) -> Iterator[Tensor]:
        """Yield the features ``[B, N, d]`` of batches, in order, as `extract_features` returns them in evaluation.

        Args:
            batches: its arguments *src_tokens*, *src_lengths* and *position*. If segments are read on the
                anti-diagonal, as many batches as there are layers are asked for in advance.

        Raises:
            MissingMemoryError, DivergenceError: as for `extract_features`.
        """
        for _, run in groupby(_numbered(batches), key=itemgetter(0)):
            inputs = (batch for _, batch in run)
            first = next(inputs)
            reader = self.segments(self.streams.read(first["position"], self.training))
            waiting: Deque[SegmentPosition] = deque()
            for features in reader.features(_pieces(chain([first], inputs), waiting)):
                position = waiting.popleft()
                _check_finite(features, position)
                yield features
            assert reader.state is not None
            self.streams.write(position, self.training, reader.state)

    def begin_segment(
        self, tokens: Tensor, target: Tensor, on_host: Tensor, position: SegmentPosition, seed: int
    ) -> None:
        """Run the next training segment, if a CUDA graph can, before `forward` is asked for it.

        The loss is computed too if `forward` is asked for losses.

        Args:
            tokens, target: ``[B, N]`` word ids, the tensors that `forward` will get.
            on_host: *target* on the host, where an adaptive softmax counts them and waits for nothing.
            position: of these tokens.
            seed: of the random numbers that `forward` will draw.
        """
        self._ahead = None
        try:
            self._begin(tokens, target, on_host, position, seed)
        except RuntimeError as error:
            if "out of memory" not in str(error):  # in `forward` it can be dealt with
                raise

    def _begin(self, tokens: Tensor, target: Tensor, on_host: Tensor, position: SegmentPosition, seed: int) -> None:
        """Begin a segment as far as the device's memory suffices; arguments as for `begin_segment`."""
        state = self.streams.before(position)
        if self.graphs is None or state is None or position.ragged or isinstance(state, GroupedState):
            return
        layer = self.loss_layer
        plan: Any = layer.plan(target, on_host)
        self._ahead = _Ahead(target, plan)
        features = self.graphs.begin(self, tokens, state, seed)
        if features is None or not self._scores:
            return
        with torch.enable_grad():
            loss = layer.loss(features, target, plan)
        self._ahead = _Ahead(target, plan, features, loss, self._loss_versions())

    def _same(self, ahead: _Ahead, features: Tensor, target: Tensor) -> bool:
        """Return whether the loss of these is the one that was computed ahead."""
        return ahead.features is features and ahead.target is target and ahead.versions == self._loss_versions()

    def _loss_versions(self) -> List[int]:
        return [p._version for p in self.loss_layer.parameters()]

    def _texts_read(self, incremental_state: Dict[str, Any]) -> Optional["TextsRead"]:
        """Return this model's state after reading a batch, None if nothing has been read."""
        return FairseqIncrementalDecoder.get_incremental_state(self, incremental_state, "decoding")

    def reorder_incremental_state(self, incremental_state: Dict[str, Any], new_order: Tensor) -> None:
        """Let sequence i go on from the tokens that sequence ``new_order[i]`` has read."""
        texts = self._texts_read(incremental_state)
        if texts is not None:
            texts.state.reorder(new_order)

    def get_normalized_probs(
        self, net_output: Tuple[Tensor, Any], log_probs: bool, sample: Optional[Dict[str, Any]] = None
    ) -> Tensor:
        """Return (log-)probabilities ``[B, N, V]``, in float32 or wider.

        With an adaptive softmax and a *sample*, only the entries of its targets are valid. All words have the target's
        probability, stored once.
        """
        logits = net_output[0]
        if self.adaptive_softmax is not None:
            if sample is None:
                log_p = self.adaptive_softmax.log_probs(logits)
            else:
                log_likelihood = self.adaptive_softmax.target_log_probs(
                    logits, sample["target"].view(logits.shape[:-1])
                )
                log_p = log_likelihood.unsqueeze(-1).expand(*log_likelihood.shape, len(self.dictionary))
            return log_p if log_probs else log_p.exp()
        exact = torch.promote_types(logits.dtype, torch.float32)
        normalize = torch.log_softmax if log_probs else torch.softmax
        return normalize(logits, dim=-1, dtype=exact)

    def max_positions(self) -> int:
        return UNLIMITED

    def upgrade_state_dict_named(self, state_dict: Dict[str, Any], name: str) -> Dict[str, Any]:
        """Refuse weights of other words or of an untied output layer; leave out those that only another memory uses.

        So a model trained with memory can be evaluated without it: ``--model-overrides "{'memory': 'none'}"``.

        Raises:
            ValueError: the checkpoint's dictionary is not this one, or it has two values for one weight of the model.
        """
        saved = state_dict.get(f"{name}.dictionary_version")
        if saved is not None and int(saved) != int(self.dictionary_version):
            tables = [w for key, w in state_dict.items() if key.startswith(f"{name}.embed_tokens.tables.")]
            trained = f", of {sum(map(len, tables)):,} words," if tables else ""
            raise ValueError(
                f"the checkpoint was trained with another dictionary{trained} than this data's dict.txt of "
                f"{len(self.dictionary):,} words. Binarize the text with the checkpoint's dictionary "
                f"({PREPROCESS} own --srcdict DICT, or fairseq-preprocess --srcdict DICT); to train a new model, take "
                "another --save-dir"
            )
        if pair := self.weights_of_two_values(state_dict, f"{name}."):
            raise ValueError(
                f"the checkpoint has other values for {pair[0]} than for {pair[1]}, which are one weight of this "
                "model: it was trained with --untie-output: pass that, or leave untie_output out of --model-overrides"
            )
        for key in self.weights_left_out(state_dict, f"{name}."):
            del state_dict[key]
        return state_dict


def _numbered(batches: Iterable[Mapping[str, Any]]) -> Iterator[Tuple[int, Mapping[str, Any]]]:
    """Number runs of batches that follow one another in the same streams."""
    number, last = 0, None
    for batch in batches:
        position: SegmentPosition = batch["position"]
        if last is None or position.reading != last.reading or position.index != last.index + 1:
            number += 1
        last = position
        yield number, batch


def _pieces(batches: Iterable[Mapping[str, Any]], waiting: Deque[SegmentPosition]) -> Iterator[Piece]:
    """Yield batches as the core reads them, and note their positions."""
    for batch in batches:
        position = batch["position"]
        waiting.append(position)
        lengths = batch["src_lengths"] if position.ragged else None
        yield Piece(batch["src_tokens"], lengths, position.cleared, position.ended)


def _check_finite(features: Tensor, position: SegmentPosition) -> None:
    finite = features.isfinite().flatten(1).all(1)
    if not finite.all():
        broken = position.named_streams(position.streams_but(finite))
        raise DivergenceError(
            f"NaN or infinity in the last layer for {broken} of '{position.split}', segment "
            f"{position.index}: the weights have diverged, or do not fit into this precision"
        )


def vocabulary_checksum(dictionary: Dictionary) -> Tensor:
    """Return a number that tells dictionaries apart: the CRC-32 of their words in order, an int64 scalar."""
    return torch.tensor(zlib.crc32("\n".join(dictionary.symbols).encode("utf-8")))
