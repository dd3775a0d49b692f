"""End an interrupted command with one line, which for a training says what is saved and how to go on."""

import os
import signal
import sys
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Callable, Iterator, Optional, Type

import torch.distributed as dist

from ..refusals import hook_once
from .signals import Terminated


class _Training:
    """The training run of this process, and the report on its end."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.restored: int = trainer.get_num_updates()
        self.saved: Optional[int] = None

    def summary(self) -> str:
        return f"after update {self.trainer.get_num_updates()}{self._saved()}"

    def _saved(self) -> str:
        checkpoint = self.trainer.cfg.checkpoint
        last = os.path.join(checkpoint.save_dir, f"checkpoint_last{self.trainer.checkpoint_suffix}.pt")
        if checkpoint.no_save:
            return ", of which --no-save keeps nothing"
        if _rank() > 0:  # the first rank saves
            return f": what is saved is in {checkpoint.save_dir}"
        if self.saved is None:
            again = f"goes on from update {self.restored} again" if self.restored else "begins again"
            return f": nothing has been saved since the start, the same command {again}"
        if checkpoint.no_last_checkpoints:
            return (
                f": update {self.saved} is saved in {checkpoint.save_dir}, name its file with --restore-file to go on"
            )
        if checkpoint.restore_file != "checkpoint_last.pt":
            return (
                f": update {self.saved} is saved in {last}. To go on from it, leave out --restore-file "
                f"{checkpoint.restore_file}"
            )
        return f": update {self.saved} is saved in {last}, from which the same command goes on"


_training: Optional[_Training] = None
_told = False


def end_in_one_line() -> None:
    """Put `_ended` before the function that prints tracebacks; process groups put theirs before it."""
    hook_once(_ended)


def begin(trainer: Any) -> None:
    """Note that a training begins, or goes on after as many updates as the trainer has."""
    global _training, _told
    _training, _told = _Training(trainer), False
    end_in_one_line()


def note_saved(updates: int) -> None:
    """Note that a checkpoint was saved after *updates* updates."""
    if _training is not None:
        _training.saved = updates


@contextmanager
def told() -> Iterator[None]:
    """Report an interruption in this context, once for all ranks."""
    try:
        yield
    except KeyboardInterrupt as error:
        _tell(error)
        raise


def report(what: str) -> None:
    """Print the reason why this process ends, and the saved update; nothing if an end was reported before."""
    global _told
    if not _told:
        summary = f" {_training.summary()}" if _training is not None else ""
        print(f"{what}{summary}", file=sys.stderr, flush=True)
    _told = True


def _tell(error: BaseException) -> None:
    if _rank() == 0:
        report("Terminated" if isinstance(error, Terminated) else "Interrupted")


def _ended(
    otherwise: Callable[..., Any],
    kind: Type[BaseException],
    error: BaseException,
    traceback: Optional[TracebackType],
) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        otherwise(kind, error, traceback)
        return
    _tell(error)
    raise SystemExit(128 + (error.number if isinstance(error, Terminated) else signal.SIGINT))


def _rank() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
