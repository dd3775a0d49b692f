"""Shrink all rows of a table alike to a budget in minutes.

Sizes, data and streams stay as they are. Updates shrink to the same number for every row, with the schedules counted in
them. Evaluations read the first of equal divisions of a split.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from tqdm import tqdm

from . import commands, speed
from .execute import SCALE, Plan, Slot
from .folder import ChangedError, locked, read_json, write_json
from .kept import SHAPE
from .table import Run, TableError
from .validation import fits

# Shares of the minutes; the rest goes to validation during training, and to starting processes.
TRAINING, EVALUATION = 0.65, 0.2
PROBE_UPDATES = 12
VALIDATIONS = 5
SCHEDULES = ("warmup-updates", "lr-period-updates")
# Set by the runner when it shrinks a table.
SHRUNK = ("max-update", "validate-interval-updates", "save-interval-updates", *SCHEDULES)
NEVER = 10**6  # epochs


def decided(plan: Plan) -> Optional[Dict[str, Any]]:
    """Return how the table of a folder was shrunk, None if it was not shrunk.

    Raises:
        ValueError: the file of the decision is damaged.
    """
    path = plan.out / SCALE
    decision = read_json(path)
    if not fits(decision, SHAPE["scale"]):
        raise ValueError(f"{path} does not say how the table was shrunk: restore it, or remove {plan.out}")
    return decision  # type: ignore[no-any-return]


def check(plan: Plan, runs: Sequence[Run], minutes: Optional[float]) -> None:
    """Refuse a folder, or stored results of *runs*, of another ``--scale`` or of none.

    Raises:
        ChangedError: it was.
    """
    decision = decided(plan)
    begun = decision is not None or any(plan.out.glob("*/seed-*/checkpoints/*.pt"))
    if begun and _minutes(decision) != minutes:
        raise ChangedError(
            f"{plan.out} was begun {_asked(_minutes(decision))}, and this is {_asked(minutes)}: "
            "ask for the same, or take another folder with --out"
        )
    for run in runs:
        result = plan.kept.get(run.name)
        if result is not None and _minutes(result["scale"]) != minutes:
            raise ChangedError(
                f"{plan.results} keeps results of {run.name} {_asked(_minutes(result['scale']))}, and this is "
                f"{_asked(minutes)}: ask for the same, or keep these in another folder with --results"
            )


def _minutes(decision: Optional[Dict[str, Any]]) -> Optional[float]:
    return None if decision is None else decision["asked"]["minutes"]


def _asked(minutes: Optional[float]) -> str:
    return "without --scale" if minutes is None else f"with --scale {minutes:g}"


def shrink(plan: Plan, runs: Sequence[Run], slots: Sequence[Slot], minutes: float) -> Plan:
    """Return the plan with all rows shrunk, as it was decided when the folder was begun, or else by rates measured now.

    Raises:
        ChangedError: the folder was begun with another budget, or other runs.
        BusyError: another process is measuring the rates.
        RunError: a row could not be trained for a few updates.
    """
    path = plan.out / SCALE
    if not path.exists() and slots:
        with locked(plan.out / "scale.lock", "another process measures the rates of this table") as lock:
            return _shrink(plan, runs, slots, minutes, path, [lock])
    return _shrink(plan, runs, slots, minutes, path)


def _shrink(
    plan: Plan, runs: Sequence[Run], slots: Sequence[Slot], minutes: float, path: Path, keep_open: Sequence[int] = ()
) -> Plan:
    asked = {"minutes": minutes, "runs": [run.name for run in runs], "options": plan.changes}
    scales = (result["scale"] for result in plan.kept.values() if result["scale"])
    decision = decided(plan) or next((scale for scale in scales if scale["asked"] == asked), None)
    if decision is None:
        if not slots:
            raise ChangedError(f"{plan.out} holds nothing to render")
        decision = {"asked": asked, **decide(plan, runs, slots, minutes, keep_open)}
    elif decision["asked"] != asked:
        raise ChangedError(
            f"{plan.out} was begun with --scale {decision['asked']['minutes']} for "
            f"{', '.join(decision['asked']['runs'])} and --set {decision['asked']['options']}: ask for the same, or "
            "take another folder with --out"
        )
    if slots and not path.exists():
        write_json(path, decision)
    return replace(plan, changes={**plan.changes, **decision["changes"]}, shards=decision["shards"], scale=decision)


def decide(
    plan: Plan, runs: Sequence[Run], slots: Sequence[Slot], minutes: float, keep_open: Sequence[int] = ()
) -> Dict[str, Any]:
    """Divide a budget among all rows; return the decision as JSON."""
    table = plan.table
    for name, row in table.rows.items():
        own = [option for option in SHRUNK if option in row.options]
        if own:
            raise TableError(
                f"--scale shrinks all rows alike, but row '{name}' sets --{own[0]} for itself: copy the table without "
                "that row, and scale the copy"
            )
    full = {**table.options, **plan.changes}
    if not isinstance(full.get("max-update"), int):
        raise TableError("--scale shrinks --max-update, which the table's options do not set")
    rates = measure(plan, runs, slots[0], keep_open)
    seconds = 60 * minutes * len(slots)
    an_update = {row: rate["tokens_an_update"] / rate["tokens_per_second"] for row, rate in rates.items()}
    updates = round(TRAINING * seconds / sum(an_update[run.row] for run in runs))
    updates = max(1, min(updates, full["max-update"]))
    share = updates / full["max-update"]
    changes: Dict[str, Any] = {
        "max-update": updates,
        "validate-interval-updates": math.ceil(updates / VALIDATIONS),
        "save-interval-updates": math.ceil(updates / VALIDATIONS),
        "validate-interval": NEVER,
        "save-interval": NEVER,
        "max-valid-steps": max(8, updates // 25),
        "log-interval": max(1, updates // 50),
        **{name: max(1, round(full[name] * share)) for name in SCHEDULES if full.get(name)},
    }
    # Reading without a backward pass takes no longer than training, whatever the batch.
    a_token = sum(len(plan.evaluations(run)) / rates[run.row]["tokens_per_second"] for run in runs)
    tokens = EVALUATION * seconds / a_token
    return {
        "rates": rates,
        "of_updates": full["max-update"],
        "changes": changes,
        "shards": _shards(plan, runs, tokens),
    }


def measure(plan: Plan, runs: Sequence[Run], slot: Slot, keep_open: Sequence[int]) -> Dict[str, Any]:
    """Measure tokens/s of every row over a few updates, and its tokens an update."""
    rates = {}
    for name in tqdm(list(dict.fromkeys(run.row for run in runs)), desc="measuring the rate", unit="row"):
        rate = speed.measure(plan, name, slot, PROBE_UPDATES, 1, plan.out / "rates" / name, keep_open)
        rates[name] = {key: rate[key] for key in ("tokens_per_second", "tokens_an_update")}
    return rates


def _shards(plan: Plan, runs: Sequence[Run], tokens: float) -> int:
    """Return the number of parts of a split, the first of which has about *tokens* tokens in streams long enough."""
    from lamemo_fairseq.data.binarized import load_dictionary, load_lines

    subsets: List[str] = list(dict.fromkeys(e.subset for run in runs for e in plan.evaluations(run)))
    options = commands.training_options(plan.table, runs[0].row, plan.changes)
    data = str(options.get("data", plan.table.data))
    dictionary = load_dictionary(str(Path(data) / "dict.txt"))
    largest = 0
    for subset in subsets:
        lines = load_lines(data, subset, dictionary, None, False)  # the sizes are a view of its file
        largest = max(largest, int(lines.sizes.sum()))
    streams = int(plan.table.evaluation.options.get("batch-size", 1))
    segment = int(options.get("tokens-per-sample") or 512)
    longest = max(1, largest // (streams * segment * 4))
    return max(1, min(math.ceil(largest / tokens), longest))


def departure(scale: Dict[str, Any]) -> str:
    """Return how a shrunk run departs from its table, in a few words."""
    asked, changes, shards = scale["asked"], scale["changes"], scale["shards"]
    read = f", 1 of {shards} parts of a split read" if shards > 1 else ""
    return f"--scale {asked['minutes']:g}: {changes['max-update']} of {scale['of_updates']} updates{read}"


def note(scale: Dict[str, Any]) -> str:
    """Return the note that belongs beside the results of a shrunk table."""
    asked, changes, shards = scale["asked"], scale["changes"], scale["shards"]
    read = f"Evaluations read the first of {shards} equal parts of a split. " if shards > 1 else ""
    return (
        f"Shrunk by --scale {asked['minutes']:g} to {changes['max-update']:,} of {scale['of_updates']:,} updates, "
        f"every row alike. {read}Sizes and data are not shrunk. These figures compare the rows at this budget; "
        "they reproduce nothing."
    )
