"""Options of fairseq's optimizers and schedules that end a run with a traceback, or spoil it without a word."""

import logging

from ..core.names import option_name
from .option_rules import Settings, listed

logger = logging.getLogger(__name__)

WITH_RATE = ("adafactor", "adam", "adamax", "adagrad", "cpu_adam", "lamb", "nag", "sgd")
"""Optimizers for which fairseq's default of ``--lr`` is too large."""

_FLOAT32_ALONE = ("adadelta", "adagrad", "sgd")
# Schedules for which --lr has a single value.
_ONE_RATE = ("cosine", "inverse_sqrt", "manual", "reduce_lr_on_plateau", "step", "tri_stage", "triangular")
_HALF = ("fp16", "memory_efficient_fp16", "bf16", "memory_efficient_bf16")


def check_optimizer(settings: Settings) -> None:
    """Refuse options that the chosen optimizer or schedule cannot follow.

    Raises:
        ValueError: with the option and the remedy.
    """
    optimizer, schedule = str(settings.get("optimizer")), str(settings.get("lr_scheduler"))
    if len(listed(settings.get("lr"))) > 1 and schedule in _ONE_RATE:
        raise ValueError(
            f"--lr has several values, one an epoch, which --lr-scheduler {schedule} does not follow: pass one, or "
            "--lr-scheduler fixed"
        )
    half = next((name for name in _HALF if settings.get(name)), None)
    if len(listed(settings.get("update_freq"))) > 1 and half is not None and settings.get("fp16_scale_window") is None:
        raise ValueError(
            f"--update-freq has several values, for which fairseq asks for a --fp16-scale-window with "
            f"{option_name(half)}: pass one, such as 2000, or one value"
        )
    for precision in ("fp16", "bf16"):
        name = f"memory_efficient_{precision}"
        if settings.get(name) and optimizer in _FLOAT32_ALONE:
            raise ValueError(
                f"{option_name(name)} is refused: --optimizer {optimizer} updates float32 weights alone; pass "
                f"--{precision}, or another optimizer such as adam"
            )
    for name in ("relative_step", "warmup_init") if optimizer == "adafactor" else ():
        if settings.get(name):
            raise ValueError(
                f"{option_name(name)} is refused: it chooses the learning rate in place of --lr, which fairseq always "
                "sets; leave it out"
            )
    if optimizer == "adafactor" and settings.get("scale_parameter"):
        logger.warning(
            "--scale-parameter: fairseq multiplies the learning rate by the scale of each parameter in turn, and keeps "
            "the product for the next one, so that all but the first hardly move; leave it out"
        )
