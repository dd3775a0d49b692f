"""The quickstart's corpus, its table, and what it installs; `.ci/run` runs it all."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from examples.quickstart import corpus, summary

ROOT = Path(__file__).parent.parent
TALES = "0c817c37ab0b80d9be4db7f09e26272249befdd807cd9314990fd4f372380437"


def test_the_corpus_is_the_same_on_every_version_of_python(tmp_path):
    corpus.main([str(tmp_path)])
    texts = [(tmp_path / f"{split}.txt").read_bytes() for split in ("train", "valid", "test")]
    assert hashlib.sha256(b"".join(texts)).hexdigest() == TALES
    assert -(-len(texts[0]) // (16 * 64)) == 1000  # the quickstart's updates are one pass over it


def test_the_table_holds_what_the_logs_say(tmp_path, capsys):
    (tmp_path / "train.log").write_text(
        "num. shared model params: 1,234 (\n| train | epoch 001 | loss 1 | wps 3456.7 |"
    )
    (tmp_path / "eval.log").write_text("Loss (base 2): 1.5, Perplexity: 2.8")
    (tmp_path / "without.log").write_text("")
    with pytest.raises(SystemExit, match=r"without.log does not say without its memory"):
        summary.main([f"LaMemo={tmp_path}"])
    (tmp_path / "without.log").write_text("Loss (base 2): 1.75, Perplexity: 3.4")
    summary.main([f"LaMemo={tmp_path}"])
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| LaMemo"))
    cells = row.strip("|").split("|")
    assert [cell.strip() for cell in cells] == ["LaMemo", "1.5", "1.75", "1,234", "3,457"]


# Stands in for Python: notes what pip is to install, and makes environments with itself as their Python.
PYTHON = """#!/bin/bash
case "$*" in
    -) ;;
    *urlopen*) exit $UNREACHABLE ;;
    "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    *version_info.minor*) echo 11 ;;
    "-m pip "*) echo "$*" >>"$NOTES" ;;
    *"import fairseq_cli.train") [ -z "$PYTHONDONTWRITEBYTECODE" ] ;; # which would keep nothing of what it compiles
esac
"""


@pytest.mark.parametrize(
    ("gpu", "reachable", "cpu_builds"), [(False, True, True), (False, False, False), (True, True, False)]
)
def test_torch_is_a_build_for_cpus_where_there_is_no_gpu(gpu, reachable, cpu_builds, tmp_path):
    for name, text in {"python3": PYTHON, "nvidia-smi": f"#!/bin/sh\n{'echo GPU 0' if gpu else 'exit 9'}\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NOTES": str(tmp_path / "notes")}
    environment |= {"UNREACHABLE": str(int(not reachable)), "PYTHONDONTWRITEBYTECODE": "1"}
    command = ["bash", ROOT / "examples" / "install.sh", tmp_path / "venv"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ("torch for CPUs" in done.stdout, "CUDA" in done.stdout) == (cpu_builds, not cpu_builds)
    installs = (tmp_path / "notes").read_text().splitlines()
    assert installs[0].split()[-1].startswith("torch") and any(line.endswith(" ve-fairseq") for line in installs)
    assert {"--extra-index-url https://download.pytorch.org/whl/cpu" in line for line in installs} == {cpu_builds}
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == ""
