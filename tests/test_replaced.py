"""Importing the package leaves fairseq as it is, but for the functions listed here; using it replaces a few more."""

import json
import subprocess
import sys

import pytest

from .helpers import USER_DIR

# As the table of `lamemo_fairseq.host.stand_in` has them.
IMPORTED = {
    "fairseq.checkpoint_utils.PathManager",
    "fairseq.checkpoint_utils.load_checkpoint_to_cpu",
    "fairseq.checkpoint_utils.load_model_ensemble_and_task",
    "fairseq.options.parse_args_and_arch",
}
SET_UP = {
    "fairseq.distributed.utils.all_gather_list",
    "fairseq_cli.train.Trainer",
    "fairseq_cli.train.train",
}
EVALUATED = {"fairseq_cli.eval_lm.eval_lm"}
# Entries that fairseq's registries gain, by registry: what a plugin is for.
REGISTERED = {
    "fairseq.registry.REGISTRIES.bpe.dataclass_registry": ["bytes", "characters"],
    "fairseq.registry.REGISTRIES.criterion.dataclass_registry": ["chunked_cross_entropy"],
    "fairseq.registry.REGISTRIES.criterion.registry": ["chunked_cross_entropy"],
    "fairseq.registry.REGISTRIES.scoring.dataclass_registry": ["no_score"],
    "fairseq.registry.REGISTRIES.scoring.registry": ["no_score"],
    "fairseq.tasks.TASK_CLASS_NAMES": ["SegmentLanguageModelingTask"],
    "fairseq.tasks.TASK_DATACLASS_REGISTRY": ["segment_language_modeling"],
    "fairseq.tasks.TASK_REGISTRY": ["segment_language_modeling"],
}
MODELS = "fairseq.models."  # the names of models, of which there are many
PARSER = "fairseq.tasks.segment_language_modeling_parser"  # that fairseq makes of a task it registers, for its docs

SCRIPT = """
import argparse, json, sys, types
from fairseq_cli import eval_lm, generate, hydra_train, interactive, train, validate
from fairseq import hub_utils, registry, tasks, utils
from omegaconf import OmegaConf

MODULES = {n: m for n, m in sorted(sys.modules.items())
           if n.split(".")[0] in ("fairseq", "fairseq_cli") and m.__name__ == n}
CLASSES = {f"{n}.{c.__qualname__}": c for n, m in MODULES.items() for c in vars(m).values()
           if isinstance(c, type) and c.__module__ == n}

def attributes():
    "Every attribute of every module and class that was there before."
    owners = {"fairseq.registry": registry, **MODULES, **CLASSES}
    return {f"{name}.{key}": value for name, owner in owners.items() for key, value in vars(owner).items()
            if not isinstance(value, types.ModuleType) and key not in ("__annotations__", "__warningregistry__")}

def contents(name, value, found, depth=3):
    "Dictionaries, sets and lists, and those within them, by identity: first name, itself, a copy."
    if isinstance(value, (dict, set, list)) and id(value) not in found:
        found[id(value)] = name, value, value.copy()
        for key in value if isinstance(value, dict) and depth else ():
            contents(f"{name}.{key}", value[key], found, depth - 1)

def differences(before, containers):
    after = attributes()
    changed = [name for name in sorted({*before, *after}) if name not in after or before.get(name) is not after[name]]
    added = {}
    for name, now, former in containers.values():
        gained = [str(entry) for entry in now if entry not in former]
        changed += [f"{name} lost {entry}" for entry in former if entry not in now]
        if isinstance(now, dict):
            changed += [f"{name}.{key}" for key in former if key in now and now[key] is not former[key]]
        if gained:
            added[name] = sorted(gained)
    return changed, added

def stage(do):
    before, containers = attributes(), {}
    for name, value in before.items():
        if not name.split(".")[-1].startswith("__"):
            contents(name, value, containers)
    try:
        do()
    except ValueError as error:
        assert "no data" in str(error), error
    return differences(before, containers)

def evaluate():
    from lamemo_fairseq.evaluation import use_for_eval_lm
    use_for_eval_lm()

task = OmegaConf.create({"_name": "segment_language_modeling", "data": None})
print("STAGES", json.dumps([
    stage(lambda: utils.import_user_module(argparse.Namespace(user_dir=sys.argv[1]))),
    stage(lambda: tasks.setup_task(task)),
    stage(evaluate),
]))
"""


@pytest.fixture(scope="module")
def stages():
    done = subprocess.run([sys.executable, "-c", SCRIPT, USER_DIR], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("STAGES", 1)[1])


def test_what_is_replaced(stages):
    imported, set_up, evaluated = ([set(names), added] for names, added in stages)
    assert imported[0] == {*IMPORTED, PARSER}
    assert set_up == [SET_UP, {}]
    assert evaluated == [EVALUATED, {}]
    assert len(IMPORTED | SET_UP | EVALUATED) <= 8


def test_what_is_registered(stages):
    added = stages[0][1]
    assert {name: entries for name, entries in added.items() if not name.startswith(MODELS)} == REGISTERED
