"""Every model in the sizes of the released settings: NAME_wt103, NAME_enwik8, NAME_text8.

A preset is a model of its own with other defaults, so that it works on the command line and in a hydra YAML.
"""

from dataclasses import field, make_dataclass
from typing import Any, Dict, Type

from fairseq.models import register_model

from .config import MemoryLanguageModelConfig
from .language_models import MODELS, MemoryLanguageModel

_CHARACTERS: Dict[str, Any] = {
    "decoder_layers": 12,
    "decoder_embed_dim": 512,
    "decoder_attention_heads": 8,
    "decoder_head_dim": 64,
    "decoder_ffn_embed_dim": 2048,
    "mem_len": 512,
    "preset_tokens_per_sample": 512,
}

SETTINGS: Dict[str, Dict[str, Any]] = {
    "wt103": {
        "decoder_layers": 16,
        "decoder_embed_dim": 410,
        "decoder_attention_heads": 10,
        "decoder_head_dim": 41,
        "decoder_ffn_embed_dim": 2100,
        "mem_len": 150,
        "preset_tokens_per_sample": 150,
    },
    "enwik8": _CHARACTERS,
    "text8": _CHARACTERS,
}


def _register(model: Type[MemoryLanguageModel], config: Type[MemoryLanguageModelConfig], name: str, data: str) -> None:
    types = {f.name: f.type for f in config.__dataclass_fields__.values()}
    fields = [(key, types[key], field(default=value)) for key, value in SETTINGS[data].items()]
    preset = make_dataclass(f"{config.__name__}_{data}", fields, bases=(config,), namespace={"__module__": __name__})
    register_model(f"{name}_{data}", dataclass=preset)(type(f"{model.__name__}_{data}", (model,), {}))


for _name, (_model, _config) in MODELS.items():
    for _data in SETTINGS:
        _register(_model, _config, _name, _data)
