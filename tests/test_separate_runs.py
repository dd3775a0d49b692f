"""The core's tests run without fairseq, and so apart from the others."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from . import conftest
from .core import hosts

ROOT = Path(__file__).parent.parent


def configured(*arguments, ignore=None):
    """What a run of pytest at the root with these files is going to do."""
    option, stash = SimpleNamespace(ignore=ignore), {}
    config = SimpleNamespace(
        args=list(arguments), option=option, stash=stash, invocation_params=SimpleNamespace(dir=ROOT)
    )
    conftest.pytest_configure(config)
    return option.ignore, stash.get(conftest.LEFT_OUT)


@pytest.mark.parametrize("arguments", [["tests/core"], ["tests/core/test_imports.py::test_x", "tests/core"]])
def test_a_run_of_the_core_alone(arguments):
    assert configured(*arguments) == (None, None)


@pytest.mark.parametrize(("arguments", "told"), [(["tests"], True), (["."], True), (["tests/test_streams.py"], False)])
def test_another_run_leaves_the_core_out_and_says_so(arguments, told):
    assert configured(*arguments) == ([str(ROOT / "tests/core")], told)
    assert configured(*arguments, ignore=["tests/core"])[1] is False


def test_both_at_once_are_refused_in_one_line():
    with pytest.raises(pytest.UsageError, match="tests/core blocks fairseq: run pytest tests/core, and the other"):
        configured("tests/core/test_imports.py", "tests/test_streams.py")


def test_the_core_is_not_tested_where_fairseq_has_been_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "fairseq", sys)
    with pytest.raises(RuntimeError, match="tests/core runs without fairseq, which this process has imported: run "):
        hosts.block()


@pytest.fixture
def run_tests(tmp_path):
    """Call tests/run.sh with stand-ins for all that it calls; of pytest return the exit status and the arguments."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/run.sh").write_text((ROOT / "tests/run.sh").read_text())
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/install.sh").write_text("")
    binaries = tmp_path / ".venv/bin"
    binaries.mkdir(parents=True)
    for name in ("ruff", "mypy"):
        (binaries / name).write_text(f"#!/bin/sh\nexit ${{{name.upper()}:-0}}\n")
    (binaries / "python").write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        "assert not sys.dont_write_bytecode, 'every process compiles what it imports'\n"
        "if sys.argv[1] == '-c':\n    sys.exit()  # transformers is there\n"
        "print('pytest', *sys.argv[3:])\n"
        "sys.exit(int(os.environ['OTHERS' if '--ignore' in sys.argv else 'CORE']))\n"
    )
    for binary in binaries.iterdir():
        binary.chmod(0o755)

    def run(*arguments, core=0, others=0, mypy=0):
        environment = {**os.environ, "CORE": str(core), "OTHERS": str(others), "MYPY": str(mypy)}
        environment["PYTHONDONTWRITEBYTECODE"] = "1"  # as images of containers set it
        command = ["bash", tmp_path / "tests/run.sh", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert not done.stderr
        called = [line.split("loadfile ")[1] for line in done.stdout.splitlines() if line.startswith("pytest")]
        return done.returncode, called

    return run


@pytest.mark.parametrize(
    ("arguments", "called"),
    [
        ([], ["tests/core", "--ignore tests/core tests"]),
        (["-k", "golden"], ["tests/core -k golden", "--ignore tests/core tests -k golden"]),
        (["-x", "tests/core/test_imports.py"], ["tests/core/test_imports.py -x"]),
        (["tests/test_streams.py", "-x"], ["--ignore tests/core tests/test_streams.py -x"]),
        (["tests"], ["tests/core", "--ignore tests/core tests"]),
    ],
    ids=str,
)
def test_the_test_command_runs_pytest_twice(arguments, called, run_tests):
    assert run_tests(*arguments) == (0, called)


@pytest.mark.parametrize(
    ("core", "others", "status"), [(0, 5, 0), (5, 0, 0), (5, 5, 5), (1, 0, 1), (0, 1, 1), (5, 2, 2), (1, 5, 1)]
)
def test_a_run_that_selects_nothing_is_no_failure_if_the_other_selected_something(core, others, status, run_tests):
    assert run_tests("-k", "x", core=core, others=others)[0] == status


def test_wrong_types_fail_the_run(run_tests):
    assert run_tests(mypy=1) == (1, ["tests/core", "--ignore tests/core tests"])
