"""Train and evaluate the runs that a table still lacks, and write results.json where a run is complete."""

import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Queue
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, TypeVar

from tqdm import tqdm

from . import commands, logs, process
from .folder import (
    BusyError,
    ChangedError,
    RunFolder,
    comparable,
    data_identity,
    departures,
    differences,
    has_dictionary,
    read_json,
    write_json,
)
from .kept import SHAPE, Result, data_of, run_of
from .table import Evaluation, Run, Table, evaluations, find, streams
from .validation import fits

DIVERGED = re.compile(r"NaN or infinity|FloatingPointError")  # in the last lines of a diverged training's log
SCALE = "scale.json"  # how the table of a folder was shrunk


class RunError(RuntimeError):
    """A command of a run failed."""


@dataclass(frozen=True)
class Plan:
    """A table, and the choices of how to run it."""

    table: Table
    out: Path
    changes: Dict[str, Any] = field(default_factory=dict)  # options of all rows, given on the command line
    gpus: int = 1  # for each run
    evaluations_at_once: int = 1  # of a run, on one device
    shards: int = 1  # divisions of a split, of which evaluations read the first
    scale: Optional[Dict[str, Any]] = None  # how the table was shrunk
    results: Optional[Path] = None  # where results are kept and rendered, if not in `out`
    kept: Dict[str, Result] = field(default_factory=dict)  # of runs that have no folder in `out`

    @property
    def rendered(self) -> Path:
        """The folder of tables, plots and CSV files."""
        return self.results or self.out

    @property
    def speed(self) -> Path:
        """The file with the rates of rows that were trained alone."""
        return self.rendered / "speed.json"

    @property
    def on_cpu(self) -> bool:
        return bool({**self.table.options, **self.changes}.get("cpu"))

    def folder(self, run: Run) -> RunFolder:
        return RunFolder(self.out / run.row / f"seed-{run.seed}")

    def identity(self, run: Run, data_elsewhere: bool = False) -> Dict[str, Any]:
        """Return everything that a run's results depend on, as JSON. The number of GPUs does not matter.

        *data_elsewhere*: leave out data that this machine does not have.

        Raises:
            FileNotFoundError: data are missing.
        """
        options = {name: value for name, value in self.options(run).items() if name != "--data"}
        known = {"row": run.row, "seed": run.seed, "streams": streams(self.table, run.row), "options": options}
        if data_elsewhere and not has_dictionary(self.data(run)):
            return known
        return {**known, "data": data_identity(self.data(run))}

    def data(self, run: Run) -> str:
        """Return the folder of a run's data."""
        return str(self.options(run).get("--data", self.table.data))

    def options(self, run: Run) -> Dict[str, Any]:
        """Return the options of a run's training as given to fairseq-train, without those that the runner sets."""
        options = commands.training_options(self.table, run.row, self.changes)
        return {f"--{name}": value for name, value in options.items()}

    def evaluations(self, run: Run) -> List[Evaluation]:
        return evaluations(self.table, find(self.table, run.row))

    def evaluation_arguments(self, run: Run, evaluation: Evaluation, checkpoint: Path) -> List[str]:
        return commands.evaluate(self.table, run.row, str(checkpoint), evaluation, self.changes, self.shards)

    def evaluation_identity(self, run: Run, evaluation: Evaluation) -> List[str]:
        return self.evaluation_arguments(run, evaluation, Path("checkpoint_best.pt"))[1:]

    def result(self, run: Run) -> Optional[Result]:
        """Return the result of a run that is trained, with all evaluations or some; None if it is not trained.

        Raises:
            ValueError: a file in the run's folder is not as this runner writes it, or is gone.
        """
        folder = self.folder(run)
        training = read_json(folder.trained)
        if training is None:
            return self.kept.get(run.name)
        evaluations = {e.name: read_json(folder.evaluated(e.name)) for e in self.evaluations(run)}
        result = {
            "run": read_json(folder.identity),
            "training": training,
            "evaluations": {name: evaluation for name, evaluation in evaluations.items() if evaluation is not None},
            "scale": self.scale or read_json(self.out / SCALE),
            "starts": folder.started(),
        }
        for part, shape in SHAPE.items():
            if not fits(result[part], shape):
                place = self.out if part == "scale" else folder.path
                raise ValueError(f"the {part} of {place} cannot be read: restore its files, or move it away")
        return result

    def otherwise(self, result: Result) -> List[str]:
        """Return where a result's training departs from its row in the table; what --scale shrank is left out."""
        identity = result["run"]
        run = run_of(result)
        unchanged = replace(self, changes=(result["scale"] or {}).get("changes", {}))
        wanted = {"streams": streams(self.table, run.row), **unchanged.options(run)}
        wanted.pop("--data", None)
        words = departures({"streams": identity["streams"], **identity["options"]}, wanted)
        data, of_table = data_of(result), unchanged.data(run)
        here = data_identity(of_table) if identity["data"] and has_dictionary(of_table) else None
        if here is not None and identity["data"] == here:  # maybe by another path
            return words
        if here is not None and data in (None, of_table):  # data made anew, or those of another machine
            return [*words, *differences(identity["data"], here, f"data {of_table},")]
        return [*words, *departures({"data": data or of_table}, {"data": of_table})]

    def trained(self) -> List[Run]:
        """Return the trained runs of the table's rows, whatever their seeds."""
        return [run for run in self._trained() if run.row in self.table.rows]

    def elsewhere(self) -> List[Run]:
        """Return the trained runs of rows that the table does not have: of another table, or of a row's former name."""
        return [run for run in self._trained() if run.row not in self.table.rows]

    def _trained(self) -> List[Run]:
        folders = [path.parent for path in self.out.glob("*/seed-*/trained.json")]
        names = dict.fromkeys([*self.kept, *(f"{path.parent.name}/{path.name}" for path in folders)])
        pairs = [name.rsplit("/seed-", 1) for name in names]
        return sorted((Run(row, int(seed)) for row, seed in pairs if seed.isdecimal()), key=lambda run: run.seed)

    def missing(self, run: Run) -> List[Evaluation]:
        """Return the evaluations that a run still lacks."""
        result = self.result(run)
        evaluations = {} if result is None else result["evaluations"]
        return [
            evaluation
            for evaluation in self.evaluations(run)
            if evaluations.get(evaluation.name, {}).get("identity") != self.evaluation_identity(run, evaluation)
        ]

    def complete(self, run: Run) -> bool:
        folder = self.folder(run)
        done = (folder.results.exists() and folder.trained.exists()) or run.name in self.kept
        return done and not self.missing(run)


@dataclass(frozen=True)
class Slot:
    """A GPU, a group of GPUs or a share of the CPU, for one run at a time."""

    devices: Tuple[str, ...] = ()  # of CUDA; none for a CPU

    @property
    def shown(self) -> Optional[str]:
        return ",".join(self.devices) or None

    def environment(self, count: Optional[int] = None) -> Dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.devices[:count])}


def check(plan: Plan, runs: Sequence[Run], data_elsewhere: bool = False) -> List[Run]:
    """Return the runs that are not complete, after checking that no folder holds another run.

    *data_elsewhere*: do not compare data that this machine does not have.

    Raises:
        ChangedError: a folder holds another run, or the stored results are of another run.
        FileNotFoundError: the data are missing, and *data_elsewhere* is false.
    """
    for run in runs:
        wanted = plan.identity(run, data_elsewhere)
        plan.folder(run).check(wanted)
        kept = comparable(plan.kept[run.name]["run"], wanted) if run.name in plan.kept else wanted
        if kept != wanted:
            changed = "; ".join(differences(kept, wanted))
            raise ChangedError(
                f"{plan.results} keeps the results of another {run.name}: {changed}. "
                "Ask for the same options, or keep these in another folder with --results"
            )
    return [run for run in runs if not plan.complete(run)]


def check_kept(plan: Plan) -> None:
    """Refuse trained runs in the folder of runs that are other ones than the stored results of their names.

    Raises:
        ChangedError: there is one. Its result would take the place of the stored one.
    """
    for run in plan.trained():
        kept, result = plan.kept.get(run.name), plan.result(run)  # of the folder, if it has one
        if kept is not None and result is not None and kept["run"] != result["run"]:
            raise ChangedError(
                f"{plan.folder(run).path} holds another {run.name} than {plan.results}: "
                f"{'; '.join(differences(kept['run'], result['run']))}. Take another folder with --out, or move this "
                "one away"
            )


def execute(plan: Plan, runs: Sequence[Run], slots: Sequence[Slot]) -> List[str]:
    """Run all that is missing, one run at a time in each slot.

    Returns:
        A message for each run that failed; the others are complete.
    """
    todo = check(plan, runs)
    with progress(plan.table.title, len(runs), len(runs) - len(todo)) as bar:
        board = Board(bar)

        def work(run: Run, slot: Slot) -> Optional[str]:
            message = None
            try:
                if process.STOPPED.is_set():
                    message = f"{run.name}: not started"
                else:
                    complete(plan, run, slot, board)
            except (RunError, BusyError, OSError, ValueError) as error:
                message = f"{run.name}: {error}"
            board.end(run, complete=message is None)
            return message

        return [message for message in in_slots(work, todo, slots) if message is not None]


Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


def in_slots(work: Callable[[Item, Slot], Outcome], items: Sequence[Item], slots: Sequence[Slot]) -> Iterator[Outcome]:
    """Call ``work(item, slot)`` for every item, one at a time in each slot; return results in the items' order.

    An interrupt ends the commands that run.
    """
    free: Queue[Slot] = Queue()
    for slot in slots:
        free.put(slot)

    def in_a_free_one(item: Item) -> Outcome:
        slot = free.get()
        try:
            return work(item, slot)
        finally:
            free.put(slot)

    with ThreadPoolExecutor(len(slots)) as pool:
        try:
            yield from pool.map(in_a_free_one, items)
        except BaseException:
            process.stop()
            raise


def complete(plan: Plan, run: Run, slot: Slot, board: "Board") -> None:
    """Train a run unless it is trained, run its missing evaluations, and write its results.

    Raises:
        RunError: a command failed.
        BusyError: another process has the run's folder.
    """
    folder = plan.folder(run)
    with folder.lock() as lock:
        folder.claim(plan.identity(run))
        if not folder.trained.exists():
            _train(plan, run, folder, slot, lock, board)
        missing = plan.missing(run)
        if missing:
            _evaluate(plan, run, folder, missing, slot, lock, board)
        write_json(folder.results, plan.result(run))


def _train(plan: Plan, run: Run, folder: RunFolder, slot: Slot, lock: int, board: "Board") -> None:
    arguments = commands.train(plan.table, run, str(folder.checkpoints), plan.changes, max(1, len(slot.devices)))
    argv = commands.argv("fairseq-train", arguments)
    folder.note_start([["fairseq-train", *arguments]], slot.shown)
    start = logs.size(folder.log)
    ended = process.run(
        argv, folder.log, slot.environment(), [lock], lambda: board.show(run, logs.now(folder.log) or "starts")
    )
    if ended.code:
        again = diverged(plan, run, start) or retry(ended.code, folder.log, "to go on from the last checkpoint", start)
        raise RunError(failure("fairseq-train", ended.code, folder.log, again, start))
    folder.forget_evaluations()
    if not folder.checkpoint.exists():
        raise RunError(
            f"fairseq-train ended without {folder.checkpoint}, as no validation had a loss. Let row '{run.row}' "
            f"validate before its end, and move {folder.path} away"
        )
    options = commands.training_options(plan.table, run.row, plan.changes)
    valid = str(options.get("valid-subset", "valid")).split(",")[0]  # by which fairseq chooses a checkpoint
    write_json(folder.trained, {**logs.training(folder.log, valid), "host_memory_gib": ended.memory_gib})


def _evaluate(
    plan: Plan, run: Run, folder: RunFolder, missing: List[Evaluation], slot: Slot, lock: int, board: "Board"
) -> None:
    if not folder.checkpoint.exists():
        names = ", ".join(evaluation.name for evaluation in missing)
        raise RunError(
            f"{folder.checkpoint} is gone, and these are not evaluated: {names}. "
            f"To train it again, move {folder.path} away"
        )
    jobs = folder.path / "evaluations" / "jobs.json"
    log = folder.path / "evaluations" / "log"
    wanted = [
        {
            "identity": plan.evaluation_identity(run, evaluation),
            "arguments": commands.located(plan.evaluation_arguments(run, evaluation, folder.checkpoint)),
            "log": str(folder.evaluated(evaluation.name).with_suffix(".log")),
            "result": str(folder.evaluated(evaluation.name)),
        }
        for evaluation in missing
    ]
    write_json(jobs, wanted)
    folder.note_start([["fairseq-eval-lm", *job["arguments"]] for job in wanted], slot.shown)

    def watch() -> None:
        left = len(plan.missing(run))
        board.show(run, f"{len(missing) - left} of {len(missing)} evaluations")

    watch()
    # One device: an evaluation on several would cut the split into other streams.
    argv = [sys.executable, "-m", f"{__package__}.evaluate", str(jobs), str(plan.evaluations_at_once)]
    ended = process.run(argv, log, slot.environment(1), [lock], watch)
    if ended.code:
        # Evaluations that were not started have no log, and those that succeeded are not missing.
        logs_left = [folder.evaluated(evaluation.name).with_suffix(".log") for evaluation in plan.missing(run)]
        inner = next((path for path in logs_left if path.exists()), log)
        again = "If the message names an option, change it. Start again to do what is missing"
        raise RunError(failure("fairseq-eval-lm", ended.code, inner, again))


def retry(code: int, log: Path, purpose: str, start: int = 0) -> str:
    """Return the advice on a training that failed: started again, one that ended before it trained does so again."""
    if code > 0 and not logs.began(log, start):
        return "It ended before it trained. Change what the message names, and start again"
    return f"Start again {purpose}"


def diverged(plan: Plan, run: Run, start: int) -> Optional[str]:
    """Return the advice on a training that diverged, as its log says from *start* on; None if it did not diverge."""
    folder = plan.folder(run)
    if not any(map(DIVERGED.search, logs.tail(folder.log, start=start))):
        return None
    options = commands.training_options(plan.table, run.row, plan.changes)
    ways = [f"lr below {options['lr']}"] if "lr" in options else ["a lower lr"]
    ways.append(f"clip-norm below {options['clip-norm']}" if options.get("clip-norm") else "clip-norm, such as 0.25")
    ways += [f"{name}: false" for name in ("fp16", "amp") if options.get(name)]
    return (
        f"It diverged, and would do so again. Give row '{run.row}' other options in the table ({' or '.join(ways)}; "
        f"--set gives them to all rows), and move {folder.path} away"
    )


def failure(command: str, code: int, log: Path, again: str, start: int = 0) -> str:
    """Return the message on a command that failed, with what it logged from *start* on, and on starting it *again*."""
    shown = "\n    ".join(logs.tail(log, start=start))
    return f"{command} ended with {code}. The end of {log}:\n    {shown}\n  {again}"


def progress(title: str, total: int, done: int) -> Any:
    """A progress bar of runs, shown again at most once a minute where it goes to a file."""
    every = 0.1 if sys.stderr.isatty() else 60.0
    # The bar is refreshed by time, not by the number of runs: most of its text changes within a run.
    return tqdm(total=total, initial=done, desc=title, unit="run", leave=True, mininterval=every, miniters=0)


class Board:
    """Return one line that says where every run stands."""

    def __init__(self, bar: Any):
        self._bar = bar
        self._lines: Dict[str, str] = {}
        self._lock = threading.Lock()

    def show(self, run: Run, words: str) -> None:
        with self._lock:
            self._lines[run.name] = words
            line = "; ".join(f"{name}: {words}" for name, words in self._lines.items())
            self._bar.set_postfix_str(line, refresh=False)
            self._bar.update(0)

    def end(self, run: Run, complete: bool) -> None:
        """Show no more of a run, and count it if it is complete."""
        with self._lock:
            self._lines.pop(run.name, None)
            self._bar.update(int(complete))
