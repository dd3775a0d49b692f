"""Check the names and values of a table file, or of a file of results, before anything is made of it."""

import re
import unicodedata
from typing import Any, Callable, Dict, Mapping, Sequence

LONGEST_NAME = 100
LONGEST_LINE = 300
# Folders beside those of rows, and files beside those of evaluations.
TAKEN_BY_RUNNER = {"a row": ("rates", "speed", "table"), "a split": ("jobs", "log")}
SET_IN_TRAINING = {
    **dict.fromkeys(("batch-size", "max-sentences"), "`streams`"),
    "seed": "`seeds`",
    "save-dir": "--out",
}
SET_IN_EVALUATION = {
    "path": "the run that is evaluated",
    "gen-subset": "`evaluation.subsets`",
    **dict.fromkeys(("num-shards", "shard-id"), "--scale"),
}


# With any of these options no training writes checkpoint_best.pt.
WITHOUT_BEST = ("disable-validation", "no-save", "checkpoint-suffix")


class TableError(ValueError):
    """A table file, or a request for it, makes no sense."""


def file_name(what: str, name: str) -> None:
    """Check the name of *what*, "a row" or "a split", from which names of files are made.

    Raises:
        TableError: the name could lead to another folder, or be taken for an option or a file of the runner.
    """
    extra = "." if what == "a split" else ""
    if not re.fullmatch(rf"[A-Za-z0-9_][A-Za-z0-9_{extra}-]*", name) or len(name) > LONGEST_NAME:
        points = ", points" if extra else ""
        raise TableError(
            f"{shortened(name)} cannot be the name of {what}: files are named after it, so take letters, digits, _"
            f"{points} and - within, {LONGEST_NAME} at most"
        )
    if name in TAKEN_BY_RUNNER[what]:
        raise TableError(f"'{name}' cannot be the name of {what}: the runner has files of that name; take another")


def line_of_text(what: str, text: str) -> None:
    """Check a title or a source, *what*: it is printed within a line of a page, a script and a plot.

    Raises:
        TableError: the text is empty, too long, or holds a line end or another character that is no text.
    """
    wrong = next((c for c in text if _is_control(c)), None)
    if wrong is not None:
        raise TableError(f"{what} {shortened(text)} holds {wrong!a}: write one line of plain text")
    if not text.strip() or len(text) > LONGEST_LINE:
        raise TableError(f"{what} has {len(text)} characters: write one line of text, {LONGEST_LINE} at most")


def without_controls(text: str) -> str:
    """Return the text with a space for each line end and other character that is no text."""
    return "".join(" " if _is_control(c) else c for c in text)


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def options(where: str, given: Mapping[str, Any], set_by_runner: Mapping[str, str]) -> None:
    """Check options of a command that a table gives in *where*.

    Raises:
        TableError: a name is not an option's, or is one that the runner sets itself.
    """
    for name in given:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
            raise TableError(f"{where} names {shortened(name)}: write the name of an option, without -- and =")
        if name in set_by_runner:
            raise TableError(f"{where}: --{name} is set by the runner, from {set_by_runner[name]}")
    if "data" in given:
        folder("data", str(given["data"]))


def leaves_results(where: str, trained: Mapping[str, Any]) -> None:
    """Check that a training with these options leaves what is read and evaluated after it.

    Raises:
        TableError: it leaves no checkpoint to evaluate, or no records in its log.
    """
    for name in WITHOUT_BEST:
        if trained.get(name) not in (None, False):
            raise TableError(f"{where}: --{name} leaves no checkpoint_best.pt, which is evaluated: leave it out")
    log = trained.get("log-format")
    if log != "json":
        given = "not given" if log is None else shortened(str(log))
        raise TableError(f"{where}: --log-format is {given}, and figures are read from records: write log-format: json")


def reads_as_trained(where: str, trained: Mapping[str, Any], evaluated: Mapping[str, Any]) -> None:
    """Check that a table says how a row that is trained on documents is evaluated.

    fairseq-eval-lm reads one text unless it is told otherwise, and would only log a warning.

    Raises:
        TableError: the table does not say it.
    """
    documents = trained.get("documents")
    if documents not in (None, "none") and "documents" not in evaluated:
        raise TableError(
            f"{where} is trained with --documents {shortened(str(documents))}, and would be evaluated on one text: "
            f"write `documents` into evaluation.options, the same or `none`"
        )


def folder(what: str, path: str) -> None:
    """Check the path of a folder that a command is given.

    Raises:
        TableError: the command would take the path for an option, or the text is not a path.
    """
    if path.startswith("-"):
        raise TableError(f"{what} {shortened(path)} would be taken for an option: write ./ in front")
    line_of_text(what, path)


def shortened(text: str) -> str:
    """Return a text in quotes for a message, in one line."""
    return ascii(text) if len(text) <= 60 else f"{text[:60]!a}..."


def fits(value: Any, shape: Any) -> bool:
    """Return whether a value read from JSON has a *shape*.

    A shape is a dictionary with the shapes of required keys, or a list of one shape for all entries. It may also be a
    tuple of alternative shapes, or a function.
    """
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(fits(value.get(key), part) for key, part in shape.items())
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(entry, shape[0]) for entry in value)
    if isinstance(shape, tuple):
        return any(fits(value, one) for one in shape)
    return bool(shape(value))


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_number(value: Any) -> bool:
    """Return whether a value is a number, be it infinite or NaN. A finite number must be small enough to be drawn."""
    if isinstance(value, float) and not abs(value) < float("inf"):
        return True
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def is_whole(value: Any) -> bool:
    return is_number(value) and isinstance(value, int) and value >= 0


def is_nothing(value: Any) -> bool:
    return value is None


def is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def is_pair(value: Any) -> bool:
    return fits(value, [is_number]) and len(value) == 2


def values(shape: Any) -> Callable[[Any], bool]:
    """Return a check that all values of a dictionary have a shape."""
    return lambda value: isinstance(value, dict) and all(fits(part, shape) for part in value.values())


def twice(names: Sequence[Any]) -> Dict[Any, int]:
    """Return the names that occur several times, with their counts."""
    return {name: names.count(name) for name in names if names.count(name) > 1}
