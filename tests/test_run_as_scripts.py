"""Functions of fairseq's commands are replaced where their callers read them, however the commands are started."""

import runpy
import sys
import types

import pytest

from lamemo_fairseq.evaluation import use_for_eval_lm
from lamemo_fairseq.host.commands import names_of
from lamemo_fairseq.host.training import prepare_training

COMMANDS = {"train": (prepare_training, ("Trainer", "train")), "eval_lm": (use_for_eval_lm, ("eval_lm",))}


@pytest.fixture(params=COMMANDS)
def spawned(request, monkeypatch):
    """A command, and its names in a process that `torch.multiprocessing` spawns for ``python -m``."""
    name = f"fairseq_cli.{request.param}"
    monkeypatch.delitem(sys.modules, name, raising=False)  # else Python remarks that it is imported
    main = types.ModuleType("__mp_main__")
    main.__dict__.update(runpy.run_module(name, run_name="__mp_main__", alter_sys=True))  # as multiprocessing does
    monkeypatch.setitem(sys.modules, "__main__", main)
    return request.param, main


def test_in_a_spawned_process(spawned):
    command, main = spawned
    prepare, replaced = COMMANDS[command]
    prepare()
    called = main.main.__globals__
    assert called is not main.__dict__
    assert all(hasattr(called[name], "__wrapped__") for name in replaced)


def test_a_script_with_such_names_of_its_own_is_left_alone(monkeypatch):
    script = types.ModuleType("__main__")
    exec("def eval_lm(): ...\ndef validate_and_save(): ...", script.__dict__)
    monkeypatch.setitem(sys.modules, "__main__", script)
    assert all(names.__dict__ is not script.__dict__ for command in COMMANDS for names in names_of(command))
