"""Print rows as recipes: a shell script and a YAML for fairseq-hydra-train, both from the row's command line."""

import difflib
import shlex
from pathlib import Path
from types import MappingProxyType
from typing import Any, Dict, Mapping, Sequence, Tuple, get_origin

import yaml

from . import commands, render
from .folder import user_dir
from .table import MEASURES, Evaluation, Run, Table, TableError, find, streams

# An option that several groups have belongs to the first of them.
GROUPS = ["common", "distributed_training", "dataset", "optimization", "checkpoint", "task", "model", "criterion"]
GROUPS += ["optimizer", "lr_scheduler"]
_HERE = "${oc.env:PWD}/"  # hydra changes the working directory
FORMS = ("commands", "shell", "yaml")
_START = """set -euo pipefail
[ -d {package} ] || {{ echo "there is no folder {package}: start from the root of the checkout" >&2; exit 1; }}"""
_SHARE = """# {number} streams over all GPUs that there are; CUDA_VISIBLE_DEVICES=0 takes one.
GPUS=$(python -c "import torch; print(max(1, torch.cuda.device_count()))")
if [ $(({number} % GPUS)) -ne 0 ]; then
    echo "{number} streams do not divide into $GPUS GPUs: choose some with CUDA_VISIBLE_DEVICES" >&2
    exit 1
fi"""
_ONE_GPU = """# On one GPU: several would cut the split into more streams.
export CUDA_VISIBLE_DEVICES=$(echo "${CUDA_VISIBLE_DEVICES:-0}" | cut -d, -f1)"""
NAMED = {
    "task": "task",
    "arch": "model",
    "criterion": "criterion",
    "optimizer": "optimizer",
    "lr-scheduler": "lr_scheduler",
}


def printed(form: str, table: Table, run: Run, name: str, gpus: int, changes: Mapping[str, Any], source: str) -> str:
    """Return a run of the table called *name* in one of `FORMS`; *source* is the command that prints it.

    Raises:
        TableError: the run has no such form.
    """
    if form == "commands":
        return "\n\n".join(lines(table, run, name, gpus, changes))
    if form == "yaml":
        return hydra(table, run, name, gpus, changes, source)
    if gpus != 1:
        raise TableError(f"--gpus {gpus}: a script shares the streams over all GPUs that it has; leave out --gpus")
    return script(table, run, name, changes, source)


def checkpoints(name: str, row: str) -> str:
    """Return the folder that the recipes of a row save to."""
    return f"checkpoints/{name}/{row}"


def lines(
    table: Table, run: Run, name: str, gpus: int = 1, changes: Mapping[str, Any] = MappingProxyType({})
) -> Tuple[str, str]:
    """Return training, and evaluation on the test set, for a shell."""
    saved = checkpoints(name, run.row)
    train = commands.train(table, run, saved, changes, gpus)
    test = Evaluation(table.evaluation.subsets[-1])
    evaluate = commands.evaluate(table, run.row, f"{saved}/checkpoint_best.pt", test, changes)
    return commands.shell("fairseq-train", train), commands.shell("fairseq-eval-lm", evaluate)


def script(table: Table, run: Run, name: str, changes: Mapping[str, Any], source: str) -> str:
    """Return a run as a shell script for the root of a checkout: the streams are shared over all GPUs."""
    options = commands.training_options(table, run.row, changes)
    number = streams(table, run.row)
    share = number if options.get("cpu") else f"$(({number} / GPUS))"
    train = commands.train(table, run, checkpoints(name, run.row), changes, batch_size=share)
    package = shlex.quote(user_dir(str(options.get("user-dir", "."))))
    comment = f"# {title(table, run.row, changes)}.\n# Printed by `{source}`."
    head = f"#!/usr/bin/env bash\n{comment}\n{_START.format(package=package)}"
    training, test = commands.shell("fairseq-train", train), lines(table, run, name, changes=changes)[1]
    if options.get("cpu"):
        return "\n".join([head, training, test])
    return "\n".join([head, _SHARE.format(number=number), training, _ONE_GPU, test])


def title(table: Table, row: str, changes: Mapping[str, Any]) -> str:
    """Return the title of a recipe, with the reported results unless *changes* make it another run."""
    described = find(table, row)
    splits = table.evaluation.subsets
    paper = "" if changes else render.reported(described, splits)
    reported = f" (reported {MEASURES[table.measure][1]}, {' / '.join(splits)}: {paper})" if paper else ""
    return f"{table.title}, {described.title}{reported}"


def hydra(table: Table, run: Run, name: str, gpus: int, changes: Mapping[str, Any], source: str) -> str:
    """Return a run as a YAML for fairseq-hydra-train, with the streams of one of *gpus* devices."""
    groups = config(table, run, name, gpus, changes)
    data = Path("$PWD") / str(changes.get("data", table.data))  # an absolute path stays as it is
    head = f"""# {title(table, run.row, changes)}.
# Printed by `{source}`.
#   fairseq-hydra-train --config-dir FOLDER_OF_THIS_FILE --config-name {run.row} task.data={data}
"""
    return head + "\n" + yaml.safe_dump(groups, sort_keys=False).rstrip()


def config(table: Table, run: Run, name: str, gpus: int, changes: Mapping[str, Any]) -> Dict[str, Any]:
    """Return the options of a run in hydra's groups."""
    given = {
        **commands.training_options(table, run.row, changes),
        "batch-size": commands.streams_a_device(table, run.row, gpus),
        "seed": run.seed,
        "save-dir": checkpoints(name, run.row),
    }
    given.pop("data", None)  # "???" below: hydra needs an absolute path
    groups = _groups(given)
    by_group: Dict[str, Any] = {group: {} for group in GROUPS}
    for option, group in NAMED.items():
        if option in given:
            by_group[group]["_name"] = given[option]
    for option, value in given.items():
        if option not in NAMED and value is not None and value is not False:
            key = option.replace("-", "_")
            owner = _owner(groups, key)
            several = get_origin(groups[owner].__dataclass_fields__[key].type) is list
            by_group[owner][key] = [value] if several and not isinstance(value, list) else value
    by_group["task"]["data"] = "???"
    if "user-dir" in given:
        package = user_dir(given["user-dir"])
        by_group["common"]["user_dir"] = package if Path(package).is_absolute() else _HERE + package
    by_group["checkpoint"]["save_dir"] = _HERE + by_group["checkpoint"]["save_dir"]
    return {group: options for group, options in by_group.items() if options}


def _groups(given: Dict[str, Any]) -> Dict[str, Any]:
    """Return the dataclass of each group of fairseq's configuration, with the choices of *given*."""
    from fairseq import criterions, models, optim, tasks, utils
    from fairseq.dataclass.configs import FairseqConfig
    from fairseq.optim import lr_scheduler

    if "user-dir" in given:
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
