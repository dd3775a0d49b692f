"""The files of docs/extending.md are found in a checkout, and its command trains what they add."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from lamemo_fairseq.host.reserved_names import names_of_options
from lamemo_fairseq.models.config import check_defaults

from .extending import PAGE, files_of_page
from .helpers import write_data

ROOT = Path(__file__).parent.parent


def extended(folder, changed=lambda text: text):
    """Copy the package to a folder, with the files of the page."""
    shutil.copytree(ROOT / "lamemo_fairseq", folder / "lamemo_fairseq")  # compiled files too
    for name, text in files_of_page().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(changed(text))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            '"last_inputs_lm"', '"transformer_lm"',
            "memory 'last-inputs': another model is --arch transformer_lm, give the architecture a new name",
        ),
        (
            '"last_inputs_lm"', '"lamemo_lm_wt103"',
            "memory 'lookahead': another model is --arch lamemo_lm_wt103, give the architecture a new name",
        ),
        (
            '{"position_encoding"', '{"position_encodin"',
            "memory 'fading': Architecture.defaults has 'position_encodin', which is no option of a model; did you "
            "mean position_encoding?",
        ),
        (
            "slot_share", "lr",
            "memory 'fading': FadingOptions.lr would be --lr, which is an option of fairseq or of this package: "
            "give the option another name",
        ),
        (
            "slot_share", "dropout",
            "memory 'fading': FadingOptions.dropout would be --dropout, which is an option of every model: give the "
            "option another name",
        ),
        (
            'name="fading_lm"', 'name="fading_lm", presets={"wt13": {}}',
            "memory 'fading': Architecture.presets has 'wt13': the settings are wt103, enwik8, text8",
        ),
    ],
)  # fmt: skip
def test_names_that_fairseq_would_mistake(old, new, message, tmp_path):
    """fairseq would train another model, or leave the option out, and not say so."""
    extended(tmp_path, lambda text: text.replace(old, new))
    assert told_by(tmp_path, "-c", "import lamemo_fairseq") == f"{message}\n"


REFUSED = ("def initial_state", "def begun")
NO_STATE = "memory 'last-inputs': LastInputsMemory has no state before the first segment: define initial_state(x)"


@pytest.mark.parametrize("command", ["train", "interactive"])
def test_a_refused_memory_ends_a_command_in_one_line(command, tmp_path):
    """The memory is registered while --user-dir is imported, before the command line is checked."""
    extended(tmp_path, lambda text: text.replace(*REFUSED))
    given = ["data-bin", "--user-dir", "lamemo_fairseq", "--task", "segment_language_modeling"]
    assert told_by(tmp_path, "-m", f"fairseq_cli.{command}", *given) == f"{NO_STATE}\n"


@pytest.mark.parametrize("module", ["memory/groups", "memory/state", "positions/bias"])
def test_a_folder_that_hides_a_module_is_refused_in_one_line(module, tmp_path):
    """Python would import the folder in place of the module, and end in an ImportError about names of it."""
    extended(tmp_path)
    folder = tmp_path / "lamemo_fairseq" / "core" / module
    (tmp_path / "lamemo_fairseq/core/memory/last_inputs").rename(folder)
    told = told_by(tmp_path, "-m", "fairseq_cli.train", "data-bin", "--user-dir", "lamemo_fairseq")
    assert told == f"{folder} hides {folder.name}.py beside it, a module of this package: rename the folder\n"


def test_a_refused_memory_ends_a_run_of_hydra_in_one_line(tmp_path):
    extended(tmp_path, lambda text: text.replace(*REFUSED))
    told = told_by(tmp_path, "-m", "fairseq_cli.hydra_train", "common.user_dir=lamemo_fairseq")
    assert told.endswith(f"\n{NO_STATE}\n") and "Traceback" not in told


def test_a_refused_memory_ends_a_table_in_one_line(tmp_path):
    extended(tmp_path, lambda text: text.replace(*REFUSED))
    shutil.copytree(ROOT / "examples/tables", tmp_path / "examples/tables")
    shutil.copytree(ROOT / "examples/enwik8", tmp_path / "examples/enwik8")
    given = ["examples/enwik8/table.yaml", "--speed", "--set", "cpu=true", "fp16=false"]
    assert told_by(tmp_path, "-m", "examples.tables", *given) == f"error: {NO_STATE}\n"


@pytest.mark.parametrize(
    ("new", "error"),
    [("def initial state", "SyntaxError: "), ("initial_stat\n    def initial_state", "NameError: ")],
)
def test_a_mistake_in_a_users_file_shows_its_line(new, error, tmp_path):
    extended(tmp_path, lambda text: text.replace("def initial_state", new))
    told = told_by(tmp_path, "-m", "fairseq_cli.train", "data-bin", "--user-dir", "lamemo_fairseq")
    assert 'lamemo_fairseq/core/memory/last_inputs/__init__.py", line ' in told
    assert told.splitlines()[-1].startswith(error)


def told_by(folder, *command):
    """Return what a command that fails prints as errors, with the package of a folder."""
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"position_encoding": "linearr"}, "^memory 'recurrent': D: --position-encoding cannot be 'linearr': "),
        ({"mem_len": "long"}, "^memory 'recurrent': D: --mem-len cannot be 'long': "),
        (
            {"memory": "none"},
            "^memory 'recurrent': D has 'memory', which is the registered name: leave it out",
        ),
        ({"position_encoding": "alibi", "mem_len": 3, "adaptive_softmax_cutoff": None}, None),
    ],
)
def test_defaults_of_an_architecture(defaults, message):
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        check_defaults("recurrent", "D", defaults)


def test_names_of_fairseqs_options():
    """Those of dataclasses, and those that a class adds to a parser itself."""
    assert {"lr", "adam_betas", "momentum", "beam", "seed", "update2lr", "optimizer"} < names_of_options()
    assert not {"mem_len", "compression_rate", "slot_share"} & names_of_options()


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
