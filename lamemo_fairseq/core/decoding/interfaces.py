"""The attributes of a model that decoding uses, whatever its class.

Shapes: B sequences, N tokens, V words, d model width.
"""

from dataclasses import dataclass
from typing import Generic, Optional, Protocol, Sequence, TypeVar, cast

from torch import Tensor, nn

from ..layers import DecoderLayer
from ..layers.vocabulary import AdaptiveSoftmax, FullSoftmax, WordEmbedding
from ..positions import PositionEncoding


class MemorySizes(Protocol):
    """Sizes of a memory's configuration."""

    @property
    def mem_len(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def embed_dim(self) -> int: ...


class CachedMemory(Protocol):
    """A memory as its cache sees it. A cache that needs more of its memory extends this protocol."""

    @property
    def config(self) -> MemorySizes: ...
    @property
    def slots(self) -> int: ...
    @property
    def period(self) -> int: ...


M = TypeVar("M", bound=CachedMemory)


@dataclass(frozen=True)
class Network(Generic[M]):
    """The modules that a memory's rows pass through."""

    memory: M
    layers: Sequence[DecoderLayer]
    positions: PositionEncoding


class Vocabulary(Protocol):
    """Sizes of a model's configuration."""

    @property
    def vocabulary_size(self) -> int: ...


class Decoder(Protocol):
    """A model that can be decoded from: `core/decoder.py` has one."""

    @property
    def config(self) -> Vocabulary: ...
    @property
    def memory(self) -> nn.Module: ...

    training: bool
    embed_tokens: WordEmbedding
    positions: PositionEncoding
    layers: nn.ModuleList
    output: Optional[FullSoftmax]
    adaptive_softmax: Optional[AdaptiveSoftmax]

    def output_layer(self, features: Tensor) -> Tensor:
        """Return scores ``[B, N, V]`` of features ``[B, N, d]``; an adaptive softmax leaves features as they are."""

    def log_probs(self, features: Tensor) -> Tensor:
        """Return log-probabilities ``[B, N, V]`` of features ``[B, N, d]``, in float32 or wider."""


def layers_of(decoder: Decoder) -> Sequence[DecoderLayer]:
    """Return the decoder's layers: the list itself, so that a layer replaced later is the one that is run."""
    return cast(Sequence[DecoderLayer], decoder.layers)


def module_of(decoder: Decoder) -> nn.Module:
    """Return the decoder as an `nn.Module`."""
    return cast(nn.Module, decoder)
