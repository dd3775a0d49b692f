"""Train rows alone for a few updates: their tokens/s and memory can be compared, whichever runs shared a machine."""

import threading
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

from tqdm import tqdm

from . import commands, logs, process
from .execute import Plan, RunError, Slot, failure, in_slots, retry
from .folder import BusyError, code, departures, environment, locked, read_json, write_json
from .table import Run, streams
from .validation import is_mapping, is_nothing, is_number, is_text, values

# Options without use in a few updates.
_OFF = ("validate-interval-updates", "save-interval-updates", "lr-period-updates", "warmup-updates")
# Options on which a rate does not depend, and the data, which a table names apart.
_APART = (*_OFF, "log-interval", "max-update", "data")

FIGURES = ("tokens_per_second", "tokens_an_update", "device_memory_gib", "host_memory_gib")
RATE = {
    **dict.fromkeys(FIGURES, (is_number, is_nothing)),
    **dict.fromkeys(("changes", "options"), (is_nothing, is_mapping)),
    "device": is_text,
    "versions": {"torch": is_text},
}


def measure(
    plan: Plan, row: str, slot: Slot, updates: int, interval: int, folder: Path, keep_open: Sequence[int]
) -> Dict[str, Any]:
    """Train a row for *updates* updates in *slot*, logging every *interval*; only the log is saved.

    *keep_open* are descriptors that the training inherits.

    Returns:
        The result of `logs.training`.

    Raises:
        RunError: the row could not be trained.
    """
    changes = {
        **plan.changes,
        **dict.fromkeys(_OFF),
        "max-update": updates,
        "log-interval": interval,
        "no-save": True,
        "disable-validation": True,
    }
    arguments = commands.train(plan.table, Run(row, 1), str(folder), changes, max(1, len(slot.devices)))
    log = folder / "train.log"
    log.unlink(missing_ok=True)
    ended = process.run(commands.argv("fairseq-train", arguments), log, slot.environment(), keep_open)
    if ended.code:
        again = retry(ended.code, log, "to measure what is missing")
        raise RunError(f"row '{row}': {failure('fairseq-train', ended.code, log, again)}")
    return {**logs.training(log), "host_memory_gib": ended.memory_gib}


def measure_all(plan: Plan, rows: Sequence[str], slots: Sequence[Slot], updates: int) -> None:
    """Measure rows, one at a time in each slot, and record each in `Plan.speed` at once.

    Raises:
        RunError: some rows could not be trained; the others are measured.
    """
    writing = threading.Lock()

    def work(row: str, slot: Slot) -> Optional[str]:
        path = plan.out / "speed" / row
        try:
            with locked(path / "lock", "another process measures this row") as lock:
                measured = measure(plan, row, slot, updates, max(1, updates // 16), path, [lock])
            rate = {
                **{key: measured[key] for key in FIGURES},
                "updates": updates,
                "changes": plan.changes,
                **_trained(plan, row, plan.changes),
                **where(slot),
            }
            with writing:
                write_json(plan.speed, {**(read_json(plan.speed) or {}), row: rate})
        except (RunError, BusyError, OSError) as error:
            return str(error)
        return None

    outcomes = tqdm(in_slots(work, rows, slots), total=len(rows), desc="measuring the rates", unit="row")
    failed = [message for message in outcomes if message is not None]
    if failed:
        raise RunError("\n".join(failed))


def where(slot: Slot) -> Dict[str, Any]:
    """Return the device and the versions that a rate belongs to."""
    noted = environment(slot.shown)
    return {key: noted[key] for key in ("device", "versions", "commit", "changed_files")}


def read(plan: Plan) -> Dict[str, Any]:
    """Return the measured rates by row.

    Raises:
        ValueError: the file does not hold rates.
    """
    rates: Dict[str, Any] = read_json(plan.speed) or {}
    if not values(RATE)(rates):
        raise ValueError(f"{plan.speed} does not hold rates of rows: remove it, and measure them with --speed")
    return {row: rates[row] for row in plan.table.rows if row in rates}


def _trained(plan: Plan, row: str, changes: Mapping[str, Any]) -> Dict[str, Any]:
    """Return what a row's rate depends on, as JSON."""
    options = commands.training_options(plan.table, row, changes)
    return {
        "data": str(options.get("data", plan.table.data)),  # a large vocabulary takes its time
        "streams": streams(plan.table, row),
        "options": {name: value for name, value in options.items() if name not in _APART},
    }


def otherwise(plan: Plan, rates: Dict[str, Any]) -> Dict[str, List[str]]:
    """Return where measured rates depart from their rows in the table, by row."""
    by_row = {}
    for row, rate in rates.items():
        then = _trained(plan, row, rate.get("changes") or {})  # records of before have nothing else
        then.update({name: rate[name] for name in then if rate.get(name) is not None})
        by_row[row] = departures(_named(then), _named(_trained(plan, row, {})))
    return {row: words for row, words in by_row.items() if words}


def _named(trained: Dict[str, Any]) -> Dict[str, Any]:
    options = {f"--{name}": value for name, value in trained["options"].items() if name not in _APART}
    return {"streams": trained["streams"], **options, "data": trained["data"]}


def devices(rates: Dict[str, Any]) -> str:
    """Return the devices and the code of measured rates in words, with the rows of each if there are several."""
    rows: Dict[str, List[str]] = {}
    for row, rate in rates.items():
        made = f"{rate['device']}, torch {rate['versions']['torch']}, commit {code(rate)}"
        rows.setdefault(made, []).append(row)
    if len(rows) == 1:
        return next(iter(rows))
    of_each = "; ".join(f"{made}: {', '.join(rows[made])}" for made in sorted(rows))
    return f"several devices or versions, within which alone to compare them ({of_each})"
