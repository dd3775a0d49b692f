"""A scheduler's signal ends a run between two updates, which loses nothing, whatever process it is sent to."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lamemo_fairseq.host import signals

from . import faults
from .helpers import TASK, record_documents, write_data
from .processes import assert_same_run, output_of, train_in_processes
from .test_resume import SEGMENTS, TOKENS, arguments
from .test_resume import whole as whole_runs
from .test_training_starts import OPTIONS

whole = whole_runs
RARE = ["--roll", "--save-interval-updates", 100, "--validate-interval", 2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_data(tmp_path_factory.mktemp("data"), train=TOKENS, valid=150, valid1=90)
    return record_documents(folder, "train", "valid", "valid1")


def saved_after(update, folder):
    last = folder / "checkpoints" / "checkpoint_last.pt"
    return f"Terminated after update {update}: update {update} is saved in {last}, from which the same command goes on"


@pytest.mark.parametrize(
    ("number", "update", "code"),
    [(signal.SIGTERM, 1, 143), (signal.SIGUSR1, 8, 138), (signal.SIGTERM, SEGMENTS, 143)],
    ids=["first update", "SIGUSR1", "end of an epoch"],
)
def test_a_run_is_saved_and_goes_on(number, update, code, data, whole, tmp_path):
    command = arguments(data, *RARE)
    assert train_in_processes(command, tmp_path, fault=faults.told_to_end(number, update)) == [code]
    printed = output_of(tmp_path)
    assert printed.count("Terminated") == 1 and saved_after(update, tmp_path) in printed
    assert "Traceback" not in printed
    assert train_in_processes(command, tmp_path) == [0]
    assert_same_run(whole(*RARE), tmp_path)


def test_a_checkpoint_that_was_due_is_written_once(data, tmp_path):
    command = arguments(data, "--save-interval-updates", 5)
    assert train_in_processes(command, tmp_path, fault=faults.told_to_end(signal.SIGTERM, 5)) == [143]
    assert output_of(tmp_path).count("Preparing to save checkpoint") == 1
    assert (tmp_path / "checkpoints" / "checkpoint_best.pt").exists()  # it was validated too


def test_the_last_update_is_the_end_anyway(data, tmp_path):
    command = arguments(data, "--max-update", 3)
    assert train_in_processes(command, tmp_path, fault=faults.told_to_end(signal.SIGTERM, 3)) == [0]


@pytest.mark.parametrize("option", ["--no-save", "--no-last-checkpoints"])
def test_a_run_that_keeps_nothing_ends_at_once(option, data, tmp_path):
    command = arguments(data, *RARE, option)
    assert train_in_processes(command, tmp_path, fault=faults.told_to_end(signal.SIGTERM, 8)) == [143]
    assert "Terminated after update 7" in output_of(tmp_path) and "Traceback" not in output_of(tmp_path)


@pytest.mark.parametrize("told", [[1], [0, 1]], ids=["one rank is told", "both are told"])
def test_ranks_end_after_the_same_update(told, data, whole, tmp_path):
    command = arguments(data, *RARE, streams=2)
    fault = faults.told_to_end(signal.SIGTERM, 8, told, slow=2.0)
    assert train_in_processes(command, tmp_path, 2, fault, patience=20) == [143, 143], output_of(tmp_path)[-3000:]
    printed = output_of(tmp_path)
    assert printed.count("Terminated") == 1 and "Traceback" not in printed and "ends the run" not in printed
    update = 8 if saved_after(8, tmp_path) in printed else 9  # the ranks exchange losses before the signal
    assert saved_after(update, tmp_path) in printed
    assert train_in_processes(command, tmp_path, 2) == [0, 0]
    assert_same_run(whole(*RARE, ranks=2, streams=2), tmp_path)


SLOW = """
import fairseq_cli.train, time
from fairseq.trainer import Trainer
step = Trainer.train_step
def slow(self, *args, **kwargs):
    result = step(self, *args, **kwargs)
    time.sleep(0.2)
    print("update", self.get_num_updates(), flush=True)
    return result
Trainer.train_step = slow
fairseq_cli.train.cli_main()
"""


@pytest.mark.parametrize("ahead", [0, 10])
def test_processes_that_load_batches_go_on_until_the_run_is_saved(ahead, tmp_path):
    """SLURM sends its signal to every process of a job."""
    data = write_data(tmp_path / "data", train=4 * 6 * 200)
    options = ["--max-update", 99, "--disable-validation", "--num-workers", 2, "--save-dir", tmp_path / "run"]
    options += ["--data-buffer-size", ahead]
    command = [sys.executable, "-c", SLOW, *map(str, [data, *TASK, *OPTIONS, *options])]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **pipes, start_new_session=True, cwd=Path(__file__).parent.parent) as run:
        lines = iter(run.stdout.readline, "")
        assert "update 3\n" in lines
        os.killpg(run.pid, signal.SIGTERM)
        rest = "".join(lines)
        assert run.wait(60) == 143, rest
    assert "from which the same command goes on" in rest and "Traceback" not in rest


def test_a_process_that_loads_batches_ends_with_its_training():
    """It would otherwise outlive torch's patience."""
    pid = os.fork()
    if pid == 0:
        signal.pthread_sigmask(signal.SIG_BLOCK, signals.NUMBERS)
        signals._wait_for_the_parent()
    other = os.fork()
    if other == 0:
        os.kill(pid, signal.SIGTERM)
        os._exit(0)
    os.waitpid(other, 0)
    time.sleep(0.2)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)  # a signal of another process
    os.kill(pid, signal.SIGTERM)
    assert os.waitpid(pid, 0) == (pid, 0)


SPAWNS = """
import multiprocessing, os, signal, sys, time
from lamemo_fairseq.host import signals

def rank(ready):
    signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), print("saved", flush=True), os._exit(143)))
    ready.set()
    time.sleep(60)

if __name__ == "__main__":
    signals.pass_on_to_ranks()
    if sys.argv[1] == "ranks":
        fork = multiprocessing.get_context("fork")
        ready = fork.Event()
        started = fork.Process(target=rank, args=(ready,))
        started.start()
        ready.wait()
    print("begun", flush=True)  # this process knows its rank by now
    started.join() if sys.argv[1] == "ranks" else time.sleep(60)
"""


@pytest.mark.parametrize(("has", "code", "saved"), [("ranks", 143, "saved\n"), ("none", -signal.SIGTERM, "")])
def test_the_process_that_spawns_ranks_passes_signals_on(has, code, saved):
    command = [sys.executable, "-c", SPAWNS, has]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent) as run:
        assert run.stdout.readline() == "begun\n"
        run.send_signal(signal.SIGTERM)
        assert run.wait(30) == code
        assert run.stdout.read() == saved
