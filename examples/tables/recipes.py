"""Rows as recipes: a shell script and a YAML for fairseq-hydra-train, both from the row's command line."""

import difflib
from pathlib import Path
from types import MappingProxyType
from typing import Any, Dict, List, Mapping, Sequence, Tuple, get_origin

import yaml

from . import commands, render
from .folder import ROOT, user_dir
from .table import Evaluation, Run, Table, TableError, find, streams

# Where an option belongs that several groups have: the first one owns it.
GROUPS = ["common", "distributed_training", "dataset", "optimization", "checkpoint", "task", "model", "criterion"]
GROUPS += ["optimizer", "lr_scheduler"]
_HERE = "${oc.env:PWD}/"  # hydra changes the working directory
WRITTEN_BY = f"# Written by `python -m {__package__} "
NAMED = {
    "task": "task",
    "arch": "model",
    "criterion": "criterion",
    "optimizer": "optimizer",
    "lr-scheduler": "lr_scheduler",
}


def write(table: Table, folder: Path, name: str) -> List[Path]:
    """Write the recipes of every row of the table called *name* to *folder*; returns the files.

    Raises:
        TableError: the folder is outside the checkout, or holds other files of these names.
    """
    if not folder.resolve().is_relative_to(ROOT):
        raise TableError(f"{folder} is outside {ROOT}: recipes start from there, so move the table below it")
    texts = written(table, folder.resolve().relative_to(ROOT), name)
    for former in (folder / file for file in texts):
        if former.exists() and WRITTEN_BY not in former.read_text(encoding="utf-8", errors="replace"):
            raise TableError(f"{former} is no recipe that was written from a table: move it, or rename the row")
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")
    return [folder / file for file in texts]


def written(table: Table, folder: Path, name: str) -> Dict[str, str]:
    """Return the texts of ROW.sh and ROW.yaml of every row; *folder* as seen from the root of the checkout."""
    texts = {}
    for row in table.rows:
        texts[f"{row}.sh"] = script(table, row, folder, name)
        texts[f"{row}.yaml"] = hydra(table, row, folder, name)
    return texts


def checkpoints(name: str, row: str) -> str:
    """The folder that the recipes of a row save to."""
    return f"checkpoints/{name}/{row}"


def lines(
    table: Table, run: Run, name: str, gpus: int = 1, changes: Mapping[str, Any] = MappingProxyType({})
) -> Tuple[str, str]:
    """Training, and evaluation on the test set, for a shell."""
    saved = checkpoints(name, run.row)
    train = commands.train(table, run, saved, changes, gpus)
    test = Evaluation(table.evaluation.subsets[-1])
    evaluate = commands.evaluate(table, run.row, f"{saved}/checkpoint_best.pt", test, changes)
    return commands.shell("fairseq-train", train), commands.shell("fairseq-eval-lm", evaluate)


def script(table: Table, row: str, folder: Path, name: str) -> str:
    """A row as a shell script."""
    run = Run(row, table.seeds[0])
    number = streams(table, row)
    train = commands.train(table, run, checkpoints(name, row), {}, batch_size=f"$(({number} / GPUS))")
    up = "/".join(".." for _ in folder.parts)
    return f"""#!/usr/bin/env bash
# {title(table, row)}.
{_writer(folder)}
#   bash {folder}/{row}.sh                            the {number} streams over all GPUs that there are
#   CUDA_VISIBLE_DEVICES=0 bash {folder}/{row}.sh     on one
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")/{up}"
GPUS=$(python -c "import torch; print(max(1, torch.cuda.device_count()))")
if [ $(({number} % GPUS)) -ne 0 ]; then
    echo "{number} streams do not divide into $GPUS GPUs: choose some with CUDA_VISIBLE_DEVICES" >&2
    exit 1
fi
{commands.shell("fairseq-train", train)}
# On one GPU: several would cut the split into more streams.
export CUDA_VISIBLE_DEVICES=$(echo "${{CUDA_VISIBLE_DEVICES:-0}}" | cut -d, -f1)
{lines(table, run, name)[1]}
"""


def _writer(folder: Path) -> str:
    return f"{WRITTEN_BY}{folder}/table.yaml --write-recipes`."


def title(table: Table, row: str) -> str:
    """Return the title of a recipe, with the reported figures."""
    described = find(table, row)
    splits = table.evaluation.subsets
    paper = render.reported(described, splits)
    return f"{table.title}, {described.title}" + (f" (reported {' / '.join(splits)}: {paper})" if paper else "")


def hydra(table: Table, row: str, folder: Path, name: str) -> str:
    """A row as a YAML for fairseq-hydra-train, with the streams on one device."""
    groups = config(table, row, name)
    head = [
        f"# {title(table, row)}.",
        _writer(folder),
        f"#   fairseq-hydra-train --config-dir {folder} --config-name {row} task.data=$PWD/{table.data}",
    ]
    return "\n".join(head) + "\n\n" + yaml.safe_dump(groups, sort_keys=False)


def config(table: Table, row: str, name: str) -> Dict[str, Any]:
    """The options of a row in hydra's groups."""
    given = {**commands.training_options(table, row, {}), "batch-size": streams(table, row), "seed": table.seeds[0]}
    given["save-dir"] = checkpoints(name, row)
    groups = _groups(given)
    by_group: Dict[str, Any] = {group: {} for group in GROUPS}
    for option, group in NAMED.items():
        if option in given:
            by_group[group]["_name"] = given[option]
    for option, value in given.items():
        if option not in NAMED and value not in (None, False):
            key = option.replace("-", "_")
            owner = _owner(groups, key)
            several = get_origin(groups[owner].__dataclass_fields__[key].type) is list
            by_group[owner][key] = [value] if several and not isinstance(value, list) else value
    by_group["task"]["data"] = "???"
    package = user_dir(by_group["common"]["user_dir"])
    by_group["common"]["user_dir"] = package if Path(package).is_absolute() else _HERE + package
    by_group["checkpoint"]["save_dir"] = _HERE + by_group["checkpoint"]["save_dir"]
    return {group: options for group, options in by_group.items() if options}


def _groups(given: Dict[str, Any]) -> Dict[str, Any]:
    """The dataclass of each group of fairseq's configuration, with the choices of *given*."""
    from fairseq import criterions, models, optim, tasks, utils
    from fairseq.dataclass.configs import FairseqConfig
    from fairseq.optim import lr_scheduler

    utils.import_user_module(_UserDir(user_dir(str(given["user-dir"]))))
    named = {
        "task": tasks.TASK_DATACLASS_REGISTRY,
        "arch": models.MODEL_DATACLASS_REGISTRY,
        "criterion": criterions.CRITERION_DATACLASS_REGISTRY,
        "optimizer": optim.OPTIMIZER_DATACLASS_REGISTRY,
        "lr-scheduler": lr_scheduler.LR_SCHEDULER_DATACLASS_REGISTRY,
    }
    for option, known in named.items():
        if option in given and given[option] not in known:
            raise TableError(f"fairseq's configuration has no --{option} {given[option]} for a YAML")
    common = {group: FairseqConfig.__dataclass_fields__[group].type for group in GROUPS if group not in NAMED.values()}
    return {**common, **{NAMED[option]: known[given[option]] for option, known in named.items() if option in given}}


class _UserDir:
    def __init__(self, user_dir: str):
        self.user_dir = user_dir


def _owner(groups: Dict[str, Any], key: str) -> str:
    owners: Sequence[str] = [group for group in GROUPS if group in groups and key in groups[group].__dataclass_fields__]
    if not owners:
        known = [option for group in groups.values() for option in group.__dataclass_fields__]
        near = ", ".join(f"--{option.replace('_', '-')}" for option in difflib.get_close_matches(key, known))
        raise TableError(
            f"fairseq's configuration has no --{key.replace('_', '-')} for a YAML"
            + (f"; near are {near}" if near else "")
        )
    return owners[0]
