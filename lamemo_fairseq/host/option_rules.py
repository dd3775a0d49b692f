"""Rules on options of fairseq's commands: the verdict on an option that is given, and its condition."""

from dataclasses import dataclass
from typing import Any, Callable, Mapping, Optional, Sequence, Tuple

import torch

from ..core.names import option_name

Settings = Mapping[str, Any]
"""The values of a command's options, by field."""
Condition = Callable[[Settings], bool]

TRAIN, HYDRA, EVAL_LM, VALIDATE = "fairseq-train", "fairseq-hydra-train", "fairseq-eval-lm", "fairseq-validate"
GENERATE, INTERACTIVE = "fairseq-generate", "fairseq-interactive"
TRAINING = (TRAIN, HYDRA)
GENERATION = (GENERATE, INTERACTIVE)
EVALUATION = (EVAL_LM, VALIDATE, *GENERATION)
COMMANDS = (*TRAINING, *EVALUATION)

# Effects of a rule on an option that is given. A refused option may have its default value.
REFUSED, IGNORED, NOTED = "refused", "ignored", "noted"
_JOINED = {REFUSED: " is refused: ", IGNORED: " is ignored: ", NOTED: ": "}


def listed(value: Any) -> Sequence[Any]:
    """Return the values of an option that may have one or several."""
    return value if isinstance(value, (list, tuple)) else [value]


def always(_: Settings) -> bool:
    """Hold for any settings."""
    return True


@dataclass(frozen=True)
class Rule:
    """A verdict on some options in some commands, under a condition that the reason tells."""

    effect: str
    options: Tuple[str, ...]  # by field
    commands: Tuple[str, ...]
    reason: str  # and the remedy
    applies: Condition
    joined: str  # stands between an option and the reason

    def message(self, option: str) -> str:
        """Return one line on an option that was given."""
        return f"{option_name(option)}{self.joined}{self.reason}"


def rule(
    effect: str,
    options: str,
    commands: Sequence[str],
    reason: str,
    applies: Condition = always,
    joined: Optional[str] = None,
) -> Rule:
    """Make a rule of *options*, fields between spaces. Each effect has its own *joined* by default."""
    return Rule(effect, tuple(options.split()), tuple(commands), reason, applies, joined or _JOINED[effect])


def on_cpu(settings: Settings) -> bool:
    """Return whether the command runs without a GPU."""
    return bool(settings.get("cpu")) or not torch.cuda.is_available()


def without(*names: str) -> Condition:
    """Hold if none of the options is given."""
    return lambda settings: not any(settings.get(name) for name in names)


def with_all(*names: str) -> Condition:
    """Hold if all of the options are given."""
    return lambda settings: all(settings.get(name) for name in names)


def is_one(name: str, *values: str) -> Condition:
    """Hold if an option has one of the values."""
    return lambda settings: str(settings.get(name)) in values


def is_other(name: str, *values: str) -> Condition:
    """Hold if an option has none of the values."""
    return lambda settings: str(settings.get(name)) not in values
