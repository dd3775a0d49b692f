"""Store results in one file, a line a run, apart from the runs' folders: for a table that several machines run."""

import fcntl
import json
import math
import os
import sys
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional

from .folder import flock
from .table import Run
from .validation import fits, is_mapping, is_nothing, is_number, is_pair, is_text, is_whole, values

Result = Dict[str, Any]  # run, training, evaluations, scale and starts, as in a run's results.json

_FIGURE = (is_number, is_nothing)
_NOTE = (is_text, is_nothing)
SHAPE = {
    "run": {"row": is_text, "seed": is_whole, "streams": is_whole, "options": is_mapping, "data": is_mapping},
    "training": {
        "parameters": is_number,
        **dict.fromkeys(("tokens_per_second", "device_memory_gib", "host_memory_gib", "seconds"), _FIGURE),
        "curve": [is_pair],
    },
    "evaluations": values(
        {
            "loss": is_number,
            "perplexity": is_number,
            **dict.fromkeys(("tokens_per_second", "device_memory_gib"), _FIGURE),
        }
    ),
    "scale": (
        is_nothing,
        {
            "asked": {"minutes": is_number, "runs": [is_text], "options": is_mapping},
            "changes": {"max-update": is_whole},
            "shards": is_whole,
            "of_updates": is_whole,
        },
    ),
    "starts": [
        {
            "commands": (is_nothing, [[is_text]]),
            "device": is_text,
            "versions": values(is_text),
            "commit": _NOTE,
            "changed_files": _NOTE,
        }
    ],
}


def read(path: Path) -> Dict[str, Result]:
    """Return the results in a file by the runs' names, several of one run joined; none if there is no such file.

    Of two trainings of a run, that with more evaluations counts, or the later one. Of two figures of one evaluation the
    later one counts. Lines on stderr tell both.

    Raises:
        ValueError: a line of the file is not a result.
    """
    stored: Dict[str, Result] = {}
    if not path.exists():
        return stored
    several, unlike = [], []
    # Not splitlines(): JSON may hold other characters that end a line for it.
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            result = json.loads(line.decode("utf-8"))
            if not fits(result, SHAPE):
                raise ValueError
            unlike += _unlike(stored, result)
            if not _put(stored, result):
                several.append(run_of(result).name)
        except (ValueError, RecursionError):
            raise ValueError(f"line {number} of {path} is not the result of a run: mend it, or take it out") from None
    _tell(f"{path} has several trainings of", several, f"{_WHICH}; take the others out")
    _tell(f"{path} has other figures of the same evaluation,", unlike, "the later ones count; take the others out")
    return stored


_WHICH = "the one with more evaluations counts, or the later one"
_ALIKE = 1e-3  # relative difference of losses up to which two devices compute the same


def _tell(what: str, names: List[str], then: str) -> None:
    """Print a line about the runs of these *names*, if there are any."""
    if names:
        print(f"{what} {', '.join(dict.fromkeys(names))}: {then}", file=sys.stderr)


def add(path: Path, results: Iterable[Result]) -> None:
    """Add results to a file, each to the stored results of the same run.

    Several processes may do so at once. Of two trainings of a run one is left, as for `read`, and a line tells it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        flock(lock.fileno(), fcntl.LOCK_EX, path)
        stored = read(path)
        several = [run_of(result).name for result in results if not _put(stored, result)]
        _tell(f"{path} had another training of", several, f"{_WHICH}; the other is no longer in this file")
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text("".join(json.dumps(stored[key]) + "\n" for key in sorted(stored)), encoding="utf-8")
        os.replace(unfinished, path)


def _put(stored: Dict[str, Result], result: Result) -> bool:
    """Store a result; return whether nothing is lost by it."""
    name = run_of(result).name
    former = stored.get(name)
    joins = former is None or _of_one(former, result)
    if former is not None and joins:
        starts = [*former["starts"], *(start for start in result["starts"] if start not in former["starts"])]
        result = {**result, "evaluations": {**former["evaluations"], **result["evaluations"]}, "starts": starts}
    if former is None or len(result["evaluations"]) >= len(former["evaluations"]):
        stored[name] = result
    return joins


def _of_one(former: Result, result: Result) -> bool:
    """Return whether two results are of one training."""
    return all(former[key] == result[key] for key in ("run", "training"))


def _unlike(stored: Dict[str, Result], result: Result) -> List[str]:
    """Return the evaluations of a stored model that *result* has with the same options and another loss."""
    former = stored.get(run_of(result).name)
    if former is None or not _of_one(former, result):
        return []
    pairs = [(name, former["evaluations"].get(name), other) for name, other in result["evaluations"].items()]
    return [
        f"{run_of(result).name} {name}"
        for name, one, other in pairs
        if one is not None
        and one.get("identity") == other.get("identity")
        and not (one["loss"] == other["loss"] or math.isclose(one["loss"], other["loss"], rel_tol=_ALIKE))
    ]


def run_of(result: Result) -> Run:
    """Return the run of a result."""
    return Run(result["run"]["row"], result["run"]["seed"])


def data_of(result: Result) -> Optional[str]:
    """Return the folder of data that a run was started with, None if its starts do not have the commands."""
    commands = [command for start in result["starts"] for command in start.get("commands") or []]
    return next((command[1] for command in commands if command[:1] == ["fairseq-train"] and command[1:]), None)
