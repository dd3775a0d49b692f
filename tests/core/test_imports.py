"""The core is imported without a host, and without what only some of its uses need."""

import importlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lamemo_fairseq import convert_checkpoint

from .hosts import HOSTS

LATER = ("triton", "safetensors", "sacremoses", "sentencepiece")  # for kernels, for saving, and for texts


@pytest.mark.parametrize("host", HOSTS)
def test_hosts_are_blocked_here(host):
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(host)


def test_the_package_offers_the_core_alone():
    import lamemo_fairseq

    assert lamemo_fairseq.__all__ == ["core"]


def test_a_fresh_process_imports_nothing_that_it_does_not_need():
    code = "import sys, lamemo_fairseq.core; print(*sys.modules)"
    command = [sys.executable, "-c", f"from tests.core import hosts; hosts.block(); {code}"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    names = done.stdout.split()
    assert not [name for name in names if name.startswith("lamemo_fairseq.") and ".core" not in name]
    imported = {name.split(".")[0] for name in names}
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
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(
        ModuleNotFoundError, match=rf"fairseq is not installed: .*{remedy}.*core needs torch alone"
    ) as it:
        importlib.import_module("lamemo_fairseq.models")
    assert "\n" not in str(it.value)


@pytest.mark.parametrize("module", ["lamemo_fairseq.score", "lamemo_fairseq.analysis", "preprocess", "examples.tables"])
def test_commands_print_that_line_alone(module):
    command = [sys.executable, "-m", "tests.core.hosts", module, "--help"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"fairseq is not installed: [^\n]+\n", done.stderr)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, r"transformers is not installed: pip install 'transformers>=5\.24'"),
        ("5.9.1", r"transformers 5\.9\.1 is too old: pip install 'transformers>=5\.24'"),
    ],
)
def test_transformers_is_asked_for_in_one_line(version, message, tmp_path, monkeypatch):
    def found(package, version_of=importlib.metadata.version):
        if package == "transformers" and version is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return version if package == "transformers" else version_of(package)

    monkeypatch.setattr(importlib.metadata, "version", found)
    for name in [name for name in sys.modules if name.startswith("lamemo_fairseq.huggingface")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match=f"convert_checkpoint: {message}") as refused:
        convert_checkpoint.main(["export", "--format", "transformers", str(tmp_path), str(tmp_path / "out")])
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()
