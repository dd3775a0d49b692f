"""Command lines of fairseq for the runs of a table, as lists, for the shell, and for SLURM."""

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

from .folder import user_dir
from .table import Evaluation, Run, Table, TableError, find, streams

# Options of training that evaluation shares.
SHARED = ("user-dir", "task", "cpu", "num-workers", "log-format")
# The value that a shell recipe leaves to the shell: the streams of a device.
_COMPUTED = re.compile(r"\$\(\(\d+ / GPUS\)\)")
MODULES = {"fairseq-train": "fairseq_cli.train", "fairseq-eval-lm": "fairseq_cli.eval_lm"}


def flags(options: Mapping[str, Any]) -> List[str]:
    """Return ``{"roll": True, "lr": 0.1}`` as ``--roll --lr 0.1``, without options that are false or null."""
    words = []
    for name, value in options.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words += [f"--{name}", str(value)]
    return words


def training_options(table: Table, row: str, changes: Mapping[str, Any]) -> Dict[str, Any]:
    """Return the options of fairseq-train for a row; *changes* come last and are the same for all rows."""
    return {**table.options, **find(table, row).options, **changes}


def shared_options(trained: Mapping[str, Any]) -> Dict[str, Any]:
    """Return those options of a training that its evaluations take over."""
    return {name: trained[name] for name in SHARED if name in trained}


def streams_a_device(table: Table, row: str, gpus: int) -> int:
    """Return the ``--batch-size`` of a row on each of *gpus* devices: their number does not change the run.

    Raises:
        TableError: the devices cannot share the streams evenly.
    """
    number = streams(table, row)
    if gpus < 1 or number % gpus:
        raise TableError(f"--gpus {gpus}: the {number} streams of row '{row}' cannot be shared evenly")
    return number // gpus


def train(
    table: Table, run: Run, checkpoints: str, changes: Mapping[str, Any], gpus: int = 1, batch_size: Any = None
) -> List[str]:
    """Return the arguments of fairseq-train."""
    options = {
        **training_options(table, run.row, changes),
        "batch-size": streams_a_device(table, run.row, gpus) if batch_size is None else batch_size,
        "seed": run.seed,
        "save-dir": checkpoints,
    }
    return [str(options.pop("data", table.data)), *flags(options)]


def evaluate(
    table: Table, row: str, checkpoint: str, evaluation: Evaluation, changes: Mapping[str, Any], shards: int = 1
) -> List[str]:
    """Return the arguments of fairseq-eval-lm; of *shards* equal divisions of the streams the first is read."""
    trained = training_options(table, row, changes)
    options: Dict[str, Any] = {
        **shared_options(trained),
        "path": checkpoint,
        "gen-subset": evaluation.subset,
        **table.evaluation.options,
    }
    if evaluation.mem_len is not None:
        without = find(table, row).without_memory
        nothing = table.evaluation.without_memory if without is None else without
        options["model-overrides"] = str({"mem_len": evaluation.mem_len} if evaluation.mem_len else dict(nothing))
    if evaluation.tokens_per_sample is not None:
        options["tokens-per-sample"] = evaluation.tokens_per_sample
    if shards > 1:
        options.update({"num-shards": shards, "shard-id": 0})
    return [str(trained.get("data", table.data)), *flags(options)]


def argv(command: str, arguments: Sequence[str]) -> List[str]:
    """Return a command of fairseq as this Python runs it."""
    return [sys.executable, "-m", MODULES[command], *located(arguments)]


def located(arguments: Sequence[str]) -> List[str]:
    """Return arguments with this machine's ``--user-dir``; a run's identity has the table's, the same everywhere."""
    before = ["", *arguments]
    return [user_dir(word) if before[i] == "--user-dir" else word for i, word in enumerate(arguments)]


def shell(command: str, arguments: Sequence[str], width: int = 118) -> str:
    """Return a command of fairseq for a shell, in lines that end in a backslash."""
    lines, line = [], command
    for word in _options(located(arguments)):
        if len(line) + len(word) + 3 > width:
            lines.append(line + " \\")
            line = "   "
        line += " " + word
    return "\n".join([*lines, line])


def _options(arguments: Sequence[str]) -> List[str]:
    """Return options with their values, quoted."""
    quoted: List[str] = []
    for word in arguments:
        text = word if _COMPUTED.fullmatch(word) else shlex.quote(word)
        if quoted and quoted[-1].startswith("--") and " " not in quoted[-1] and not word.startswith("--"):
            quoted[-1] += " " + text
        else:
            quoted.append(text)
    return quoted


def slurm(
    job: str, arguments: Sequence[str], gpus: int, log: Path, extra: Optional[str], environment: Optional[Path]
) -> str:
    """Return a line for SLURM that runs a part of a table, and runs that part once more if the node is lost.

    The job activates the *environment* first. Without one it starts this Python by its full path.
    """
    python = shlex.quote(sys.executable) if environment is None else f". {shlex.quote(str(environment))} && python"
    script = f"{python} -m {__package__} {shlex.join(arguments)}"
    devices = ["--gpus-per-node", str(gpus)] if gpus else []
    words = ["sbatch", "--job-name", job, "--nodes", "1", *devices, "--requeue", "--output", str(log)]
    return " ".join([shlex.join(words), *([extra] if extra else []), "--wrap", shlex.quote(script)])


def activation(environment: Optional[Path]) -> Optional[Path]:
    """Return the absolute path of the script that activates an environment; None if none is given or active.

    A path that does not exist here may exist where jobs run: a name that ends in ``.sh`` is then a script.

    Raises:
        TableError: the folder exists and is no virtual environment.
    """
    if environment is None:
        script = Path(sys.prefix, "bin", "activate")
        return script if sys.prefix != sys.base_prefix and script.exists() else None
    path = Path(os.path.abspath(environment))
    if path.is_file() or (path.suffix == ".sh" and not path.is_dir()):
        return path
    script = path / "bin" / "activate"
    if path.exists() and not script.exists():
        raise TableError(
            f"--environment {environment}: it has no bin/activate. "
            "Pass the folder of a virtual environment, or a shell script that activates one"
        )
    return script
