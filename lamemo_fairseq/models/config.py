"""Options of the models, made from the core's configuration."""

from dataclasses import field, fields, make_dataclass
from typing import Any, List, Optional, Tuple, Type, TypeVar

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from omegaconf import II

from ..core.config import ModelConfig
from ..core.memory import MEMORIES

Config = TypeVar("Config", bound=FairseqDataclass)


def with_defaults(config: Type[Config], name: str, **defaults: Any) -> Type[Config]:
    """Return a subclass of a config whose options have other *defaults*."""
    types = {f.name: f.type for f in fields(config)}
    return make_dataclass(
        name,
        [(key, types[key], field(default=value)) for key, value in defaults.items()],
        bases=(config,),
        namespace={"__module__": config.__module__},
    )


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
        *(field for name in MEMORIES.names() for field in _options(MEMORIES[name].options)),
    ],
    bases=(FairseqDataclass,),
    namespace={"__module__": __name__},
)


def model_config(cfg: Any, vocabulary_size: int) -> ModelConfig:
    """Return the core's configuration of fairseq's options.

    Args:
        cfg: a `MemoryLanguageModelConfig`, or the same from a checkpoint.
        vocabulary_size: words of the dictionary.

    Raises:
        ValueError: the options make no sense, or the segment length is not known.
    """
    length = cfg.preset_tokens_per_sample if cfg.tokens_per_sample is None else cfg.tokens_per_sample
    if length is None:
        raise ValueError("the segment length is not known: pass --tokens-per-sample")
    chosen = _chosen(cfg, ModelConfig)
    memory = MEMORIES[chosen["memory"]]
    if not memory.carries_gradient:
        # A checkpoint's own option stays where --model-overrides takes another memory.
        chosen["bptt_segments"] = 1
    own = memory.options
    return ModelConfig(vocabulary_size, length, **chosen, memory_options=own(**_chosen(cfg, own)))


def _chosen(cfg: Any, config: Any) -> Any:
    """Return the values of a core configuration's options. A choice is a name, whatever hydra has made of it."""
    names = {f.name: "choices" in f.metadata for f in fields(config) if "help" in f.metadata}
    return {name: str(getattr(cfg, name)) if chosen else getattr(cfg, name) for name, chosen in names.items()}
