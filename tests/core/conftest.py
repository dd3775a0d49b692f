"""Run the core's tests as if no host were installed."""

import os

import pytest

from ..gpus import gpu
from . import hosts, interpreter


def pytest_configure() -> None:
    try:
        hosts.block()
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from None
    if os.environ.get("TRITON_INTERPRET") == "1":
        try:
            interpreter.quicken()
        except ModuleNotFoundError as error:
            raise pytest.UsageError(
                f"these tests interpret Triton's kernels, and {error.name} is not installed: "
                "pip install -c constraints.txt '.[dev,fused]', or bash tests/run.sh, which makes .venv"
            ) from None
    try:
        from .helpers import first_of_each_memory  # imports the core, which must not see a host

        first_of_each_memory()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.fixture(params=["stand-ins", pytest.param("cuda", marks=gpu)])
def device(request, monkeypatch):
    """A GPU, or a CPU with stand-ins for graphs."""
    if request.param == "cuda":
        return "cuda"
    from . import fake_graphs  # imports the core, which must not see a host

    fake_graphs.install(monkeypatch)
    return "cpu"
