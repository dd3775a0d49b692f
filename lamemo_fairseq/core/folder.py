"""The files of a model: those that `LanguageModel.save` writes, or those of transformers."""

import contextlib
import functools
import json
import os
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, Optional

import torch
from torch import nn

from .config import ModelConfig
from .decoder import MemoryDecoder
from .fields import Values
from .names import nearest_path
from .text import Tokenizer
from .text.tokenizer import DICTIONARY

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FORMAT = 1  # version of the folder's format
MODEL_TYPE = "lamemo"  # by which transformers knows the model


class Saved(NamedTuple):
    """The description of a model in its folder, without the weights."""

    config: ModelConfig
    dtype: torch.dtype  # the widest dtype of the weights
    for_transformers: bool  # the names of weights begin with ``model.``


def write_folder(folder: Path, model: MemoryDecoder, tokenizer: Optional[Tokenizer]) -> None:
    """Write the weights, the configuration and, if there is one, the tokenizer; each file appears whole.

    Raises:
        OSError: the folder cannot be written.
        ValueError: the folder has a tokenizer, and the model has none; or the model's has other words.
    """
    made_for(folder, tokenizer, model.config.vocabulary_size)
    text = json.dumps({"format": FORMAT, **model.config.to_dict()}, indent=2) + "\n"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
        _safetensors().torch.save_model(model, f"{unfinished}/{WEIGHTS}", metadata={CONFIG: text})
        Path(unfinished, CONFIG).write_text(text, encoding="utf-8")
        shutil.copymode(Path(unfinished, CONFIG), Path(unfinished, WEIGHTS))  # safetensors lets no other user read them
        if tokenizer is not None:
            tokenizer.save(unfinished)
        put_in_place(unfinished, folder)


def made_for(folder: Path, tokenizer: Optional[Tokenizer], words: int) -> None:
    """Make a folder for a model of so many *words*.

    Raises:
        OSError: the folder cannot be made.
        ValueError: the folder has a tokenizer and the model none, so that the model would be loaded with another's; or
            the model's has another number of words, so that it would not be loaded.
    """
    if tokenizer is not None:
        tokenizer.check_size(words)
    if tokenizer is None and (folder / DICTIONARY).exists():
        raise ValueError(
            f"{folder} has a {DICTIONARY}, and the model to save no tokenizer: set model.tokenizer = "
            "Tokenizer.load(FOLDER), or save into another folder"
        )
    make_folder(folder)


def make_folder(folder: Path, option: str = "") -> None:
    """Make a folder to write to, and those above it, where there is none.

    Raises:
        OSError: as `check_folder`; no folder is left behind.
    """
    check_folder(folder, option)
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise OSError(
            f"{option} {folder}: no folder can be made ({error.strerror}), pass another one".lstrip()
        ) from error


def check_folder(folder: Path, option: str = "") -> None:
    """Check that a folder can be made and written to; nothing is made.

    Raises:
        OSError: it cannot; the message begins with the *option* that names it, if there is one.
    """
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    what = f"{option} {folder}" + ("" if existing == folder else f": {existing.absolute()}")
    if not os.path.isdir(existing):
        kind = "a file" if os.path.exists(existing) else "a link to nothing"
        raise NotADirectoryError(f"{what} is {kind}, pass a folder".lstrip())
    if reason := why_not_written(existing):
        raise OSError(f"{what} cannot be written to ({reason}), pass another folder".lstrip())


def why_not_written(path: Path) -> Optional[str]:
    """Return why a folder or a file that is there cannot be written to, None if it can.

    It tries: rights say nothing of a full disk, nor of file systems such as /proc.
    """
    try:
        if path.is_dir():
            with tempfile.TemporaryFile(dir=path) as file:
                file.write(b"\0")
        else:
            path.open("ab").close()
    except OSError as error:
        return error.strerror
    return None


def put_in_place(unfinished: str, folder: Path) -> None:
    """Move the files of one folder into another, over files of the same names; other files there stay.

    The configuration comes last, so that a new folder does not load before it is complete.
    """
    for name in sorted(os.listdir(unfinished), key=CONFIG.__eq__):
        os.replace(f"{unfinished}/{name}", folder / name)


def read_saved(folder: Path, changes: Values) -> Saved:
    """Read the configuration, and the dtype of the weights.

    Args:
        folder: the folder.
        changes: values of the configuration to replace.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the configuration is not known here, or not the one that the weights were saved with.
    """
    if not folder.exists() and (near := nearest_path(folder)):
        raise FileNotFoundError(f"there is no folder {folder}{near}")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is not there: pass a folder that LanguageModel.save has written, or write one from a "
                "checkpoint of fairseq-train with python -m lamemo_fairseq.convert_checkpoint core"
            )
    text = (folder / CONFIG).read_text(encoding="utf-8")
    try:
        with _safetensors().safe_open(folder / WEIGHTS, framework="pt") as weights:
            saved_with = (weights.metadata() or {}).get(CONFIG)
        values = json.loads(text)
        for_transformers = values.get("model_type") == MODEL_TYPE
        written = FORMAT if for_transformers else values.pop("format")
    except (_safetensors().SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder} is not a folder that LanguageModel.save has written: {error}") from error
    if written != FORMAT:
        raise ValueError(f"{folder / CONFIG} has format {written}, this version reads {FORMAT}: install a newer one")
    if for_transformers:
        values = {field.name: values[field.name] for field in fields(ModelConfig) if field.name in values}
    elif saved_with != text:
        raise ValueError(
            f"{folder / CONFIG} is not the configuration that {WEIGHTS} was saved with: save the model again; to "
            "change a value, pass it to LanguageModel.load"
        )
    return Saved(ModelConfig.from_dict({**values, **changes}), _dtype_of(folder / WEIGHTS), for_transformers)


def load_weights(folder: Path, model: MemoryDecoder, for_transformers: bool) -> None:
    """Load the weights into a model; one without memory leaves out weights that only a memory uses.

    Raises:
        ValueError: the weights belong to another configuration.
    """
    module = nn.ModuleDict({"model": model}) if for_transformers else model
    other = f"{folder}: the weights are those of another configuration: "
    try:
        missing, unexpected = _safetensors().torch.load_model(module, folder / WEIGHTS, strict=False)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).split("\n") if line.strip()]
        raise ValueError(other + lines[-1][:200]) from error
    unused = model.weights_left_out(unexpected, "model." if for_transformers else "")
    unexpected = [name for name in unexpected if name not in unused]
    if missing or unexpected:
        lacking, named = ("the folder lacks", missing) if missing else ("the model lacks", unexpected)
        raise ValueError(other + f"{lacking} {', '.join(sorted(named))}"[:200])


def load_tokenizer(folder: Path, config: ModelConfig) -> Optional[Tokenizer]:
    """Return the tokenizer, None if there is no dictionary.

    Raises:
        ValueError: a file is damaged, or the dictionary is another model's.
    """
    if not (folder / DICTIONARY).is_file():
        return None
    tokenizer = Tokenizer.load(folder)
    if len(tokenizer) != config.vocabulary_size:
        raise ValueError(
            f"{folder / DICTIONARY} gives {len(tokenizer)} words, and the model has {config.vocabulary_size}: put the "
            "dictionary of the model's data there"
        )
    return tokenizer


def _dtype_of(weights: Path) -> torch.dtype:
    """Return the widest dtype of saved weights."""

    with _safetensors().safe_open(weights, framework="pt") as saved:
        dtypes = {saved.get_tensor(name).dtype for name in saved.keys()}  # noqa: SIM118
    widest: torch.dtype = functools.reduce(torch.promote_types, dtypes)
    return widest


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError("models are saved and loaded with safetensors: pip install safetensors") from None
    return safetensors
