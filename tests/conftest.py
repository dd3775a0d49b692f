"""One thread for all tests: tensors here are tiny, and threads that wait for each other cost more than they bring.

Without a GPU, Triton kernels are interpreted; Triton reads the variable when it is imported.
"""

import inspect
import math
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)

CORE = Path(__file__).parent / "core"
LEFT_OUT = pytest.StashKey[bool]()


def pytest_configure(config):
    """Keep the core's tests apart from the others: they block fairseq."""
    paths = [Path(config.invocation_params.dir, argument.split("::")[0]).resolve() for argument in config.args]
    within = [path == CORE or CORE in path.parents for path in paths]
    if any(within) and not all(within):
        raise pytest.UsageError("tests/core blocks fairseq: run pytest tests/core, and the other tests in a second run")
    if not all(within):
        ignored = config.option.ignore or []
        config.stash[LEFT_OUT] = not ignored and any(path in CORE.parents for path in paths)
        config.option.ignore = [*ignored, str(CORE)]


def pytest_terminal_summary(terminalreporter, config):
    if config.stash.get(LEFT_OUT, False):
        terminalreporter.write_line("tests/core was left out, as it blocks fairseq: run pytest tests/core")


def uses_device(item):
    """Return whether a test, its fixtures or what they call in its module name DEVICE of `tests/gpus.py`."""
    fixtures = [definition.func for made in item._fixtureinfo.name2fixturedefs.values() for definition in made]
    cases = [type(value) for value in item.callspec.params.values()] if hasattr(item, "callspec") else []
    functions = [method for case in cases for method in vars(case).values() if inspect.isfunction(method)]
    seen, codes = set(), [inspect.unwrap(function).__code__ for function in (item.function, *fixtures, *functions)]
    while codes:
        code = codes.pop()
        codes += [inner for inner in code.co_consts if inspect.iscode(inner)]
        for name in set(code.co_names) - seen:
            seen.add(name)
            value = getattr(item.module, name, None)
            if getattr(value, "__module__", None) == item.module.__name__:
                functions = vars(value).values() if inspect.isclass(value) else [value]
                codes += [function.__code__ for function in functions if inspect.isfunction(function)]
    return "DEVICE" in seen


def pytest_itemcollected(item):
    if isinstance(item, pytest.Function) and hasattr(item.module, "DEVICE") and uses_device(item):
        item.add_marker("gpu")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    needed = max((mark.args[0] for mark in item.iter_markers("gpu") if mark.args), default=0)
    if needed > torch.cuda.device_count():
        pytest.skip(f"needs GPUs: {needed}")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    from .helpers import write_data

    return write_data(tmp_path_factory.mktemp("data"), train=3000, valid=300, test=250)


@pytest.fixture
def texts(tmp_path):
    """The folder of `preprocessing.TEXTS`, with a file for each split."""
    from .preprocessing import write_texts

    return write_texts(tmp_path / "texts")


@pytest.fixture
def nan_buffers(monkeypatch):
    """A buffer that is not written in full, or read before it is, shows."""

    def filled(allocate, *args, **kwargs):
        made = allocate(*args, **kwargs)
        if made.is_floating_point():
            made.detach().fill_(math.nan)  # checkpointing makes a leaf of nothing, which must not change in place
        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        allocate = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _allocate=allocate, **k: filled(_allocate, *a, **k))


@pytest.fixture
def tiny(tiny_data, tmp_path, monkeypatch):
    """The file of `tables.TINY`; nothing is stopped, and commands are found from the root."""
    from examples.tables import folder

    from .tables import ROOT, TINY, process

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    process.STOPPED.clear()
    monkeypatch.setattr(folder, "PATIENCE", 0.0)
    (tmp_path / "tiny.yaml").write_text(TINY.format(data=tiny_data))
    return tmp_path / "tiny.yaml"
