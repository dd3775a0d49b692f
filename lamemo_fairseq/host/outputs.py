"""Check where a command writes before it begins: fairseq finds out only later, in a traceback."""

import os
import tempfile
from typing import Optional

from ..core.names import nearest_path
from .option_rules import Settings


def check_outputs(settings: Settings) -> None:
    """Check ``--save-dir``, ``--log-file`` and ``--tensorboard-logdir``. Nothing is made.

    Raises:
        ValueError: one of them cannot be made or written to.
    """
    if settings.get("save_dir"):
        check_folder("--save-dir", settings["save_dir"])
    if settings.get("log_file"):
        _check_file("--log-file", settings["log_file"])
    if settings.get("tensorboard_logdir") and not settings.get("distributed_rank"):  # the first rank's alone
        check_folder("--tensorboard-logdir", settings["tensorboard_logdir"])


def check_folder(option: str, folder: str) -> None:
    """Check that a folder can be made and written to.

    Raises:
        ValueError: it cannot.
    """
    existing = os.path.abspath(folder)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise ValueError(f"{option} {folder}: {existing} is a file, pass a folder")
    reason = _why_not_written(existing)
    if reason:
        raise ValueError(f"{option} {folder}: {existing} cannot be written to ({reason}), pass a folder of yours")


def _check_file(option: str, path: str) -> None:
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        raise ValueError(f"{option} {path} is a folder: pass a file in it, such as {os.path.join(path, 'train.log')}")
    if not os.path.isdir(folder):
        remedy = nearest_path(folder) or ", make it first"
        raise ValueError(f"{option} {path}: there is no folder {folder}{remedy}")
    reason = _why_not_written(path if os.path.exists(path) else folder)
    if reason:
        raise ValueError(f"{option} {path} cannot be written to ({reason}): pass a file in a folder of yours")


def _why_not_written(path: str) -> Optional[str]:
    """Return why a folder or a file cannot be written to. File systems such as /proc tell only those who try."""
    try:
        if os.path.isdir(path):
            tempfile.TemporaryFile(dir=path).close()
        else:
            open(path, "ab").close()
    except OSError as error:
        return error.strerror
    return None
