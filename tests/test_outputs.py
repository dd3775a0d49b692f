"""What a command cannot write to is refused before it begins."""

import os

import pytest
from fairseq_cli import train

from lamemo_fairseq.host.option_rules import GENERATE
from lamemo_fairseq.host.outputs import check_outputs

from .command_lines import read
from .helpers import TASK, run_command, write_data

OPTIONS = ("save_dir", "log_file", "tensorboard_logdir")


@pytest.mark.parametrize("option", OPTIONS)
def test_what_can_be_written_is_not_touched(option, tmp_path):
    check_outputs({option: str(tmp_path / "new" if option == "log_file" else tmp_path / "new" / "folder")})
    assert list(tmp_path.iterdir()) == []
    check_outputs({option: None})
    (tmp_path / "log").write_text("before")
    check_outputs({"log_file": str(tmp_path / "log")})
    assert (tmp_path / "log").read_text() == "before"


@pytest.mark.parametrize("option", ["save_dir", "tensorboard_logdir"])
def test_a_folder_that_cannot_be_made(option, tmp_path):
    name = "--" + option.replace("_", "-")
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(OSError, match=f"^{name} {path}( is|: {tmp_path / 'file'} is) a file, pass a folder$"):
            check_outputs({option: str(path)})
    for path in ("/proc/x", "/sys/x/y"):  # root has access to them, but nobody can make a folder there
        with pytest.raises(OSError, match=rf"^{name} {path}: /(proc|sys) cannot be written to \(.+\), pass another"):
            check_outputs({option: path})


def test_a_log_that_cannot_be_written(tmp_path):
    (tmp_path / "logs").mkdir()
    for path, message in {
        tmp_path / "logs": r"is a folder: pass a file in it, such as .*logs/train\.log",
        tmp_path / "lgos" / "x.log": f": there is no folder {tmp_path / 'lgos'}: did you mean {tmp_path / 'logs'}",
        tmp_path / "none" / "x.log": f": there is no folder {tmp_path / 'none'}, make it first$",
        "/proc/x.log": r"cannot be written to \(.+\): pass a file in a folder of yours",
        "/proc/version": r"cannot be written to \(.+\): pass a file in a folder of yours",
    }.items():
        with pytest.raises(ValueError, match=f"^--log-file {path}.*{message}"):
            check_outputs({"log_file": str(path)})


def test_the_lines_that_generate_writes():
    with pytest.raises(OSError, match=r"^--results-path /proc/x: /proc cannot be written to \(.+\), pass another"):
        read(GENERATE, "--results-path", "/proc/x")


def test_the_pictures_of_tensorboard_are_the_first_ranks_alone():
    check_outputs({"tensorboard_logdir": "/proc/x", "distributed_rank": 1})


@pytest.mark.parametrize("option", OPTIONS)
def test_they_are_looked_at_before_training(option, tmp_path):
    data = write_data(tmp_path / "data", train=300)
    words = [data, *TASK, "--arch", "lamemo_lm", "--tokens-per-sample", 8, "--batch-size", 2, "--optimizer", "adam"]
    words += ["--lr", 0.01, "--max-update", 2, "--save-dir", tmp_path / "run"]
    name = "--" + option.replace("_", "-")
    with pytest.raises((OSError, ValueError), match=f"^{name} /proc/x"):
        run_command(train.cli_main, *words, name, "/proc/x")
    assert not os.path.exists(tmp_path / "run")
