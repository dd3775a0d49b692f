"""The training loop of fairseq-train."""

import contextlib
import logging
import sys
from typing import Any, Callable, Iterator

import torch
from fairseq.trainer import Trainer

from . import schedules
from .stand_in import stand_in

logger = logging.getLogger(__name__)


def training_commands() -> Iterator[Any]:
    """The module of fairseq-train, imported, or run as a script, or both."""
    for name in ("fairseq_cli.train", "__main__"):
        module = sys.modules.get(name)
        if hasattr(module, "validate_and_save"):
            yield module


def stop_where_the_run_has_ended() -> None:
    """Let a run that has reached ``--max-update`` end when it is started again, as schedulers do after a lost node.

    fairseq looks at ``--max-update`` after an update, so that every start adds one.
    """
    for module in training_commands():
        if not hasattr(module, "_stops_at_the_end"):
            setattr(module, "_stops_at_the_end", True)  # noqa: B010
            stand_in(module, "train")(_train)


def _train(original: Callable[..., Any], cfg: Any, trainer: Any, *args: Any) -> Any:
    check(cfg)
    limit, updates = cfg.optimization.max_update, trainer.get_num_updates()
    if limit and updates >= limit:
        logger.info("nothing left to do: the checkpoint has %d updates, and --max-update is %d", updates, limit)
        return [None], True
    schedules.begin_epoch(trainer)
    return original(cfg, trainer, *args)


def check(cfg: Any) -> None:
    """Refuse what a run could not be resumed with.

    Raises:
        ValueError: naming the option.
    """
    if cfg.checkpoint.write_checkpoints_asynchronously:
        raise ValueError(
            "--write-checkpoints-asynchronously writes neither checkpoint_last.pt, from which a run resumes, nor "
            "checksums: leave it out. What writing takes is in the log"
        )
    if cfg.distributed_training.ddp_backend == "fully_sharded":
        raise ValueError(
            "--ddp-backend fully_sharded cuts checkpoints up, and a run resumes exactly from whole ones alone: pass "
            "pytorch_ddp or legacy_ddp"
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
    """The seed of an update, for its device alone: torch.manual_seed notes a stack of calls for each that is absent."""
    if trainer.device.type not in ("cpu", "cuda"):
        return original(trainer)
    seed = seed_of(trainer, trainer.get_num_updates())
    torch.default_generator.manual_seed(seed)
    if trainer.device.type == "cuda":
        torch.cuda.manual_seed(seed)
