"""Refusals of this package end a command in one line; any other error keeps its traceback."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fairseq import options

from lamemo_fairseq import refusals
from lamemo_fairseq.core.folder import check_folder
from lamemo_fairseq.host import interruption
from lamemo_fairseq.host.configuration import read_ours
from lamemo_fairseq.host.optimizer_rules import _first


def error_of(function, *arguments):
    with pytest.raises(Exception) as caught:
        function(*arguments)
    return caught.value


def elsewhere():
    raise ValueError("of another package")


def own(statement):
    """A function of a user's own memory."""
    names = {"__name__": "lamemo_fairseq.core.memory.own"}
    exec(f"def check(): {statement}", names)
    return names["check"]


@pytest.mark.parametrize(
    "function, arguments, refused",
    [
        (check_folder, (Path("/dev/null/x"), "--save-dir"), True),
        (read_ours, (__file__,), True),  # of a class of this package
        (_first, ("half",), False),  # float() raises it
        (_first, ([],), False),
        (elsewhere, (), False),
        (own("raise ValueError('--share is 2, it must be at most 1')"), (), True),
        (own("raise ValueError"), (), False),  # an empty line would tell nothing
        (check_folder, (None, "--save-dir"), False),
    ],
)
def test_what_is_printed(function, arguments, refused, monkeypatch, capsys):
    error = error_of(function, *arguments)
    others = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: others.append(error))
    refusals.print_in_one_line()
    refusals.print_in_one_line()  # once is enough
    sys.excepthook(type(error), error, error.__traceback__)
    assert capsys.readouterr().err == (f"{error}\n" if refused else "")
    assert others == ([] if refused else [(type(error), error, error.__traceback__)])


@pytest.mark.parametrize(
    ("raises", "lacking"),
    [
        (lambda: torch.empty(1 << 50, dtype=torch.uint8), "1,048,576.00 GiB"),
        (
            lambda: raise_(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has")),
            "2.50 GiB",
        ),
        (lambda: raise_(RuntimeError("CUDA error: out of memory")), "a tensor"),
        (lambda: raise_(RuntimeError("a bug")), None),
    ],
)
def test_a_lack_of_memory_is_told_in_one_line(raises, lacking, monkeypatch, capsys):
    others = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: others.append(error))
    command = ["data", "--task", "segment_language_modeling", "--arch", "lamemo_lm", "--optimizer", "adam", "--lr", "1"]
    options.parse_args_and_arch(options.get_training_parser(), [*command, "--max-update", "1", "--batch-size", "1"])
    error = error_of(raises)
    sys.excepthook(type(error), error, error.__traceback__)
    told = capsys.readouterr().err
    assert len(others) == (lacking is None)
    if lacking is not None:
        assert told.startswith(
            f"out of memory, with no room for {lacking}: pass a smaller --tokens-per-sample, --mem-len"
        )
        assert told.endswith("also --beam, --max-len-a or --max-len-b\n") and told.count("\n") == 1


def raise_(error):
    raise error


def test_development_mode_shows_the_traceback(monkeypatch, capsys):
    error = error_of(check_folder, Path("/dev/null/x"), "--save-dir")
    others = []
    monkeypatch.setattr(refusals, "sys", SimpleNamespace(flags=SimpleNamespace(dev_mode=True), stderr=sys.stderr))
    refusals._print(lambda *error: others.append(error), type(error), error, error.__traceback__)
    assert len(others) == 1 and not capsys.readouterr().err


def test_a_command_line_that_is_refused_is_printed_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    command = ["data", "--task", "segment_language_modeling", "--arch", "lamemo_ln"]
    error = error_of(options.parse_args_and_arch, options.get_training_parser(), command)
    sys.excepthook(type(error), error, error.__traceback__)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("--arch lamemo_ln is not known: did you mean lamemo_lm")


def test_many_commands_of_one_process_add_no_hooks(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", lambda *error: None)
    hooks = []
    for _ in range(3):
        refusals.print_in_one_line()
        interruption.end_in_one_line()
        hooks.append(sys.excepthook)
    assert hooks[1] is hooks[0] and hooks[2] is hooks[0]
