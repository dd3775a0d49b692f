"""Rows as recipes: a shell script and a YAML for fairseq-hydra-train, both from the row's command line."""

from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import yaml
from omegaconf import OmegaConf

from . import commands, render
from .folder import ROOT
from .table import Evaluation, Run, Table, find

# Where an option belongs that several groups have: the first one owns it.
GROUPS = ["common", "distributed_training", "dataset", "optimization", "checkpoint", "task", "model", "criterion"]
GROUPS += ["optimizer", "lr_scheduler"]
NAMED = {
    "task": "task",
    "arch": "model",
    "criterion": "criterion",
    "optimizer": "optimizer",
    "lr-scheduler": "lr_scheduler",
}


def write(table: Table, folder: Path, name: str) -> List[Path]:
    """Write the recipes of every row of the table called *name* to *folder*; returns the files."""
    texts = written(table, folder.resolve().relative_to(ROOT), name)
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")
    return [folder / file for file in texts]


def written(table: Table, folder: Path, name: str) -> Dict[str, str]:
    """What stands in ROW.sh and ROW.yaml of every row; *folder* as seen from the root of the checkout."""
    texts = {}
    for row in table.rows:
        texts[f"{row}.sh"] = script(table, row, folder, name)
        texts[f"{row}.yaml"] = hydra(table, row, folder, name)
    return texts


def checkpoints(name: str, row: str) -> str:
    """The folder that the recipes of a row save to."""
    return f"checkpoints/{name}/{row}"


def lines(table: Table, row: str, name: str, gpus: int = 1) -> Tuple[str, str]:
    """Training, and evaluation on the test set, for a shell."""
    saved = checkpoints(name, row)
    train = commands.train(table, Run(row, table.seeds[0]), saved, {}, gpus)
    test = Evaluation(table.evaluation.subsets[-1])
    evaluate = commands.evaluate(table, row, f"{saved}/checkpoint_best.pt", test, {})
    return commands.shell("fairseq-train", train), commands.shell("fairseq-eval-lm", evaluate)


def script(table: Table, row: str, folder: Path, name: str) -> str:
    """A row as a shell script."""
    train = commands.train(
        table, Run(row, table.seeds[0]), checkpoints(name, row), {}, batch_size=f"$(({table.streams} / GPUS))"
    )
    up = "/".join(".." for _ in folder.parts)
    return f"""#!/usr/bin/env bash
# {title(table, row)}.
# Written by `{_writer(folder)}`.
#   bash {folder}/{row}.sh                            the {table.streams} streams over all GPUs that there are
#   CUDA_VISIBLE_DEVICES=0 bash {folder}/{row}.sh     on one
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")/{up}"
GPUS=$(python -c "import torch; print(max(1, torch.cuda.device_count()))")
if [ $(({table.streams} % GPUS)) -ne 0 ]; then
    echo "{table.streams} streams do not divide into $GPUS GPUs: choose some with CUDA_VISIBLE_DEVICES" >&2
    exit 1
fi
{commands.shell("fairseq-train", train)}
# On one GPU: several would cut the split into more streams.
export CUDA_VISIBLE_DEVICES=$(echo "${{CUDA_VISIBLE_DEVICES:-0}}" | cut -d, -f1)
{lines(table, row, name)[1]}
"""


def _writer(folder: Path) -> str:
    return f"python -m examples.tables {folder}/table.yaml --write-recipes"


def title(table: Table, row: str) -> str:
    """What a recipe is, with the reported figures."""
    found = find(table, row)
    splits = table.evaluation.subsets
    paper = render.reported(found, splits)
    return f"{table.title}, {found.title}" + (f" (reported {' / '.join(splits)}: {paper})" if paper else "")


def hydra(table: Table, row: str, folder: Path, name: str) -> str:
    """A row as a YAML for fairseq-hydra-train, with the streams on one device."""
    found = config(table, row, name)
    head = [
        f"# {title(table, row)}.",
        f"# Written by `{_writer(folder)}`.",
        f"#   fairseq-hydra-train --config-dir {folder} --config-name {row} task.data=$PWD/{table.data}",
    ]
    return "\n".join(head) + "\n\n" + yaml.safe_dump(found, sort_keys=False)


def config(table: Table, row: str, name: str) -> Dict[str, Any]:
    """The options of a row in hydra's groups."""
    from fairseq import options, utils
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    given = {**commands.training_options(table, row, {}), "batch-size": table.streams, "seed": table.seeds[0]}
    given["save-dir"] = checkpoints(name, row)
    arguments = [table.data, *commands.flags(given)]
    utils.import_user_module(_UserDir(str(given["user-dir"])))
    parsed = options.parse_args_and_arch(options.get_training_parser(), input_args=arguments)
    whole = convert_namespace_to_omegaconf(parsed)
    found: Dict[str, Any] = {group: {} for group in GROUPS}
    for option, group in NAMED.items():
        if option in given:
            found[group]["_name"] = given[option]
    for option in given:
        key = option.replace("-", "_")
        if option not in NAMED and given[option] not in (None, False):
            owner = _owner(whole, key)
            found[owner][key] = _plain(whole[owner][key])
    found["task"]["data"] = "???"
    here = "${oc.env:PWD}/"
    found["common"]["user_dir"] = here + found["common"]["user_dir"]
    found["checkpoint"]["save_dir"] = here + found["checkpoint"]["save_dir"]
    return {group: held for group, held in found.items() if held}


class _UserDir:
    def __init__(self, user_dir: str):
        self.user_dir = user_dir


def _owner(whole: Any, key: str) -> str:
    owners: Sequence[str] = [group for group in GROUPS if whole.get(group) is not None and key in whole[group]]
    if not owners:
        raise KeyError(f"no group of fairseq's configuration has '{key}'")
    return owners[0]


def _plain(value: Any) -> Any:
    """A value as YAML holds it; members of fairseq's choices are their names."""
    if OmegaConf.is_list(value):
        return [_plain(v) for v in value]
    return value if value is None or type(value) in (bool, int, float, str) else str(value)
