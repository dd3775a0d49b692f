"""Every model in the sizes of the released settings: NAME_wt103, NAME_enwik8, NAME_text8.

A preset is a model of its own with other defaults, so that it works on the command line and in a hydra YAML.
"""

from typing import Any, Dict

from fairseq.models import register_model

from ..core.memory import MEMORIES
from .config import check_defaults, with_defaults
from .language_models import MODELS, check_new, subclass

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


for _name, (_model, _config) in MODELS.items():
    _memory = str(_config().memory)
    _presets = MEMORIES[_memory].architecture.presets
    if _unknown := set(_presets) - set(SETTINGS):
        raise ValueError(
            f"memory '{_memory}': Architecture.presets has '{min(_unknown)}': the settings are {', '.join(SETTINGS)}"
        )
    for _data, _sizes in SETTINGS.items():
        check_new(_memory, f"{_name}_{_data}")
        check_defaults(_memory, f"Architecture.presets['{_data}']", _presets.get(_data, {}))
        _preset = with_defaults(_config, f"{_config.__name__}_{_data}", **{**_sizes, **_presets.get(_data, {})})
        register_model(f"{_name}_{_data}", dataclass=_preset)(
            subclass(_model, f"{_model.__name__}_{_data}", _model.__doc__)
        )
