"""Options of fairseq's optimizers, schedules and criterions that end a run with a traceback, or spoil it silently."""

import logging
from typing import Any, Dict, Tuple

from ..core.names import option_name
from .option_rules import Condition, Settings, is_one, listed, with_all, without

logger = logging.getLogger(__name__)

WITH_RATE = ("adafactor", "adam", "adamax", "adagrad", "cpu_adam", "lamb", "nag", "sgd")
"""Optimizers for which fairseq's default of ``--lr`` is too large."""

_FLOAT32_ALONE = ("adadelta", "adagrad", "sgd")
# Schedules for which --lr has a single value.
_ONE_RATE = ("cosine", "inverse_sqrt", "manual", "reduce_lr_on_plateau", "step", "tri_stage", "triangular")
_HALF = ("fp16", "memory_efficient_fp16", "bf16", "memory_efficient_bf16")


def _positive(*names: str) -> Condition:
    return lambda settings: any(float(settings.get(name) or 0) > 0 for name in names)


def _first(value: Any) -> float:
    return float(listed(value)[0] or 0)


# What a choice needs, and the remedy where that is missing.
_NEEDS: Dict[Tuple[str, str], Tuple[Tuple[Condition, str], ...]] = {
    ("lr_scheduler", "cosine"): (
        (
            _positive("max_update", "lr_period_updates"),
            "pass --max-update, over which the rate falls, or --lr-period-updates",
        ),
        (  # fairseq would divide by zero in the last update
            lambda s: _positive("lr_period_updates")(s) or s.get("max_update") != s.get("warmup_updates"),
            "pass fewer --warmup-updates than --max-update",
        ),
        (_positive("t_mult"), "pass --t-mult above 0"),
    ),
    ("lr_scheduler", "step"): (
        (
            lambda s: s["lr_deacy_period"] > 0 and s["lr_decay"] <= 1 and s["min_lr"] < _first(s.get("lr")),
            "pass --lr-deacy-period above 0, --lr-decay up to 1 and --min-lr below --lr",
        ),
    ),
    ("lr_scheduler", "inverse_sqrt"): (
        (_positive("warmup_updates"), "pass --warmup-updates above 0, from which its fall is counted"),
    ),
    ("lr_scheduler", "polynomial_decay"): (
        (
            _positive("total_num_update"),
            "pass --total-num-update, the number of updates over which the rate falls, such as that of --max-update",
        ),
    ),
    ("lr_scheduler", "tri_stage"): (
        (
            lambda s: _positive("warmup_steps", "hold_steps", "decay_steps")(s) or bool(s.get("phase_ratio")),
            "pass --warmup-steps, --hold-steps and --decay-steps, or --phase-ratio such as '(0.1,0.4,0.5)'",
        ),
        (
            lambda s: not s.get("phase_ratio") or _positive("max_update")(s),
            "with --phase-ratio pass --max-update, of which it gives parts",
        ),
        (lambda s: bool(s.get("phase_ratio")) or _positive("decay_steps")(s), "pass --decay-steps above 0"),
    ),
    ("lr_scheduler", "triangular"): (
        (lambda s: float(s.get("lr_period_updates") or 0) >= 2, "pass --lr-period-updates of 2 or more"),
        (lambda s: float(s.get("max_lr") or 0) > _first(s.get("lr")), "pass --max-lr, a rate above --lr"),
    ),
    ("lr_scheduler", "reduce_lr_on_plateau"): (
        (without("disable_validation"), "it lowers the rate by the validation loss: leave out --disable-validation"),
        (
            lambda s: float(s.get("lr_shrink") or 0) < 1,
            "pass --lr-shrink below 1, by which the rate is multiplied",
        ),
    ),
    ("lr_scheduler", "pass_through"): (
        (
            is_one("optimizer", "composite"),
            "it is for --optimizer composite: pass another, such as fixed or cosine",
        ),
    ),
    ("optimizer", "composite"): (
        (
            with_all("groups"),
            "it takes groups of parameters from a YAML, which these models do not form: pass another, such as adam",
        ),
    ),
    ("criterion", "adaptive_loss"): (
        (
            with_all("adaptive_softmax_cutoff"),
            "pass --adaptive-softmax-cutoff, such as 20000,60000, or --criterion cross_entropy",
        ),
        (is_one("ddp_backend", "legacy_ddp", "no_c10d"), "pass --ddp-backend legacy_ddp as well"),
    ),
}


def check_needs(settings: Settings) -> None:
    """Refuse a schedule, an optimizer or a criterion without the options that it needs.

    Raises:
        ValueError: with the choice and the remedy.
    """
    for (option, choice), needs in _NEEDS.items():
        if str(settings.get(option)) == choice:
            for met, remedy in needs:
                if not met(settings):
                    raise ValueError(f"{option_name(option)} {choice} is incomplete: {remedy}")


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
    for name in ("relative_step", "warmup_init"):
        if optimizer == "adafactor" and settings.get(name):
            raise ValueError(
                f"{option_name(name)} is refused: it chooses the learning rate in place of --lr, which fairseq always "
                "sets; leave it out"
            )
    if optimizer == "adafactor" and settings.get("scale_parameter"):
        logger.warning(
            "--scale-parameter: fairseq multiplies the learning rate by the scale of each parameter in turn, and keeps "
            "the product for the next one, so that all but the first hardly move; leave it out"
        )
