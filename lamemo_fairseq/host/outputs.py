"""Check where a command writes before it begins: fairseq finds out only later, in a traceback."""

import os
from pathlib import Path

from ..core.folder import check_folder, why_not_written
from ..core.names import nearest_path
from .option_rules import Settings


def check_outputs(settings: Settings) -> None:
    """Check ``--save-dir``, ``--log-file`` and ``--tensorboard-logdir``. Nothing is made.

    Raises:
        OSError, ValueError: one of them cannot be made or written to.
    """
    if settings.get("save_dir"):
        check_folder(Path(settings["save_dir"]), "--save-dir")
    if settings.get("log_file"):
        _check_file("--log-file", settings["log_file"])
    if settings.get("tensorboard_logdir") and not settings.get("distributed_rank"):  # the first rank's alone
        check_folder(Path(settings["tensorboard_logdir"]), "--tensorboard-logdir")


def _check_file(option: str, path: str) -> None:
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        raise ValueError(f"{option} {path} is a folder: pass a file in it, such as {os.path.join(path, 'train.log')}")
    if not os.path.isdir(folder):
        remedy = nearest_path(folder) or ", make it first"
        raise ValueError(f"{option} {path}: there is no folder {folder}{remedy}")
    reason = why_not_written(Path(path if os.path.exists(path) else folder))
    if reason:
        raise ValueError(f"{option} {path} cannot be written to ({reason}): pass a file in a folder of yours")
