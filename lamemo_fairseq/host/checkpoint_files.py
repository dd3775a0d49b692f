"""Checkpoint files: read without running anything in them, and told by the model and the task that they name."""

import argparse
import os
import pickle
import re
import reprlib
import zipfile
from typing import Any, Optional, Tuple

import torch
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.tasks import TASK_REGISTRY

from .own import OwnModel, OwnTask

IMPORT = "python -m lamemo_fairseq.convert_checkpoint import"
TRAIN = "train with this package"


class CheckpointError(ValueError):
    """A file is not a checkpoint that may be read."""


def read_checkpoint(path: str, mapped: bool = False) -> Any:
    """Read tensors and plain values; nothing in the file is run.

    Args:
        path: a local file.
        mapped: leave tensors on the disk until they are used, if the file's format allows it.

    Raises:
        CheckpointError: the file holds something else.
    """
    try:
        # Options of optimizers and schedulers that fairseq has no dataclass for, such as sgd, are saved as a namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=True if mapped and zipfile.is_zipfile(path) else None
            )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is no checkpoint of tensors and plain values; nothing in it was run ({why_not_read(error)}): pass "
            f"another, or if it is of the authors' code import it with {IMPORT}"
        ) from None
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the file cannot be opened; torch has an error without a name for one that ends too early
        raise CheckpointError(
            f"{path} is no checkpoint of fairseq, or a damaged one ({why_damaged(error, path)}): "
            "pass another, or copy it again"
        ) from None


def is_our_model(name: Any) -> bool:
    """Return whether an architecture is one of this package, or derived from one."""
    return isinstance(name, str) and _is(ARCH_MODEL_REGISTRY.get(name), OwnModel)


def is_our_task(name: Any) -> bool:
    """Return whether a task is the one of this package, or derived from it."""
    return isinstance(name, str) and _is(TASK_REGISTRY.get(name), OwnTask)


def is_ours(state: Any) -> bool:
    """Return whether a checkpoint names a model or a task of this package."""
    model, task = names(state)
    return is_our_model(model) or is_our_task(task)


def names(state: Any) -> Tuple[Optional[str], Optional[str]]:
    """Return the names of a checkpoint's model and task, None where it has none."""
    state = state if isinstance(state, dict) else {}
    args, cfg = state.get("args"), state.get("cfg")
    if args is not None:  # fairseq prefers these to a configuration
        chosen = [getattr(args, key, None) for key in ("arch", "task")]
    else:
        sections = [cfg.get(key) if isinstance(cfg, dict) else None for key in ("model", "task")]
        chosen = [section.get("_name") if isinstance(section, dict) else None for section in sections]
    model, task = (name if isinstance(name, str) else None for name in chosen)
    return model, task


def not_ours(state: Any, path: str) -> str:
    """Say that a checkpoint is none of this package."""
    if names(state) != (None, None):
        return f"{path} is {describe(state)}, which is not one of this package"
    if not isinstance(state, dict):
        held = f"no dictionary but a {type(state).__name__}"
    else:
        held = ", ".join(sorted(map(str, state))[:8]) or "nothing"
    return f"{path} holds {held}, so it is no checkpoint of fairseq-train"


def of_fairseq(state: Any) -> str:
    """Return what to do with a checkpoint that names another model and task."""
    return f"{TRAIN}; fairseq's own commands read this one with --task {names(state)[1] or 'NAME'}"


def describe(state: Any) -> str:
    """Describe in a few words which model a checkpoint is of, that names a model or a task."""
    model, task = names(state)
    return f"a checkpoint of the model {short(model)} and the task {short(task)}"


def _is(registered: Any, base: type) -> bool:
    return isinstance(registered, type) and issubclass(registered, base)


def short(value: Any) -> str:
    """Return a value's representation, cut where it is long."""
    return reprlib.repr(value)


def first_line(error: BaseException) -> str:
    """Return the first line of a message."""
    return str(error).strip().split("\n")[0]


def why_damaged(error: Exception, path: str) -> str:
    """Return torch's error on a file, which has no message if the file is empty."""
    return "it is empty" if os.path.getsize(path) == 0 else f"{type(error).__name__}: {first_line(error)}"


def why_not_read(error: pickle.UnpicklingError) -> str:
    """Return what torch's message says of the file, without the advice to run the file."""
    foreign = re.search(r"(?:GLOBAL|class|type) ([A-Za-z_][\w.]*\.\w+)", str(error))
    return f"it holds the object {foreign[1]}" if foreign else "torch cannot read it"
