"""The quickstart's corpus, table and installation, which `.ci/run` runs; failures of the generation example."""

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
    *" $FAILING") exit 1 ;;
    *"import triton") exit $NO_TRITON ;;
    "-m pip "*) echo "$*" >>"$NOTES" ;;
    *"import fairseq_cli.train") [ -z "$PYTHONDONTWRITEBYTECODE" ] ;; # which would keep nothing of what it compiles
esac
"""


def install(folder, **environment):
    """Run install.sh with the stand-in, in a fresh folder or one of a former call."""
    (folder / "python3").write_text(PYTHON)
    (folder / "python3").chmod(0o755)
    given = {"PATH": f"{folder}:{os.environ['PATH']}", "NOTES": str(folder / "notes"), "PYTHONDONTWRITEBYTECODE": "1"}
    given |= {"UNREACHABLE": "0", "NO_TRITON": "0", "FAILING": "-", **environment}
    command = ["bash", ROOT / "examples" / "install.sh", folder / "venv"]
    return subprocess.run(command, env=given, capture_output=True, text=True)


@pytest.mark.parametrize("failing", ["matplotlib", "torch==2.13.0", "ve-fairseq", "triton<=3.9.0"])
def test_an_installation_of_which_a_part_fails_is_not_complete(failing, tmp_path):
    assert install(tmp_path, FAILING=failing, NO_TRITON="1").returncode != 0
    assert not (tmp_path / "venv/made-by-install.sh").read_text()
    assert install(tmp_path, NO_TRITON="1").returncode == 0
    assert (tmp_path / "venv/made-by-install.sh").read_text()
    assert (tmp_path / "notes").read_text().splitlines()[-1].split()[-1] in {"ve-fairseq", "triton<=3.9.0"}


@pytest.mark.parametrize(
    ("gpu", "reachable", "cpu_builds"), [(False, True, True), (False, False, False), (True, True, False)]
)
def test_torch_is_a_build_for_cpus_where_there_is_no_gpu(gpu, reachable, cpu_builds, tmp_path):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{'echo GPU 0' if gpu else 'exit 9'}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    done = install(tmp_path, UNREACHABLE=str(int(not reachable)))
    assert done.returncode == 0, done.stderr
    assert ("torch for CPUs" in done.stdout, "CUDA" in done.stdout) == (cpu_builds, not cpu_builds)
    installs = (tmp_path / "notes").read_text().splitlines()
    packages = [line.split(" ")[-1] for line in installs]
    assert packages.count("torch==2.13.0") == 2 and packages.index("torch==2.13.0") < packages.index("ve-fairseq")
    assert {*packages} == {"matplotlib", "torch==2.13.0", "ve-fairseq"}
    assert {"--extra-index-url https://download.pytorch.org/whl/cpu" in line for line in installs} == {cpu_builds}
    again = install(tmp_path)
    assert (again.returncode, again.stdout) == (0, "")


def generation(folder, failing, *arguments):
    """Run the generation example with a Python that fails where *failing* is in its arguments."""
    (folder / "python3").write_text(f'#!/bin/sh\ncase "$*" in *{failing}*) echo "{failing} is wrong"; exit 1 ;; esac\n')
    (folder / "python3").chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "WORK": str(folder / "work")}
    command = ["bash", ROOT / "examples" / "generation" / "run.sh", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        ("cuda.is_available", "it needs a GPU and PyTorch: PyTorch sees no GPU here"),
        (
            "transformer_xl_lm",
            "training transformer_xl_lm failed: {work}/transformer_xl_lm/train.log has the whole log",
        ),
        ("eval_lm", "evaluating lamemo_lm failed: {work}/lamemo_lm/eval.log has the whole log"),
    ],
)
def test_the_generation_example_tells_what_failed(failing, message, tmp_path):
    done = generation(tmp_path, failing, tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith(message.format(work=tmp_path / "work") + "\n")
    assert failing == "cuda.is_available" or f"{failing} is wrong" in done.stderr


def test_the_generation_example_without_a_folder_prints_its_usage(tmp_path):
    done = generation(tmp_path, "nothing")
    assert done.returncode == 2 and done.stderr.startswith("usage: bash examples/generation/run.sh FOLDER")
