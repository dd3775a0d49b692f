"""The core is imported without a host, and without what only some of its uses need."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from .hosts import HOSTS

LATER = ("triton", "safetensors")  # for kernels, and for saving


@pytest.mark.parametrize("host", HOSTS)
def test_hosts_are_blocked_here(host):
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(host)


def test_the_package_offers_the_core_alone():
    import lamemo_fairseq

    assert lamemo_fairseq.__all__ == ["core"]
    assert not [name for name in sys.modules if name.startswith("lamemo_fairseq.") and ".core" not in name]


def test_a_fresh_process_imports_nothing_that_it_does_not_need():
    code = "import sys, lamemo_fairseq.core; print(*sys.modules)"
    command = [sys.executable, "-c", f"from tests.core import hosts; hosts.block(); {code}"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {name.split(".")[0] for name in done.stdout.split()}
    assert "lamemo_fairseq" in imported and not imported & set(LATER)


@pytest.mark.parametrize(
    ("version", "remedy"),
    [
        ((3, 10), "pip install --no-build-isolation fairseq-fixed"),
        ((3, 11), "pip install ve-fairseq"),
        ((3, 12), "pip install ve-fairseq"),
        ((3, 13), "pip install --no-build-isolation fairseq-fixed"),
        ((3, 14), "no build is known for Python 3.14, take 3.10 to 3.13"),
    ],
)
def test_what_needs_fairseq_says_so_in_one_line(version, remedy, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (*version, 0, "final", 0))
    with pytest.raises(
        ModuleNotFoundError, match=rf"fairseq is not installed: .*{remedy}.*core needs torch alone"
    ) as it:
        importlib.import_module("lamemo_fairseq.models")
    assert "\n" not in str(it.value)
