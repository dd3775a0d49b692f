"""Options of the models, made from the core's configuration."""

from dataclasses import field, fields, make_dataclass
from typing import Any, List, Mapping, Optional, Tuple, Type, TypeVar

from fairseq.data import Dictionary
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from omegaconf import II

from ..core.config import ModelConfig, refuse_names
from ..core.memory import MEMORIES
from ..core.names import did_you_mean
from ..core.positions import POSITIONS
from ..host.configuration import check_options
from ..host.reserved_names import names_of_options

Config = TypeVar("Config", bound=FairseqDataclass)

USUAL_ENDS = (".", "?", "!")  # usual ends of a sentence


def with_defaults(config: Type[Config], name: str, **defaults: Any) -> Type[Config]:
    """Return a subclass of a config whose options have other *defaults*."""
    types = {f.name: f.type for f in fields(config)}
    return make_dataclass(
        name,
        [(key, types[key], field(default=value)) for key, value in defaults.items()],
        bases=(config,),
        namespace={"__module__": config.__module__},
    )


def check_defaults(memory: str, where: str, defaults: Mapping[str, object]) -> None:
    """Check the *defaults* of an architecture, before a config is made of them.

    Raises:
        ValueError: a name is no option, or a value does not suit it; the message names the memory and the remedy.
    """
    if "memory" in defaults:
        raise ValueError(f"memory '{memory}': {where} has 'memory', which is the registered name: leave it out")
    known = [f.name for f in fields(MemoryLanguageModelConfig) if f.name != "_name"]
    for name in defaults:
        if name not in known:
            hint = did_you_mean(name, known) or "docs/options.md lists the options"
            raise ValueError(f"memory '{memory}': {where} has '{name}', which is no option of a model; {hint}")
    try:
        check_options(defaults, MemoryLanguageModelConfig)
    except ValueError as error:
        raise ValueError(f"memory '{memory}': {where}: {error}") from None


def _options(config: Any) -> List[Tuple[str, Any, Any]]:
    """Return the fields of a core configuration that users choose, as fairseq's parser takes them."""
    return [
        (
            f.name,
            ChoiceEnum(list(f.metadata["choices"])) if "choices" in f.metadata else f.type,
            field(default=f.default, metadata={"help": f.metadata["help"]}),
        )
        for f in fields(config)
        if "help" in f.metadata
    ]


refuse_names({*names_of_options(), "preset_tokens_per_sample"}, "an option of fairseq or of this package")

MemoryLanguageModelConfig: Any = make_dataclass(
    "MemoryLanguageModelConfig",
    [
        *_options(ModelConfig),
        ("tokens_per_sample", Optional[int], field(default=II("task.tokens_per_sample"))),
        (
            "preset_tokens_per_sample",
            Optional[int],
            field(
                default=None,
                metadata={"help": "segment length N where --tokens-per-sample does not say (presets set it)"},
            ),
        ),
        (
            "sentence_ends",
            Optional[str],
            field(
                default=None,
                metadata={
                    "help": "tokens that end a sentence, separated by spaces, for --position-encoding segatron "
                    "(default: those of . ? ! that are in the dictionary; '' does not count sentences)"
                },
            ),
        ),
        (
            "paragraph_ends",
            str,
            field(
                default="</s>",
                metadata={
                    "help": "tokens that end a paragraph, and its sentence, separated by spaces, for "
                    "--position-encoding segatron ('' does not count paragraphs)"
                },
            ),
        ),
        *(field for name in MEMORIES.names() for field in _options(MEMORIES[name].options)),
    ],
    bases=(FairseqDataclass,),
    namespace={"__module__": __name__},
)


def model_config(cfg: Any, dictionary: Dictionary) -> ModelConfig:
    """Return the core's configuration of fairseq's options.

    Args:
        cfg: a `MemoryLanguageModelConfig`, or the same from a checkpoint.
        dictionary: the words.

    Raises:
        ValueError: the options make no sense, the segment length is not known, or a token is not in the dictionary.
    """
    length = cfg.preset_tokens_per_sample if cfg.tokens_per_sample is None else cfg.tokens_per_sample
    if length is None:
        raise ValueError("the segment length is not known: pass --tokens-per-sample")
    chosen = _chosen(cfg, ModelConfig)
    memory = MEMORIES[chosen["memory"]]
    if not memory.carries_gradient:
        # A checkpoint's own option stays where --model-overrides takes another memory.
        chosen["bptt_segments"] = 1
    if POSITIONS[chosen["position_encoding"]].reads_words:
        chosen["sentence_ends"] = _sentence_ends(cfg.sentence_ends, dictionary)
        chosen["paragraph_ends"] = _ids("--paragraph-ends", cfg.paragraph_ends.split(), dictionary)
    own = memory.options
    return ModelConfig(len(dictionary), length, **chosen, memory_options=own(**_chosen(cfg, own)))


def _sentence_ends(tokens: Optional[str], dictionary: Dictionary) -> List[int]:
    """Return the ids of tokens that end a sentence; None stands for those of `USUAL_ENDS` that the dictionary has."""
    if tokens is not None:
        return _ids("--sentence-ends", tokens.split(), dictionary)
    known = [token for token in USUAL_ENDS if token in dictionary]
    if not known:
        raise ValueError(
            f"none of {' '.join(USUAL_ENDS)} is in the dictionary of {len(dictionary):,} words: pass the tokens that "
            "end a sentence as --sentence-ends, or '' to count paragraphs alone"
        )
    return _ids("--sentence-ends", known, dictionary)


def _ids(option: str, tokens: List[str], dictionary: Dictionary) -> List[int]:
    for token in tokens:
        if token not in dictionary:
            raise ValueError(
                f"{option}: {token!r} is not in the dictionary of {len(dictionary):,} words: pass tokens as dict.txt "
                "has them, separated by spaces"
            )
    return [dictionary.index(token) for token in tokens]


def _chosen(cfg: Any, config: Any) -> Any:
    """Return the values of a core configuration's options. A choice is a name, also where hydra has made an object."""
    names = {f.name: "choices" in f.metadata for f in fields(config) if "help" in f.metadata}
    return {name: str(getattr(cfg, name)) if chosen else getattr(cfg, name) for name, chosen in names.items()}
