"""The training loop of fairseq-train."""

import contextlib
import logging
import sys
from typing import Any, Callable, Iterator, Optional
from weakref import WeakSet

import torch
from fairseq.logging import metrics
from fairseq.trainer import Trainer

from . import interruption, schedules
from .devices import without_gpus
from .stand_in import stand_in

logger = logging.getLogger(__name__)

_begun: "WeakSet[Any]" = WeakSet()  # trainers


def training_commands() -> Iterator[Any]:
    """The module of fairseq-train, imported, or run as a script, or both."""
    for name in ("fairseq_cli.train", "__main__"):
        module = sys.modules.get(name)
        if hasattr(module, "validate_and_save"):
            yield module


def prepare_training() -> None:
    """Put `_train` in its place, where there is a command that trains."""
    for module in training_commands():
        if not hasattr(module, "_is_prepared"):
            setattr(module, "_is_prepared", True)  # noqa: B010
            stand_in(module, "train")(_train)


def _train(original: Callable[..., Any], cfg: Any, trainer: Any, *args: Any) -> Any:
    """Train for an epoch, unless the run has ended: fairseq would add an update, or several, at every start."""
    with interruption.told(), without_gpus(cfg.common.cpu):
        if trainer not in _begun:
            _check_metric(cfg, trainer)
            reason = _ended(cfg, trainer)
            if reason is not None:
                logger.info("nothing left to do: %s", reason)
                return [None], True
            _begun.add(trainer)
        schedules.begin_epoch(trainer)
        return original(cfg, trainer, *args)


def _ended(cfg: Any, trainer: Any) -> Optional[str]:
    """Return why a run that is started again, as by a scheduler after a lost node, has nothing left to do."""
    limit, updates = cfg.optimization.max_update, trainer.get_num_updates()
    if limit and updates >= limit:
        return f"the checkpoint has {updates} updates, and --max-update is {limit}"
    patience = cfg.checkpoint.patience
    waited = max((getattr(command.should_stop_early, "num_runs", 0) for command in training_commands()), default=0)
    if 0 < patience <= waited:
        return f"the last {waited} validations were no better, and --patience is {patience}"
    hours, trained = cfg.optimization.stop_time_hours, trainer._previous_training_time / 3600
    if 0 < hours < trained:
        return f"the run has trained for {trained:.2f} hours, and --stop-time-hours is {hours:g}"
    return None


def _check_metric(cfg: Any, trainer: Any) -> None:
    """Look for the metric of ``--best-checkpoint-metric`` in the figures of one batch, long before fairseq does.

    Raises:
        ValueError: it is not there.
    """
    metric = cfg.checkpoint.best_checkpoint_metric
    if cfg.dataset.disable_validation or metric in ("loss", "num_updates"):
        return
    with metrics.aggregate(new_root=True) as figures:
        trainer.valid_step(trainer._dummy_batch)
    names = figures.get_smoothed_values()
    if metric not in names:
        raise ValueError(
            f"--best-checkpoint-metric {metric} is not a figure of a validation: pass one of "
            f"{', '.join(name for name in names if not name.startswith('_'))}"
        )


def seed_of(trainer: Any, done: int) -> int:
    """The seed of the update that comes after *done* of them."""
    return trainer.cfg.common.seed + done


@stand_in(Trainer, "get_train_iterator")
def get_train_iterator(original: Callable[..., Any], trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    """fairseq asks for batches to train on in the same words as for batches of that split to validate on."""
    with getattr(trainer.task, "training_batches", contextlib.nullcontext)():
        return original(trainer, *args, **kwargs)


@stand_in(Trainer, "_set_seed")
def _set_seed(original: Callable[..., Any], trainer: Any) -> None:
    """Seed only the training device. torch.manual_seed also records a stack trace for every backend that is absent."""
    if trainer.device.type not in ("cpu", "cuda"):
        return original(trainer)
    seed = seed_of(trainer, trainer.get_num_updates())
    torch.default_generator.manual_seed(seed)
    if trainer.device.type == "cuda":
        torch.cuda.manual_seed(seed)
