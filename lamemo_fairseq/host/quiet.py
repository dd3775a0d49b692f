"""Logs of this package's commands, without the messages of fairseq, hydra and torch at every start.

Log records are judged by their contents, so records of other tasks stay. Warnings are left out in processes that run a
command or a task of this package.
"""

import logging
import shlex
import sys
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from fairseq.utils import reset_logging

from .own import TASK

_COMMANDS = ("train", "validate", "eval_lm", "generate", "interactive", "hydra_validate")

# Message and module of deprecations that fairseq meets in hydra and torch, and of pinned memory on a CPU. Where a run
# has diverged, fairseq looks for NaN with the hooks.
_WARNINGS = (
    ("", r"hydra\."),
    (r"\s*'\w+' is validated against ConfigStore schema", ""),  # hydra's own too, under its caller's name
    (r"`torch\.cuda\.amp\.", r"fairseq\."),
    (r"Using (a )?non-full backward hook", r"torch\.nn\.modules\.module"),
    (r"'pin_memory' argument is set as true but no accelerator is found", ""),
)


def shorten_configurations() -> None:
    """Let fairseq's commands log the command line where they log all 300 options, if the task is this package's."""
    for name in _COMMANDS:
        logger = logging.getLogger(f"fairseq_cli.{name}")
        if _shorten not in logger.filters:
            logger.addFilter(_shorten)


def _shorten(record: logging.LogRecord) -> bool:
    """Let every log record through, and replace that of a configuration by the command line."""
    if isinstance(record.msg, Mapping) and _task(record.msg) == TASK:
        record.msg = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return True


def _task(config: Mapping[str, Any]) -> Any:
    task = config.get("task")
    return task.get("_name") if isinstance(task, Mapping) else getattr(task, "_name", None)


def leave_out_warnings() -> None:
    """Leave out messages about things that no user of a command can change."""
    logging.getLogger("hydra").setLevel(logging.INFO)  # fairseq's import of wav2vec turns on DEBUG for every logger
    # Of a run that has diverged, fairseq prints every gradient. Its warnings, which name a module, stay.
    logging.getLogger("fairseq.nan_detector").setLevel(logging.WARNING)
    for message, module in _WARNINGS:
        warnings.filterwarnings("ignore", message, module=module)


def log_in_fairseqs_format() -> None:
    """Log as fairseq-eval-lm means to: its import of wav2vec sets up logging first, in Python's format on stderr."""
    handlers = logging.getLogger().handlers
    formats = [getattr(h.formatter, "_fmt", None) for h in handlers if type(h) is logging.StreamHandler]
    if len(handlers) == 1 and formats == [logging.BASIC_FORMAT]:
        reset_logging()


@contextmanager
def without_records(name: str) -> Iterator[None]:
    """Leave out messages of the logger *name* in this context, except for warnings."""
    logger = logging.getLogger(name)
    former = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(former)
