"""Two trainings at once in one ``--save-dir``: the second one is refused, and a killed one leaves nothing behind."""

import contextlib
import errno
import fcntl
import os
import signal
import time

import pytest

from lamemo_fairseq.host import lost_ranks, save_dir
from lamemo_fairseq.tasks.segment_language_modeling import SegmentLanguageModelingTask

from .faults import fault
from .processes import output_of, train_in_processes
from .test_training_starts import OPTIONS, TASK, data, train  # noqa: F401


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr(save_dir, "PATIENCE", 0.2)
    yield
    save_dir.release()


@contextlib.contextmanager
def process(work):
    """A forked process that does some work and stays, with a child of its own, until it is killed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            work()
            child = os.fork()
            if child:
                os.write(writing, f"{child}\n".encode())
            time.sleep(30)
        os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as told:
        child = int(told.readline())
    try:
        yield pid
    finally:
        for number in (pid, child):
            assert number > 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        os.waitpid(pid, 0)


def is_locked(folder):
    """Whether another process than this one would be refused."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            save_dir.claim(str(folder))
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0


def test_the_second_training_is_refused(data, tmp_path):  # noqa: F811
    with process(lambda: save_dir.claim(str(tmp_path))) as other:
        message = rf"--save-dir {tmp_path}: process {other} on .* is training there\. Wait for it or end it, or pass"
        with pytest.raises(BlockingIOError, match=message):
            train(data, tmp_path, "--max-update", 2)
        train(data, tmp_path, "--max-update", 2, "--no-save")
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        train(data, tmp_path, "--max-update", 2, "--checkpoint-suffix", "_x")  # whose files are others
        assert (tmp_path / "checkpoint_last_x.pt").exists()


@fault
def impatient():
    save_dir.PATIENCE = lost_ranks.GRACE = 0.2


def test_only_the_first_of_two_ranks_asks_for_the_folder(data, tmp_path):  # noqa: F811
    command = [data, *TASK, *OPTIONS, "--batch-size", 2, "--cpu", "--max-update", 2, "--disable-validation"]
    with process(lambda: save_dir.claim(str(tmp_path / "checkpoints"))):
        assert train_in_processes(command, tmp_path, 2, impatient(), patience=20) == [1, 1]
    refused = ["is training there. Wait for it or end it" in output_of(tmp_path, rank) for rank in (0, 1)]
    assert refused == [True, False]


def test_a_training_has_the_folder_until_its_end(data, tmp_path, monkeypatch):  # noqa: F811
    locked = []
    step = SegmentLanguageModelingTask.train_step

    def looking(self, *args, **kwargs):
        locked.append(is_locked(tmp_path))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(SegmentLanguageModelingTask, "train_step", looking)
    for options in (["--max-update", 8], ["--max-epoch", 2]):  # epochs of six
        train(data, tmp_path, *options, "--disable-validation")
        assert not is_locked(tmp_path)
    assert locked == [True] * 12


def test_a_training_that_fails_leaves_the_folder(data, tmp_path, monkeypatch):  # noqa: F811
    def fail(*args, **kwargs):
        raise ArithmeticError("made to fail")

    monkeypatch.setattr(SegmentLanguageModelingTask, "train_step", fail)
    with pytest.raises(ArithmeticError):
        train(data, tmp_path, "--max-update", 2, "--disable-validation")
    assert not is_locked(tmp_path)


def test_a_killed_training_leaves_no_lock(tmp_path):
    """Not even if it is survived by a process that it has forked."""
    with process(lambda: save_dir.claim(str(tmp_path))) as other:
        assert is_locked(tmp_path)
        os.kill(other, signal.SIGKILL)
        os.waitid(os.P_PID, other, os.WEXITED | os.WNOWAIT)
        save_dir.claim(str(tmp_path))


def test_a_training_that_is_ending_is_waited_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(save_dir, "PATIENCE", 30)
    caplog.set_level("INFO")

    def leave_soon():
        save_dir.claim(str(tmp_path))
        signal.setitimer(signal.ITIMER_REAL, 0.3)  # whose signal ends the process

    with process(leave_soon) as other:
        save_dir.claim(str(tmp_path))
        assert f"waiting up to 30 seconds for the end of process {other} on" in caplog.text


def test_the_next_folder_takes_the_place_of_the_former(tmp_path):
    """As where one process trains several models."""
    for name in ("one", "two", "two"):
        save_dir.claim(str(tmp_path / name))
    assert is_locked(tmp_path / "two") and not is_locked(tmp_path / "one")


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def fail(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", fail)
    save_dir.claim(str(tmp_path))
    assert f"{tmp_path}: its file system has no locks (No locks available)" in caplog.text


def test_a_lock_of_somebody_else(tmp_path, caplog):
    """Whose folder may still be written to."""
    (tmp_path / save_dir.LOCK).mkdir()
    save_dir.claim(str(tmp_path))
    assert f"--save-dir {tmp_path} cannot be locked (Is a directory)" in caplog.text
