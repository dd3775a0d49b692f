"""The files of docs/extending.md are found in a checkout, and its command trains what they add."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from .extending import PAGE, files_of_page
from .helpers import write_data

ROOT = Path(__file__).parent.parent


def extended(folder, changed=lambda text: text):
    """Copy the package to a folder, with the files of the page."""
    shutil.copytree(ROOT / "lamemo_fairseq", folder / "lamemo_fairseq")  # compiled files too
    for name, text in files_of_page().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(changed(text))


def test_the_name_of_another_architecture_is_refused(tmp_path):
    """fairseq would train the other model, and not say so."""
    extended(tmp_path, lambda text: text.replace('"last_inputs_lm"', '"lamemo_lm"'))
    done = subprocess.run(
        [sys.executable, "-c", "import lamemo_fairseq"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    assert "another model is --arch lamemo_lm, give the architecture a new name" in done.stderr.splitlines()[-1]


def test_the_command_of_the_page_trains_what_its_files_add(tmp_path):
    extended(tmp_path)
    write_data(tmp_path / "data-bin/words", train=16 * 64 * 3, valid=200)
    (command,) = re.findall(r"```bash\nfairseq-train (.*?)```", PAGE, re.S)
    given = [*shlex.split(command.replace("\\\n", "")), "--cpu", "--attention-backend", "double", "--max-update", "2"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "fairseq_cli.train", *given], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    told = done.stdout + done.stderr
    assert "LastInputsMemory" in told and "LinearPositions" in told  # the model is printed
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["last-inputs"]
    assert (tmp_path / "checkpoints/last-inputs/checkpoint_last.pt").exists()
