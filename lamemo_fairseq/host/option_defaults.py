"""Render the first half of the page of options: this package's own, with their defaults.

Defaults are read from the classes that fairseq makes command lines of, so that the package has to be imported.
"""

from dataclasses import fields
from enum import Enum
from typing import Any, Callable, Dict, List, Tuple

from fairseq.models import MODEL_DATACLASS_REGISTRY
from fairseq.tasks import TASK_DATACLASS_REGISTRY

from ..core.config import ModelConfig
from ..core.memory import MEMORIES
from ..core.names import option_name
from .own import TASK

_PRESETS = ("wt103", "enwik8", "text8")
_TABLE = "| option | default | values | |\n|---|---|---|---|"


def render_defaults() -> str:
    """Return the tables of options in Markdown."""
    memories = {MEMORIES[name].architecture.name: name for name in MEMORIES.names()}
    own = {name: [f.name for f in fields(MEMORIES[name].options)] for name in memories.values()}
    model = MODEL_DATACLASS_REGISTRY[MEMORIES["lookahead"].architecture.name]
    of_memories = {option for options in own.values() for option in options}
    sections = [
        f"## `--task {TASK}`\n\n{_TABLE}\n" + _rows(TASK_DATACLASS_REGISTRY[TASK], lambda name: True),
        f"## Every model\n\n{_MODELS}\n\n{_TABLE}\n" + _rows(model, lambda name: name not in of_memories),
        *(
            f"## `--memory {name}`\n\n{_TABLE}\n" + _rows(model, options.__contains__)
            for name, options in own.items()
            if options
        ),
        "## Defaults by `--arch`\n\n| `--arch` | defaults that differ from the tables above |\n|---|---|\n"
        + "\n".join(f"| `{arch}` | {_differences(arch, model)} |" for arch in memories),
        f"## Presets\n\n{_PRESET}\n\n| `--arch` | defaults |\n|---|---|\n" + _preset_rows(list(memories)),
    ]
    return "\n\n".join(sections) + "\n"


def _rows(config: Any, wanted: Callable[[str], bool]) -> str:
    helps = {f.name: f.metadata["help"] for f in fields(ModelConfig) if "help" in f.metadata}
    lines = []
    for f in fields(config):
        text = f.metadata.get("help", helps.get(f.name))
        if text is not None and f.name != "data" and wanted(f.name):
            chosen = isinstance(f.type, type) and issubclass(f.type, Enum)
            values = ", ".join(f"`{value}`" for value in f.type) if chosen else _kind(f.type)  # type: ignore[union-attr]
            lines.append(f"| `{option_name(f.name)}` | {_value(f.default)} | {values} | {text} |")
    return "\n".join(lines)


def _kind(kind: Any) -> str:
    names = {"bool": "a switch", "int": "whole number", "float": "number", "str": "text"}
    return next(plain for name, plain in names.items() if name in str(kind))


def _value(default: Any) -> str:
    if default is None or default == "":
        return "none"
    return "off" if default is False else f"`{default}`"


def _defaults(arch: str) -> Dict[str, Any]:
    return {f.name: f.default for f in fields(MODEL_DATACLASS_REGISTRY[arch]) if f.name != "_name"}


def _options(values: List[Tuple[str, Any]]) -> str:
    return ", ".join(f"`{option_name(name)} {value}`" for name, value in values)


def _differences(arch: str, model: Any) -> str:
    usual = {f.name: f.default for f in fields(model)}
    found = [(name, value) for name, value in _defaults(arch).items() if value != usual[name] or name == "memory"]
    return _options(found)


def _preset_rows(architectures: List[str]) -> str:
    """Return a row with LaMemo's values for each preset, and one for each architecture with other values."""
    lamemo = MEMORIES["lookahead"].architecture.name
    own = {f.name for name in MEMORIES.names() for f in fields(MEMORIES[name].options)}
    lines = []
    for preset in _PRESETS:
        values = {arch: _defaults(f"{arch}_{preset}") for arch in architectures}
        changed = {arch: [n for n, v in values[arch].items() if v != _defaults(arch)[n]] for arch in architectures}
        shared = {n for names in changed.values() for n in names if n not in own}
        usual = values[lamemo]
        lines.append(f"| every `_{preset}` | {_options([(n, v) for n, v in usual.items() if n in shared])} |")
        for arch in architectures:
            others = [(n, v) for n, v in values[arch].items() if v != usual[n] and (n in shared or n in changed[arch])]
            if others:
                lines.append(f"| but `{arch}_{preset}` | {_options(others)} |")
    return "\n".join(lines)


_MODELS = """`--arch` chooses the model, and with it the memory. An option of a memory that the `--arch` does not have
is ignored with a warning."""
_PRESET = """The suffixes `_wt103`, `_enwik8` and `_text8` of an `--arch` set the sizes of the released settings.
Options on the command line override them. `--preset-tokens-per-sample` gives way to `--tokens-per-sample`."""
