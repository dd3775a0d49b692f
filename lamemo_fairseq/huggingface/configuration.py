"""The configuration for transformers: the fields of `ModelConfig` by their own names, and transformers' own."""

from dataclasses import fields
from typing import Any, Dict

from transformers import PreTrainedConfig

from ..core import ModelConfig
from ..core.folder import MODEL_TYPE
from ..core.text import END

CODE = "modeling_lamemo"  # a module in the folder
FIELDS = [field.name for field in fields(ModelConfig)]
DEFAULTS = ModelConfig(vocabulary_size=32000, segment_length=150)


class LamemoConfig(PreTrainedConfig):
    """Sizes and choices of a model; `ModelConfig` says what they mean.

    Values that are left out are the defaults there. A memory's own options are a dictionary, ``memory_options``.
    """

    model_type = MODEL_TYPE
    attribute_map = {
        "vocab_size": "vocabulary_size",
        "hidden_size": "decoder_embed_dim",
        "num_hidden_layers": "decoder_layers",
        "num_attention_heads": "decoder_attention_heads",
    }

    def __init__(self, **values: Any):
        names = {ours: theirs for theirs, ours in self.attribute_map.items()}
        given = {name: values.pop(name) for name in FIELDS if name in values}
        given |= {ours: values.pop(theirs) for ours, theirs in names.items() if theirs in values}
        for name, value in {**DEFAULTS.to_dict(), "memory_options": None, **given}.items():
            setattr(self, name, value)
        self.use_cache = values.pop("use_cache", True)
        self.auto_map = {
            "AutoConfig": f"{CODE}.LamemoConfig",
            "AutoModelForCausalLM": f"{CODE}.LamemoForCausalLM",
        }
        values.pop("auto_map", None)
        special = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": 1}
        super().__init__(**{"architectures": ["LamemoForCausalLM"], **special, **values})

    @classmethod
    def of(cls, config: ModelConfig) -> "LamemoConfig":
        """Return the configuration for a model of the core."""
        return cls(**config.to_dict())

    def to_core(self) -> ModelConfig:
        """Return the model's own configuration.

        Raises:
            ValueError: the values make no sense together.
        """
        values: Dict[str, object] = {name: getattr(self, name) for name in FIELDS}
        return ModelConfig.from_dict(values)

    @classmethod
    def register_for_auto_class(cls, auto_class: object = "AutoConfig") -> None:
        """Do nothing: the code in a saved folder imports this package, wherever the object comes from."""
