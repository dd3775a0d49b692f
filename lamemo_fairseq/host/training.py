"""The training loop of fairseq-train."""

import logging
import math
from typing import Any, Callable, Optional

from fairseq.logging import metrics

from . import interruption, save_dir, signals
from .commands import names_of
from .devices import without_gpus
from .own import OwnTask
from .stand_in import stand_in
from .trainer import SegmentTrainer

logger = logging.getLogger(__name__)


def prepare_training() -> None:
    """Let fairseq-train, where it is imported or run, train models of this package with `SegmentTrainer`."""
    for names in names_of("train"):
        if not hasattr(names.Trainer, "__wrapped__"):  # not yet
            stand_in(names, "Trainer")(_trainer)
            stand_in(names, "train")(_train)


def _trainer(original: Callable[..., Any], cfg: Any, task: Any, *args: Any, **kwargs: Any) -> Any:
    return (SegmentTrainer if isinstance(task, OwnTask) else original)(cfg, task, *args, **kwargs)


def _train(original: Callable[..., Any], cfg: Any, trainer: Any, task: Any, batches: Any) -> Any:
    """Train for an epoch, and let others use ``--save-dir`` if it was the last one, or failed."""
    if not isinstance(trainer, SegmentTrainer):
        return original(cfg, trainer, task, batches)
    goes_on, keeps = False, cfg.checkpoint
    signals.begin_to_heed(can_save=lambda: not (keeps.no_save or keeps.no_last_checkpoints))
    try:
        with interruption.told(), without_gpus(cfg.common.cpu):
            losses, stops = _train_epoch(original, cfg, trainer, task, batches)
            last = stops or batches.next_epoch_idx > (cfg.optimization.max_epoch or math.inf)
            if last and trainer.begun:  # fairseq saves every --save-interval epochs, whichever is the last one
                trainer.save_unless_saved(losses[0])
            if not last and trainer.asked_to_end() is not None:
                trainer.save_and_end(losses[0])
        goes_on = not last
        return losses, stops
    finally:
        if not goes_on:
            signals.end_heeding()
            save_dir.release()


def _train_epoch(original: Callable[..., Any], cfg: Any, trainer: SegmentTrainer, *args: Any) -> Any:
    """Train for an epoch, unless the run has ended: fairseq would add an update, or several, at every start."""
    if not trainer.begun:
        _check_metric(cfg, trainer)
        reason = _ended(cfg, trainer)
        if reason is not None:
            logger.info("nothing left to do: %s", reason)
            return [None], True
        trainer.begun = True
    result = original(cfg, trainer, *args)
    trainer.end_epoch()
    return result


def _ended(cfg: Any, trainer: Any) -> Optional[str]:
    """Return why a run that is started again, as by a scheduler after a lost node, has nothing left to do."""
    limit, updates = cfg.optimization.max_update, trainer.get_num_updates()
    if limit and updates >= limit:
        return f"the checkpoint has {updates} updates, and --max-update is {limit}"
    patience = cfg.checkpoint.patience
    waited = max((getattr(names.should_stop_early, "num_runs", 0) for names in names_of("train")), default=0)
    if 0 < patience <= waited:
        return f"the last {waited} validations were no better, and --patience is {patience}"
    hours, trained = cfg.optimization.stop_time_hours, trainer._previous_training_time / 3600
    if 0 < hours < trained:
        return f"the run has trained for {trained:.2f} hours, and --stop-time-hours is {hours:g}"
    return None


def _check_metric(cfg: Any, trainer: Any) -> None:
    """Look for the metric of ``--best-checkpoint-metric`` in the meters of one batch, long before fairseq does.

    Raises:
        ValueError: the metric is missing.
    """
    metric = cfg.checkpoint.best_checkpoint_metric
    if cfg.dataset.disable_validation or metric in ("loss", "num_updates"):
        return
    with metrics.aggregate(new_root=True) as meters:
        trainer.valid_step(trainer._dummy_batch)
    names = meters.get_smoothed_values()
    if metric not in names:
        raise ValueError(
            f"--best-checkpoint-metric {metric} is not measured in a validation: pass one of "
            f"{', '.join(name for name in names if not name.startswith('_'))}"
        )
