"""Options of the models, under fairseq's names where fairseq has one."""

# No postponed annotations, and typing's Optional: fairseq turns these dataclasses into a parser.
import math
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, List, Optional, Type, TypeVar

from fairseq import utils
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from omegaconf import II

from ..core.attention import BACKENDS
from ..core.memory import MEMORIES, MemoryOptions
from ..core.names import option_name
from ..core.positions import POSITIONS

Config = TypeVar("Config", bound=FairseqDataclass)


def with_defaults(config: Type[Config], name: str, **defaults: Any) -> Type[Config]:
    """A subclass of a config whose options have other *defaults*."""
    types = {f.name: f.type for f in fields(config)}
    return make_dataclass(
        name,
        [(key, types[key], field(default=value)) for key, value in defaults.items()],
        bases=(config,),
        namespace={"__module__": config.__module__},
    )


def _with_options_of_memories(config: Type[Config]) -> Type[Config]:
    """The config with every memory's own options."""
    own = [f for name in MEMORIES.names() for f in fields(MEMORIES[name].options) if f.name != "_name"]
    return make_dataclass(
        config.__name__,
        [(f.name, f.type, field(default=f.default, metadata=f.metadata)) for f in own],
        bases=(config,),
        namespace={"__module__": config.__module__},
    )


@_with_options_of_memories
@dataclass
class MemoryLanguageModelConfig(FairseqDataclass):
    memory: ChoiceEnum(MEMORIES.names()) = field(  # type: ignore[valid-type]
        default="lookahead", metadata={"help": "what is carried from one segment to the next"}
    )
    position_encoding: ChoiceEnum(POSITIONS.names()) = field(  # type: ignore[valid-type]
        default="disentangled", metadata={"help": "how attention knows distances and directions"}
    )
    mem_len: int = field(default=150, metadata={"help": "memory slots M a layer"})
    clamp_len: int = field(default=0, metadata={"help": "largest distance told apart (0: no limit)"})
    same_length: bool = field(default=False, metadata={"help": "let every token see the same number of tokens, M"})
    attention_backend: ChoiceEnum(BACKENDS.names()) = field(  # type: ignore[valid-type]
        default="auto", metadata={"help": "implementation of the attention"}
    )
    cuda_graphs: bool = field(
        default=False, metadata={"help": "record segments as CUDA graphs: faster where launches take long"}
    )

    decoder_layers: int = field(default=6, metadata={"help": "number of layers"})
    decoder_embed_dim: int = field(default=512, metadata={"help": "width of the model"})
    decoder_input_dim: Optional[int] = field(
        default=None, metadata={"help": "width of the embeddings (default: the model's)"}
    )
    decoder_output_dim: Optional[int] = field(
        default=None, metadata={"help": "width of the output layer (default: the embeddings')"}
    )
    decoder_attention_heads: int = field(default=8, metadata={"help": "attention heads"})
    decoder_head_dim: Optional[int] = field(
        default=None, metadata={"help": "size of a head (default: model width / heads)"}
    )
    decoder_ffn_embed_dim: int = field(default=2048, metadata={"help": "width of the feed-forward layers"})
    decoder_normalize_before: bool = field(default=False, metadata={"help": "layer norm before each block"})
    activation_fn: ChoiceEnum(utils.get_available_activation_fns()) = field(  # type: ignore[valid-type]
        default="relu", metadata={"help": "activation of the feed-forward layers"}
    )
    dropout: float = field(default=0.1, metadata={"help": "dropout of embeddings, positions, blocks and output"})
    attention_dropout: float = field(default=0.0, metadata={"help": "dropout of attention weights"})
    activation_dropout: Optional[float] = field(
        default=None, metadata={"help": "dropout inside the feed-forward layers (default: --dropout)"}
    )
    adaptive_softmax_cutoff: Optional[str] = field(
        default=None, metadata={"help": "comma separated cutoffs of the adaptive softmax (default: full softmax)"}
    )
    adaptive_softmax_factor: float = field(
        default=1.0, metadata={"help": "each band's output is this much narrower than the one before (div_val)"}
    )
    adaptive_input: bool = field(
        default=False, metadata={"help": "embed the adaptive softmax's bands in the same widths as it does"}
    )
    untie_output: bool = field(
        default=False, metadata={"help": "give the output layer weights of its own instead of the embeddings'"}
    )
    checkpoint_activations: bool = field(
        default=False, metadata={"help": "recompute activations in the backward pass to save memory"}
    )

    tokens_per_sample: Optional[int] = II("task.tokens_per_sample")
    preset_tokens_per_sample: Optional[int] = field(
        default=None, metadata={"help": "segment length N where --tokens-per-sample does not say (presets set it)"}
    )


def memory_options(cfg: MemoryLanguageModelConfig) -> MemoryOptions:
    """The options of the chosen memory alone."""
    options = MEMORIES[str(cfg.memory)].options
    return options(**{f.name: getattr(cfg, f.name) for f in fields(options) if f.name != "_name"})


def check(cfg: MemoryLanguageModelConfig) -> None:
    """Refuse options that make no sense, saying what to pass instead.

    Raises:
        ValueError: with the option's name and the remedy.
    """
    for registry, name in (
        (MEMORIES, cfg.memory),
        (POSITIONS, cfg.position_encoding),
        (BACKENDS, cfg.attention_backend),
    ):
        registry[str(name)]  # options from a YAML or --model-overrides have not met the parser's choices
    positive = ("decoder_layers", "decoder_embed_dim", "decoder_attention_heads", "decoder_ffn_embed_dim")
    optional = ("decoder_head_dim", "decoder_input_dim", "decoder_output_dim", "tokens_per_sample")
    for name in positive + tuple(n for n in optional if getattr(cfg, n) is not None):
        if getattr(cfg, name) <= 0:
            raise ValueError(f"{option_name(name)} is {getattr(cfg, name)}, it must be positive")
    for name in ("dropout", "attention_dropout", "activation_dropout"):
        if getattr(cfg, name) is not None and not 0 <= getattr(cfg, name) < 1:
            raise ValueError(f"{option_name(name)} is {getattr(cfg, name)}, it must be at least 0 and below 1")
    if cfg.clamp_len < 0:
        raise ValueError(f"--clamp-len is {cfg.clamp_len}: pass 0 for no limit, or the largest distance to tell apart")
    if cfg.decoder_head_dim is None and cfg.decoder_embed_dim % cfg.decoder_attention_heads:
        raise ValueError(
            f"--decoder-embed-dim {cfg.decoder_embed_dim} does not divide into {cfg.decoder_attention_heads} heads: "
            "pass --decoder-head-dim, or another --decoder-attention-heads"
        )
    if cfg.decoder_embed_dim % 2 and str(cfg.position_encoding) != "shaw":
        raise ValueError(f"--decoder-embed-dim {cfg.decoder_embed_dim} is odd, but sinusoids come in pairs")
    if cfg.adaptive_softmax_cutoff is None and (cfg.adaptive_input or cfg.adaptive_softmax_factor != 1):
        raise ValueError(
            "--adaptive-input and --adaptive-softmax-factor divide the dictionary at --adaptive-softmax-cutoff: pass it"
        )
    if not 1 <= cfg.adaptive_softmax_factor < math.inf:
        raise ValueError(f"--adaptive-softmax-factor is {cfg.adaptive_softmax_factor}, it must be at least 1")
    if cfg.cuda_graphs and cfg.checkpoint_activations:
        raise ValueError("--cuda-graphs cannot record --checkpoint-activations: pass one of the two")
    cutoffs(cfg)
    _check_memory(cfg)


def cutoffs(cfg: MemoryLanguageModelConfig) -> List[int]:
    """The cutoffs of the adaptive softmax, none for a full one.

    Raises:
        ValueError: they are no numbers.
    """
    text = cfg.adaptive_softmax_cutoff
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ValueError(f"--adaptive-softmax-cutoff '{text}': pass whole numbers such as 20000,60000") from None


def _check_memory(cfg: MemoryLanguageModelConfig) -> None:
    remembers, least = MEMORIES[str(cfg.memory)].remembers, MEMORIES[str(cfg.memory)].smallest_mem_len
    if remembers and cfg.mem_len < least:
        raise ValueError(
            f"--mem-len is {cfg.mem_len}, but --memory {cfg.memory} needs at least {least}: "
            "pass a positive length, or --memory none"
        )
    if remembers and str(cfg.position_encoding) == "absolute":
        raise ValueError(
            "--position-encoding absolute numbers the tokens of one segment, so that memory rows would share "
            f"the positions of current ones: take another encoding, or --memory none instead of {cfg.memory}"
        )
    memory_options(cfg).check()
    if cfg.same_length and (not remembers or cfg.mem_len == 0):
        raise ValueError(f"--same-length lets every token see --mem-len tokens, but --memory {cfg.memory} has none")
