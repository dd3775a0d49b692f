"""Options of fairseq's optimizers that end a run with a message of another kind, or spoil it without one."""

import logging

from ..core.names import option_name
from .option_rules import Settings

logger = logging.getLogger(__name__)

WITH_RATE = ("adafactor", "adam", "adamax", "adagrad", "cpu_adam", "lamb", "nag", "sgd")
"""Optimizers for which fairseq's default of ``--lr`` is too large."""

_FLOAT32_ALONE = ("adadelta", "adagrad", "sgd")


def check_optimizer(settings: Settings) -> None:
    """Refuse options that the chosen optimizer cannot follow.

    Raises:
        ValueError: with the option and the remedy.
    """
    optimizer = str(settings.get("optimizer"))
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
