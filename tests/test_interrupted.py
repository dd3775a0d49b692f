"""An interrupted command, or one whose disk is full, says in one line what is saved, and leaves nothing half done."""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.dataclass.configs import CheckpointConfig

from lamemo_fairseq import convert_checkpoint, score
from lamemo_fairseq.analysis import __main__ as analysis
from lamemo_fairseq.host import interruption, signals
from lamemo_fairseq.host.checkpoints import write_checkpoint

from .helpers import TASK, write_data
from .test_training_starts import OPTIONS


def trainer_at(update, folder, **checkpoint):
    defaults = {"no_save": False, "no_last_checkpoints": False, "restore_file": "checkpoint_last.pt"}
    settings = SimpleNamespace(save_dir=str(folder), **{**defaults, **checkpoint})
    trainer = SimpleNamespace(updates=update, cfg=SimpleNamespace(checkpoint=settings), checkpoint_suffix="")
    trainer.get_num_updates = lambda: trainer.updates
    return trainer


@pytest.fixture
def training(monkeypatch):
    """Begins a training, whose traces in this process end with the test."""
    for name in ("_training", "_told"):
        monkeypatch.setattr(interruption, name, getattr(interruption, name))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    return interruption.begin


def ended_by(error):
    with pytest.raises(SystemExit) as end:
        sys.excepthook(type(error), error, None)
    return end.value.code


@pytest.mark.parametrize(
    ("options", "start", "saved", "told"),
    [
        ({}, 0, None, "nothing has been saved since the start, the same command begins again"),
        ({}, 4, None, "nothing has been saved since the start, the same command goes on from update 4 again"),
        ({}, 4, 8, "update 8 is saved in {folder}/checkpoint_last.pt, from which the same command goes on"),
        ({"no_save": True}, 0, None, "of which --no-save keeps nothing"),
        ({"no_last_checkpoints": True}, 0, 8, "update 8 is saved in {folder}, name its file with --restore-file"),
        ({"restore_file": "a.pt"}, 4, 8, "update 8 is saved in {folder}/checkpoint_last.pt. To go on from it, leave "
         "out --restore-file a.pt"),
    ],
)  # fmt: skip
def test_what_is_saved_is_told(options, start, saved, told, training, tmp_path, capsys):
    trainer = trainer_at(start, tmp_path, **options)
    training(trainer)
    trainer.updates = 9
    if saved is not None:
        interruption.note_saved(saved)
    with pytest.raises(KeyboardInterrupt) as interrupted, interruption.told():
        raise KeyboardInterrupt
    assert ended_by(interrupted.value) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Interrupted after update 9") and told.format(folder=tmp_path) in line


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_scheduler_ends_a_run_that_cannot_be_saved_in_the_same_way(number, code, training, tmp_path, capsys):
    training(trainer_at(9, tmp_path))
    before = signal.getsignal(number)
    signals.begin_to_heed(can_save=lambda: False)
    try:
        with pytest.raises(KeyboardInterrupt) as interrupted, interruption.told():
            os.kill(os.getpid(), number)
            signal.pause()
    finally:
        signals.end_heeding()
    assert ended_by(interrupted.value) == code
    assert capsys.readouterr().err.startswith("Terminated after update 9")
    assert signal.getsignal(number) is before


def test_another_rank_says_nothing(training, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    training(trainer_at(9, tmp_path))
    assert ended_by(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == ""
    interruption.report("Rank 0 ended, which ends the run")  # that one had saved
    line = f"Rank 0 ended, which ends the run after update 9: what is saved is in {tmp_path}\n"
    assert capsys.readouterr().err == line


def test_commands_that_do_not_train_say_so_too(training, capsys):
    interruption._training = None
    interruption.end_in_one_line()
    assert ended_by(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "Interrupted\n"


@pytest.mark.parametrize(
    ("command", "reads", "arguments"),
    [
        (score, "open_split", ["DATA", "model.pt"]),
        (analysis, "checkpoints", ["DATA", "model.pt", "--out", "out"]),
    ],
)
def test_our_own_commands_say_so_too(command, reads, arguments, training, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    interruption._training = None
    monkeypatch.setattr(command, reads, interrupted)
    with pytest.raises(KeyboardInterrupt) as stopped:
        command.main(arguments)
    assert ended_by(stopped.value) == 130
    assert capsys.readouterr().err == "Interrupted\n"


def test_a_conversion_says_so_too(tmp_path, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_checkpoint, "_to_core", interrupted)
    with pytest.raises(SystemExit) as stopped:
        convert_checkpoint.main(["core", "model.pt", "out", "--dictionary", "dict.txt"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "convert_checkpoint: interrupted\n"


def test_other_errors_are_shown_as_ever(training, capsys):
    interruption.end_in_one_line()
    sys.excepthook(ValueError, ValueError("another"), None)
    assert "ValueError: another" in capsys.readouterr().err


def test_errors_of_ranks_are_shown_as_ever(training, tmp_path, capsys):
    """torch's process groups call the hook that they find, before a training begins."""
    interruption.end_in_one_line()
    former = sys.excepthook
    sys.excepthook = lambda *error: former(*error)
    training(trainer_at(9, tmp_path))
    sys.excepthook(ValueError, ValueError("another"), None)
    assert capsys.readouterr().err == "ValueError: another\n"


INTERRUPTED = """
import os, signal, fairseq_cli.train
from fairseq.trainer import Trainer
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins by ignoring it
step = Trainer.train_step
def interrupting(self, *args, **kwargs):
    result = step(self, *args, **kwargs)
    if self.get_num_updates() == 3:
        os.killpg(0, signal.SIGINT)
    return result
Trainer.train_step = interrupting
fairseq_cli.train.cli_main()
"""


def test_a_training_is_interrupted_on_a_terminal(tmp_path):
    """There, the processes that load batches are interrupted as well."""
    data = write_data(tmp_path / "data", train=4 * 6 * 8 - 6)
    options = ["--max-update", 9, "--save-interval-updates", 2, "--disable-validation", "--num-workers", 1]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            INTERRUPTED,
            *map(str, [data, *TASK, *OPTIONS, *options]),
            "--save-dir",
            tmp_path / "run",
        ],
        capture_output=True,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 130
    assert "Traceback" not in done.stderr + done.stdout
    last = tmp_path / "run" / "checkpoint_last.pt"
    assert (
        f"Interrupted after update 3: update 2 is saved in {last}, from which the same command goes on" in done.stderr
    )


@contextlib.contextmanager
def full_disk(size):
    """A limit on files' sizes, in bytes; Python then gets an error in place of a signal. It holds for pytest's too."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def checkpoint_of(size):
    return {"model": {"weight": torch.zeros(size)}, "extra_state": {}}


def write(size, path):
    return write_checkpoint(checkpoint_of(size), str(path), CheckpointConfig())


@pytest.mark.parametrize("size", [0, 3_000, 40_000, 80_000])
def test_a_full_disk_while_a_checkpoint_is_written(size, tmp_path):
    """At the start, within the weights, behind them."""
    path = tmp_path / "checkpoint_last.pt"
    write(9_000, path)
    former = path.read_bytes()
    message = f"File too large: {path} was not written. The last whole checkpoint is {path}"
    with full_disk(size), pytest.raises(OSError, match=message) as error:
        write(20_500, path)
    assert error.value.errno == errno.EFBIG and "start the same command again" in str(error.value)
    assert path.read_bytes() == former and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_while_a_checkpoint_is_copied(tmp_path):
    path, copy = tmp_path / "checkpoint_1_5.pt", tmp_path / "checkpoint_last.pt"
    write(9_000, path)
    message = f"{copy} was not written. The last whole checkpoint is {path}"
    with full_disk(20_000), pytest.raises(OSError, match=message):
        checkpoint_utils.PathManager.copy(str(path), str(copy), overwrite=True)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end(place, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "checkpoint_last.pt"
    monkeypatch.setattr(os, place, fail)
    with pytest.raises(OSError, match=r"No space left on device: .* No checkpoint is there yet"):
        write(10, path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_does_not_hide_a_crash(tmp_path, caplog):
    with full_disk(1_000):
        assert not write(9_000, tmp_path / "crash.pt")
    assert write(10, tmp_path / "crash.pt")
    (tmp_path / "crash.pt").unlink()
    assert "File too large" in caplog.text and list(tmp_path.iterdir()) == []
