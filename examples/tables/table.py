"""Read table files: rows, seeds and evaluations as data, so that a new row is a few lines of YAML."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from . import validation
from .validation import TableError

LARGEST_SEED = 2**32 - 1  # the largest that NumPy accepts


@dataclass
class Figures:
    """Results reported for a row, in the measure of the table, and their source."""

    valid: Optional[float] = None
    test: Optional[float] = None
    source: str = ""


@dataclass
class Sweep:
    """Lengths at test time on one split."""

    subset: str = "test"
    lengths: List[int] = field(default_factory=list)


@dataclass
class Row:
    """A model: options of fairseq-train besides those of the table."""

    title: str = MISSING
    options: Dict[str, Any] = field(default_factory=dict)
    streams: Optional[int] = None  # instead of the table's
    paper: Figures = field(default_factory=Figures)
    sweeps: bool = True  # whether the model can be evaluated at other lengths
    without_memory: Optional[Dict[str, Any]] = None  # instead of the table's


@dataclass
class Evaluations:
    """The evaluations by fairseq-eval-lm of every trained model."""

    options: Dict[str, Any] = field(default_factory=dict)
    subsets: List[str] = field(default_factory=lambda: ["valid", "test"])
    memory: Sweep = field(default_factory=Sweep)  # values of mem_len
    segments: Sweep = field(default_factory=Sweep)  # values of --tokens-per-sample
    # Options to override for the length 0, in place of mem_len.
    without_memory: Dict[str, Any] = field(default_factory=lambda: {"memory": "none"})


@dataclass
class Table:
    """The contents of a table file."""

    title: str = MISSING
    data: str = MISSING  # folder of fairseq-preprocess
    measure: str = MISSING  # a name in MEASURES
    streams: int = MISSING  # read side by side on all devices together
    options: Dict[str, Any] = field(default_factory=dict)  # of fairseq-train, for every row
    seeds: List[int] = field(default_factory=lambda: [1])
    evaluation: Evaluations = field(default_factory=Evaluations)
    rows: Dict[str, Row] = field(default_factory=dict)


# Measures by name: the key of an evaluation's value, its name in tables, and digits behind the point.
MEASURES: Dict[str, Tuple[str, str, int]] = {
    "perplexity": ("perplexity", "perplexity", 2),
    "bits-per-character": ("loss", "bits per character", 3),
    "bits-per-byte": ("loss", "bits per byte", 3),
}


# Options of fairseq-eval-lm with which the loss is that of a word, joined from tokens.
JOINING = ("post-process", "remove-bpe")


@dataclass(frozen=True)
class Evaluation:
    """A call of fairseq-eval-lm; None stands for the model's own length."""

    subset: str
    mem_len: Optional[int] = None
    tokens_per_sample: Optional[int] = None

    @property
    def name(self) -> str:
        words = [self.subset]
        if self.mem_len is not None:
            words.append(f"memory-{self.mem_len}")
        if self.tokens_per_sample is not None:
            words.append(f"segment-{self.tokens_per_sample}")
        return "-".join(words)


@dataclass(frozen=True)
class Run:
    """A model to train: a row with a seed."""

    row: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.row}/seed-{self.seed}"


def load(path: Path) -> Table:
    """Read a table file.

    Raises:
        TableError: the file says something unknown, or not enough.
    """
    text = _text(path)
    try:
        loaded = OmegaConf.merge(OmegaConf.structured(Table), OmegaConf.load(io.StringIO(text)))
        table: Table = OmegaConf.to_object(loaded)  # type: ignore[assignment]
    except (OmegaConfBaseException, TypeError, OSError) as error:
        raise TableError(f"{path}: {str(error).splitlines()[0]}") from error
    except yaml.YAMLError as error:
        raise TableError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise TableError(f"{path} has a value that contains itself: write it out without & and *") from None
    try:
        _check(table)
    except TableError as error:
        raise TableError(f"{path}: {error}") from None
    return table


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        from lamemo_fairseq.core.names import nearest_path  # with fairseq, which takes seconds to import

        raise TableError(f"there is no table file {path}{nearest_path(path)}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise TableError(f"{path} is not UTF-8 in line {line}: save it as UTF-8") from None


def _check(table: Table) -> None:
    """Check that a table makes sense, and that its names can be those of files.

    Raises:
        TableError: as for `load`.
    """
    if table.measure not in MEASURES:
        raise TableError(f"unknown measure '{table.measure}'; the known ones are {', '.join(MEASURES)}")
    if not table.rows or not table.seeds:
        raise TableError("a table needs at least one row and one seed")
    if not table.evaluation.subsets:
        raise TableError("evaluation.subsets names no split to evaluate")
    validation.line_of_text("the table's title", table.title)
    validation.folder("data", table.data)
    validation.options("options", table.options, validation.SET_IN_TRAINING)
    for name, row in table.rows.items():
        validation.file_name("a row", name)
        validation.line_of_text(f"the title of row '{name}'", row.title)
        if row.paper.source:
            validation.line_of_text(f"the source of row '{name}'", row.paper.source)
        validation.options(f"row '{name}'", row.options, validation.SET_IN_TRAINING)
        if streams(table, name) < 1:
            raise TableError(f"row '{name}' has {streams(table, name)} `streams`, it must have one at least")
        _check_evaluations(table, row)
    _check_seeds(table.seeds)


def _check_evaluations(table: Table, row: Row) -> None:
    wanted = table.evaluation
    validation.options("evaluation.options", wanted.options, validation.SET_IN_EVALUATION)
    for subset in (*wanted.subsets, wanted.memory.subset, wanted.segments.subset):
        validation.file_name("a split", subset)
    for sweep, least in (("memory", 0), ("segments", 1)):
        lengths = getattr(wanted, sweep).lengths
        if any(length < least for length in lengths):
            raise TableError(f"evaluation.{sweep} has the length {min(lengths)}, it must be {least} at least")
    joined = next((name for name in JOINING if name in wanted.options), None)
    if joined is not None and table.measure != "perplexity":
        raise TableError(f"evaluation.options: with --{joined} losses are those of words, not {table.measure}")
    if wanted.memory.lengths and "model-overrides" in wanted.options:
        raise TableError("evaluation.options: --model-overrides is set by the runner, from `evaluation.memory`")
    several = validation.twice([evaluation.name for evaluation in evaluations(table, row)])
    if several:
        raise TableError(f"the evaluation '{next(iter(several))}' is asked for twice: name each split and length once")


def _check_seeds(seeds: List[int]) -> None:
    for seed in seeds:
        if not 0 <= seed <= LARGEST_SEED:
            raise TableError(f"there is no seed {seed}: take one from 0 to {LARGEST_SEED}")


def runs(table: Table, rows: Optional[List[str]] = None, seeds: Optional[List[int]] = None) -> List[Run]:
    """Return the runs of the table, all first seeds before the second ones, *rows* in their order.

    Raises:
        TableError: a row is unknown, or a seed is not a valid number.
    """
    for name in rows or []:
        find(table, name)
    _check_seeds(seeds or [])
    chosen = dict.fromkeys(rows or table.rows)
    return [Run(name, seed) for seed in dict.fromkeys(seeds or table.seeds) for name in chosen]


def find(table: Table, name: str) -> Row:
    """Return a row by its name.

    Raises:
        TableError: the row is unknown.
    """
    if name not in table.rows:
        raise TableError(f"the table has no row '{name}'; its rows are {', '.join(table.rows)}")
    return table.rows[name]


def streams(table: Table, row: str) -> int:
    """Return the number of streams that a row's training reads side by side."""
    own = find(table, row).streams
    return table.streams if own is None else own


def evaluations(table: Table, row: Row) -> List[Evaluation]:
    """Return the evaluations of a row's models: the splits, then the lengths at test time."""
    wanted = table.evaluation
    result = [Evaluation(subset) for subset in wanted.subsets]
    if row.sweeps:
        result += [Evaluation(wanted.memory.subset, mem_len=length) for length in wanted.memory.lengths]
        result += [Evaluation(wanted.segments.subset, tokens_per_sample=n) for n in wanted.segments.lengths]
    return result
