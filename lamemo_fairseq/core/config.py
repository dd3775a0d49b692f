"""The configuration of a model: a plain dataclass, from which a host makes its options."""

# No postponed annotations: a host reads the types of the fields.
import math
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple, Type, Union, get_args, get_origin

from .attention import BACKENDS
from .fields import Values, option
from .layers.activations import ACTIVATIONS
from .memory import MEMORIES, MemoryOptions
from .names import did_you_mean, option_name
from .positions import POSITIONS

ORDERS = ("auto", "plain", "diagonal")  # of segments and layers, in evaluation
_POSITIVE = ("decoder_layers", "decoder_embed_dim", "decoder_attention_heads", "decoder_ffn_embed_dim")
_POSITIVE_OR_NONE = ("decoder_head_dim", "decoder_input_dim", "decoder_output_dim")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of a model.

    Raises:
        ValueError: the values make no sense together; the message names the option and the remedy.
    """

    vocabulary_size: int
    segment_length: int  # N, tokens that are read at a time

    memory: str = option(
        "lookahead", "memory that is carried from one segment to the next", MEMORIES.names(), fixed=True
    )
    position_encoding: str = option(
        "disentangled", "how attention encodes distances and directions", POSITIONS.names(), fixed=True
    )
    mem_len: int = option(150, "memory slots M a layer")
    bptt_segments: int = option(
        1,
        "segments that --tokens-per-sample is divided into, with gradient between them if the memory "
        "carries it (1: maps that only write the memory are not trained)",
    )
    clamp_len: int = option(0, "largest distance that is distinguished (0: no limit)")
    same_length: bool = option(False, "let every token see the same number of tokens, M")
    attention_backend: str = option("auto", "implementation of the attention", BACKENDS.names())
    cuda_graphs: bool = option(False, "record segments as CUDA graphs: faster where launches take long")
    reading_order: str = option(
        "auto",
        "the order of segments and layers in evaluation: plain; or diagonal, which needs --cuda-graphs and runs all "
        "layers at the same time, each on another segment, with the same result (auto: diagonal for one stream, where "
        "it can)",
        ORDERS,
    )

    decoder_layers: int = option(6, "number of layers")
    decoder_embed_dim: int = option(512, "width of the model")
    decoder_input_dim: Optional[int] = option(None, "width of the embeddings (default: the model's)")
    decoder_output_dim: Optional[int] = option(None, "width of the output layer (default: the embeddings')")
    decoder_attention_heads: int = option(8, "attention heads", fixed=True)
    decoder_head_dim: Optional[int] = option(None, "size of a head (default: model width / heads)")
    decoder_ffn_embed_dim: int = option(2048, "width of the feed-forward layers")
    decoder_normalize_before: bool = option(False, "layer norm before each block", fixed=True)
    activation_fn: str = option("relu", "activation of the feed-forward layers", ACTIVATIONS.names(), fixed=True)
    dropout: float = option(0.1, "dropout of embeddings, positions, blocks and output")
    attention_dropout: float = option(0.0, "dropout of attention weights")
    activation_dropout: Optional[float] = option(None, "dropout inside the feed-forward layers (default: --dropout)")
    adaptive_softmax_cutoff: Optional[str] = option(
        None, "comma separated cutoffs of the adaptive softmax (default: full softmax)", fixed=True
    )
    adaptive_softmax_factor: float = option(
        1.0, "factor by which each band's output is narrower than the one before (div_val)"
    )
    adaptive_input: bool = option(False, "embed each band of the adaptive softmax in the width of its output")
    untie_output: bool = option(False, "give the output layer weights of its own instead of the embeddings'")
    checkpoint_activations: bool = option(False, "recompute activations in the backward pass to save memory")

    # Ids of the words that end a sentence, and a paragraph, for positions that count them.
    sentence_ends: Tuple[int, ...] = ()
    paragraph_ends: Tuple[int, ...] = ()
    # The chosen memory's own options, also as a dictionary by name; None stands for its defaults.
    memory_options: Union[MemoryOptions, Mapping[str, Any], None] = field(default=None)

    def __new__(cls, *args: object, **values: object) -> "ModelConfig":
        _refuse_unknown(values, cls)  # Python's own error names no option that is near
        return super().__new__(cls)

    def __post_init__(self) -> None:
        object.__setattr__(self, "memory_options", _own_options(self.memory, self.memory_options))
        _check_types(self)
        _check_types(self.own_options)
        for name in ("sentence_ends", "paragraph_ends"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # a list, from JSON
        self._check_names()
        self._check_sizes()
        self._check_softmax()
        self._check_memory()

    @property
    def head_dim(self) -> int:
        """Size D of a head."""
        return self.decoder_head_dim or self.decoder_embed_dim // self.decoder_attention_heads

    @property
    def slots(self) -> int:
        """Memory slots M a layer, 0 where the memory has none."""
        return self.mem_len if MEMORIES[self.memory].has_slots else 0

    @property
    def own_options(self) -> MemoryOptions:
        """The chosen memory's own options."""
        assert isinstance(self.memory_options, MemoryOptions)
        return self.memory_options

    @property
    def cutoffs(self) -> List[int]:
        """The cutoffs of the adaptive softmax, none for a full one."""
        text = self.adaptive_softmax_cutoff
        try:
            return [int(cutoff) for cutoff in text.split(",")] if text else []
        except ValueError:
            raise ValueError(f"--adaptive-softmax-cutoff '{text}': pass whole numbers such as 20000,60000") from None

    def to_dict(self) -> Dict[str, object]:
        """Return plain values by name, which JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Values) -> "ModelConfig":
        """Return the configuration that `to_dict` has written.

        Raises:
            ValueError: a name is not known, or a value makes no sense.
        """
        return cls(**values)

    def _check_names(self) -> None:
        POSITIONS[self.position_encoding]
        BACKENDS[self.attention_backend]
        ACTIVATIONS[self.activation_fn]

    def _check_sizes(self) -> None:
        sizes = {option_name(name): getattr(self, name) for name in _POSITIVE + _POSITIVE_OR_NONE}
        sizes |= {"--tokens-per-sample": self.segment_length, "vocabulary_size": self.vocabulary_size}
        for name, size in sizes.items():
            if size is not None and size <= 0:
                raise ValueError(f"{name} is {size}, it must be positive")
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate < 1:
                raise ValueError(f"{option_name(name)} is {rate}, it must be at least 0 and below 1")
        if self.clamp_len < 0:
            raise ValueError(
                f"--clamp-len is {self.clamp_len}: pass 0 for no limit, or the largest distance to distinguish"
            )
        if self.decoder_head_dim is None and self.decoder_embed_dim % self.decoder_attention_heads:
            raise ValueError(
                f"--decoder-embed-dim {self.decoder_embed_dim} does not divide into {self.decoder_attention_heads} "
                "heads: pass --decoder-head-dim, or another --decoder-attention-heads"
            )
        if self.reading_order not in ORDERS:
            raise ValueError(f"unknown --reading-order '{self.reading_order}'; the known ones are {', '.join(ORDERS)}")
        if self.reading_order == "diagonal" and not self.cuda_graphs:
            raise ValueError(
                "--reading-order diagonal runs layers side by side in a CUDA graph: pass --cuda-graphs too"
            )
        if self.cuda_graphs and self.checkpoint_activations:
            raise ValueError("--cuda-graphs cannot record --checkpoint-activations: pass one of the two")

    def _check_softmax(self) -> None:
        if self.adaptive_softmax_cutoff is None and (self.adaptive_input or self.adaptive_softmax_factor != 1):
            raise ValueError(
                "--adaptive-input and --adaptive-softmax-factor divide the dictionary at --adaptive-softmax-cutoff: "
                "pass it"
            )
        if not 1 <= self.adaptive_softmax_factor < math.inf:
            raise ValueError(f"--adaptive-softmax-factor is {self.adaptive_softmax_factor}, it must be at least 1")
        self.cutoffs  # noqa: B018  (refuses what is no number)

    def _check_memory(self) -> None:
        memory = MEMORIES[self.memory]
        if memory.has_slots and self.mem_len < memory.smallest_mem_len:
            raise ValueError(
                f"--mem-len is {self.mem_len}, but --memory {self.memory} needs at least {memory.smallest_mem_len}: "
                "pass a positive length, or --memory none"
            )
        if memory.remembers and not POSITIONS[self.position_encoding].reaches_memory:
            raise ValueError(
                f"--position-encoding {self.position_encoding} numbers the tokens of one segment, so memory "
                "rows would repeat their positions: take another encoding, or --memory none instead of "
                f"{self.memory}"
            )
        POSITIONS[self.position_encoding].check(memory.looks_ahead)
        if self.reading_order == "diagonal":
            self._check_order(memory.is_layered())
        self._check_words(memory.slots_are_tokens)
        self._check_gradient(memory.carries_gradient)
        _check_choices(self.own_options)
        self.own_options.check()
        if self.same_length and self.slots == 0:
            raise ValueError(
                f"--same-length lets every token see --mem-len tokens, but --memory {self.memory} has none"
            )

    def _check_order(self, layered: bool) -> None:
        if self.own_options.cycle > 1:
            raise ValueError(
                f"--reading-order diagonal reads segments that are all alike, and with --lookahead-every "
                f"{self.own_options.cycle} they are not: leave one of the two out"
            )
        if not layered:
            raise ValueError(
                "--reading-order diagonal runs all layers at the same time, and with --memory "
                f"{self.memory} the first layer waits for the last: leave it out"
            )
        if POSITIONS[self.position_encoding].reads_words:
            raise ValueError(
                f"--reading-order diagonal needs positions that are the same in every segment, and "
                f"--position-encoding {self.position_encoding} counts words: leave it out"
            )

    def _check_words(self, slots_are_tokens: bool) -> None:
        for name in ("sentence_ends", "paragraph_ends"):
            wrong = [word for word in getattr(self, name) if not 0 <= word < self.vocabulary_size]
            if wrong:
                raise ValueError(f"{name} has {wrong[0]}: pass ids of words, from 0 to {self.vocabulary_size - 1}")
        if POSITIONS[self.position_encoding].reads_words and not slots_are_tokens:
            known = ", ".join(name for name in MEMORIES.names() if MEMORIES[name].slots_are_tokens)
            raise ValueError(
                f"--position-encoding {self.position_encoding} counts the words of memory slots, which are not tokens "
                f"with --memory {self.memory}: take another encoding, or one of the memories {known}"
            )

    def _check_gradient(self, carried: bool) -> None:
        length, segments = self.segment_length, self.bptt_segments
        if segments < 1:
            raise ValueError(f"--bptt-segments is {segments}, it must be at least 1")
        if segments > 1 and not carried:
            raise ValueError(
                f"--bptt-segments is {segments}, but --memory {self.memory} lets no gradient through: leave it out"
            )
        if length % segments:
            raise ValueError(
                f"--tokens-per-sample {length} does not divide into --bptt-segments {segments} of one "
                "length: pass a multiple; in evaluation, --model-overrides \"{'bptt_segments': 1}\" will do"
            )


_TYPES: Mapping[type, Tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a string"),
}


def _check_types(config: Union[ModelConfig, MemoryOptions]) -> None:
    """Refuse options with values of another type, as those of a dictionary may be."""
    for f in fields(config):
        value = getattr(config, f.name)
        kind, *rest = get_args(f.type) if get_origin(f.type) is Union else (f.type,)
        if kind in _TYPES and not (value is None and rest):  # the kind of an Optional comes first
            taken, shown = _TYPES[kind]
            if not isinstance(value, taken):
                name = option_name(f.name) if "help" in f.metadata else f.name
                raise ValueError(f"{name} is {value!r}: pass {shown}")


def _check_choices(options: MemoryOptions) -> None:
    """Refuse a value that is none of its option's choices."""
    for f in fields(options):
        value, choices = getattr(options, f.name), f.metadata.get("choices")
        if choices is not None and value not in choices:
            raise ValueError(f"unknown {option_name(f.name)} '{value}'; the known ones are {', '.join(choices)}")


def refuse_names(taken: Iterable[str], whose: str) -> None:
    """Refuse a registered memory with an option of a name that is *taken*, as a host offers all options side by side.

    Raises:
        ValueError: the message names the option, its class and *whose* the name is.
    """
    names = set(taken)
    for memory in MEMORIES.names():
        options = MEMORIES[memory].options
        for name in {f.name for f in fields(options)} & names:
            raise ValueError(
                f"memory '{memory}': {options.__name__}.{name} would be {option_name(name)}, which is {whose}: give "
                "the option another name"
            )


refuse_names([f.name for f in fields(ModelConfig)], "an option of every model")


def _own_options(memory: str, given: Union[MemoryOptions, Mapping[str, Any], None]) -> MemoryOptions:
    """Return a memory's own options, of which a dictionary has some by name."""
    options = MEMORIES[memory].options  # refuses an unknown name
    if given is None or isinstance(given, Mapping):
        _refuse_options_of_others(given or {}, memory)
        _refuse_unknown(given or {}, options)
        return options(**(given or {}))
    if type(given) is not options:
        raise ValueError(
            f"memory_options is a {type(given).__name__}, but --memory {memory} takes {options.__name__}: pass a "
            "dictionary of its options by name, {} for the defaults"
        )
    return given


def _refuse_unknown(values: Mapping[str, object], config: Type[Union[ModelConfig, MemoryOptions]]) -> None:
    known = [f.name for f in fields(config)]
    for name in values:
        if name not in known:
            owner = _memory_with(name)
            hint = did_you_mean(name, known)
            if owner is not None:
                hint = f"it is an option of --memory {owner}: pass memory_options, with all that are not the defaults"
            raise ValueError(f"unknown name '{name}' in a model's configuration" + (f"; {hint}" if hint else ""))


def _refuse_options_of_others(own: Mapping[str, object], memory: str) -> None:
    """Refuse options of another memory, as where a saved model is loaded with another ``memory``."""
    known = [f.name for f in fields(MEMORIES[memory].options)]
    for name in own:
        owner = _memory_with(name)
        if name not in known and owner is not None:
            raise ValueError(
                f"--memory {memory} does not take {name}, which the configuration has for --memory {owner}: keep that "
                "memory; or pass memory_options={} too, for the defaults, if both memories have the same weights"
            )


def _memory_with(option: str) -> Optional[str]:
    """Return the memory that an option belongs to, None if there is none."""
    return next((name for name in MEMORIES.names() if option in {f.name for f in fields(MEMORIES[name].options)}), None)
