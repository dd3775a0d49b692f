"""Table files: rows, seeds and evaluations as data, so that a new row is a few lines of YAML."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class TableError(ValueError):
    """A table file, or what was asked of it, makes no sense."""


@dataclass
class Figures:
    """Figures reported for a row, in the measure of the table, and where they are from."""

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
    sweeps: bool = True  # whether other lengths at test time mean anything for it
    without_memory: Optional[Dict[str, Any]] = None  # instead of the table's


@dataclass
class Evaluations:
    """What fairseq-eval-lm is asked of every trained model."""

    options: Dict[str, Any] = field(default_factory=dict)
    subsets: List[str] = field(default_factory=lambda: ["valid", "test"])
    memory: Sweep = field(default_factory=Sweep)  # values of mem_len
    segments: Sweep = field(default_factory=Sweep)  # values of --tokens-per-sample
    # What to override in place of mem_len 0, which no memory can have.
    without_memory: Dict[str, Any] = field(default_factory=lambda: {"memory": "none"})


@dataclass
class Table:
    """A table as its file says it."""

    title: str = MISSING
    data: str = MISSING  # folder of fairseq-preprocess
    measure: str = MISSING  # a name in MEASURES
    streams: int = MISSING  # read side by side on all devices together
    options: Dict[str, Any] = field(default_factory=dict)  # of fairseq-train, for every row
    seeds: List[int] = field(default_factory=lambda: [1])
    evaluation: Evaluations = field(default_factory=Evaluations)
    rows: Dict[str, Row] = field(default_factory=dict)


# Measures by name: the key of an evaluation's figure, what to call it, and digits behind the point.
MEASURES: Dict[str, Tuple[str, str, int]] = {
    "perplexity": ("perplexity", "perplexity", 2),
    "bits-per-character": ("loss", "bits per character", 3),
    "bits-per-byte": ("loss", "bits per byte", 3),
}


@dataclass(frozen=True)
class Evaluation:
    """One call of fairseq-eval-lm; None where the model's own length is meant."""

    subset: str
    mem_len: Optional[int] = None
    tokens_per_sample: Optional[int] = None

    @property
    def name(self) -> str:
        parts = [self.subset]
        if self.mem_len is not None:
            parts.append(f"memory-{self.mem_len}")
        if self.tokens_per_sample is not None:
            parts.append(f"segment-{self.tokens_per_sample}")
        return "-".join(parts)


@dataclass(frozen=True)
class Run:
    """One model to train: a row with a seed."""

    row: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.row}/seed-{self.seed}"


def load(path: Path) -> Table:
    """Read a table file.

    Raises:
        TableError: it says something unknown, or not enough.
    """
    try:
        loaded = OmegaConf.merge(OmegaConf.structured(Table), OmegaConf.load(path))
        table: Table = OmegaConf.to_object(loaded)  # type: ignore[assignment]
    except FileNotFoundError:
        raise TableError(f"there is no table file {path}") from None
    except (OmegaConfBaseException, TypeError) as error:
        raise TableError(f"{path}: {str(error).splitlines()[0]}") from error
    except yaml.YAMLError as error:
        raise TableError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if table.measure not in MEASURES:
        raise TableError(f"{path}: unknown measure '{table.measure}'; the known ones are {', '.join(MEASURES)}")
    if not table.rows or not table.seeds:
        raise TableError(f"{path}: a table needs at least one row and one seed")
    if not table.evaluation.subsets:
        raise TableError(f"{path}: evaluation.subsets names no split to evaluate")
    for name in table.rows:
        if streams(table, name) < 1:
            raise TableError(f"{path}: row '{name}' has {streams(table, name)} `streams`, it must have one at least")
    for name in ("batch-size", "seed", "save-dir"):
        if any(name in options for options in (table.options, *(row.options for row in table.rows.values()))):
            raise TableError(f"{path}: --{name} is set by the runner, from `streams`, `seeds` and --out")
    return table


def runs(table: Table, rows: Optional[List[str]] = None, seeds: Optional[List[int]] = None) -> List[Run]:
    """The runs of a table, all first seeds before the second ones, *rows* in their order.

    Raises:
        TableError: a row is unknown.
    """
    for name in rows or []:
        find(table, name)
    chosen = dict.fromkeys(rows or table.rows)
    return [Run(name, seed) for seed in dict.fromkeys(seeds or table.seeds) for name in chosen]


def find(table: Table, name: str) -> Row:
    """A row by its name.

    Raises:
        TableError: it is unknown.
    """
    if name not in table.rows:
        raise TableError(f"the table has no row '{name}'; its rows are {', '.join(table.rows)}")
    return table.rows[name]


def streams(table: Table, row: str) -> int:
    """The streams that a row's training reads side by side."""
    own = find(table, row).streams
    return table.streams if own is None else own


def evaluations(table: Table, row: Row) -> List[Evaluation]:
    """The evaluations of a row's models: the splits, then the lengths at test time."""
    wanted = table.evaluation
    found = [Evaluation(subset) for subset in wanted.subsets]
    if row.sweeps:
        found += [Evaluation(wanted.memory.subset, mem_len=length) for length in wanted.memory.lengths]
        found += [Evaluation(wanted.segments.subset, tokens_per_sample=n) for n in wanted.segments.lengths]
    return found
