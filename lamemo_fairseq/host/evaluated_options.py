"""Options that fairseq evaluates as Python: a misspelt value would end a run with a traceback that names no option."""

import ast
import re
from argparse import Action, ArgumentError, ArgumentParser
from typing import Any, Callable, NamedTuple, Tuple

from ..core.names import option_name
from .option_rules import Settings


class _Wanted(NamedTuple):
    """The values of some options, and what to pass in place of another value."""

    options: Tuple[str, ...]  # by field
    fits: Callable[[Any], bool]
    remedy: str


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _pair_of(fits: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, (list, tuple)) and len(value) == 2 and all(_is_number(v) and fits(v) for v in value)
    )


def _is_schedule(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and re.fullmatch(r"\d+(-\d+|(,\d+)*)", key.replace(" ", "")) and _is_number(rate)
        for key, rate in value.items()
    )


_WANTED = (
    _Wanted(("lr", "update_freq"), lambda value: value not in ([], ()), "a number, or several separated by commas"),
    _Wanted(
        ("adam_betas", "adamax_betas", "lamb_betas"),
        _pair_of(lambda beta: 0 <= beta < 1),
        "two numbers from 0 to below 1, such as '(0.9, 0.999)'",
    ),
    _Wanted(("adafactor_eps",), _pair_of(lambda eps: eps >= 0), "two small numbers, such as '(1e-30, 1e-3)'"),
    _Wanted(
        ("phase_ratio",),
        lambda value: (
            isinstance(value, (list, tuple)) and len(value) == 3 and min(value) >= 0 and sum(value) == 1
        ),  # fairseq compares so too
        "three numbers that add up to 1, such as '(0.1,0.4,0.5)'",
    ),
    _Wanted(
        ("epoch2lr", "update2lr"),
        _is_schedule,
        """rates by number or range in quotes, such as '{"1-3": 1e-3, "4": 5e-4}'""",
    ),
    _Wanted(
        ("optimizer_overrides",), lambda value: isinstance(value, dict), """a dictionary, such as '{"eps": 1e-6}'"""
    ),
)
_WANTED_OF_ALL = (
    _Wanted(
        ("batch_size_valid", "max_tokens_valid"),
        lambda value: isinstance(value, int) and value >= 1,
        "a whole number from 1",
    ),
)


def read_in_words(parser: ArgumentParser) -> None:
    """Let a parser name the option whose list of values is no Python."""
    read: Callable[[Action, str], Any] = parser._get_value  # type: ignore[attr-defined]

    def value(action: Action, word: str) -> Any:
        try:
            return read(action, word)
        except SyntaxError:
            raise ArgumentError(action, f"invalid <lambda> value: {word!r}") from None

    parser._get_value = value  # type: ignore[attr-defined, method-assign, assignment]


def read_as_before(parser: ArgumentParser) -> None:
    """Undo `read_in_words`."""
    del parser._get_value  # type: ignore[attr-defined]


def check_evaluated(settings: Settings, trains: bool) -> None:
    """Check the values of these options before fairseq evaluates them, as a command does that trains or does not.

    Raises:
        ValueError: a value does not serve; the message names the option.
    """
    for wanted in (*_WANTED_OF_ALL, *(_WANTED if trains else ())):
        for option in wanted.options:
            value = settings.get(option)
            if value is not None and not _fits(value, wanted):
                raise ValueError(f"{option_name(option)} is {_shown(value)}: pass {wanted.remedy}")


def _fits(value: Any, wanted: _Wanted) -> bool:
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value.replace(" ", ""))
        except (ValueError, SyntaxError):
            return False
    return wanted.fits(value)


def _shown(value: Any) -> str:
    if not isinstance(value, (list, tuple)):
        return repr(value)
    return ", ".join(map(str, value)) or "empty"
