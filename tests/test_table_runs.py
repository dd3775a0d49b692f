"""How the table runner runs: once, again after a kill, side by side, and what it says of runs that fail."""

import contextlib
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from examples.tables import commands, execute, folder, plots, process, table

from .tables import fork, read, result, run


def test_a_table_is_run_once_and_rendered(tiny, capsys, monkeypatch):
    """The second start finds nothing to do, and a changed option is refused before anything is run."""
    monkeypatch.setattr(process, "run", fork)
    with monkeypatch.context() as patch:
        patch.setattr(plots, "write", lambda *_: [])  # takes its time
        assert run(tiny, "--only", "lamemo") == 0
    assert "Not complete: transformer_xl/seed-1." in capsys.readouterr().out
    assert run(tiny) == 0
    out = tiny.parent / "out"
    text = capsys.readouterr().out
    held = {name: read(out / name / "seed-1" / "results.json") for name in ("transformer_xl", "lamemo")}
    lamemo = held["lamemo"]["evaluations"]
    assert list(lamemo) == ["valid", "test", "test-memory-0", "test-memory-32"]
    assert list(held["transformer_xl"]["evaluations"]) == ["valid", "test"]
    assert [e["tokens"] for e in lamemo.values()] == [300, 250, 250, 250]
    assert len({e["loss"] for e in list(lamemo.values())[1:]}) == 3, "a memory length made no difference"
    training = held["lamemo"]["training"]
    assert training["parameters"] == held["transformer_xl"]["training"]["parameters"] + 16  # v'
    # Validation and evaluation read the same tokens, in four streams and in two.
    assert training["curve"] == [[12, pytest.approx(lamemo["valid"]["loss"], abs=0.02)]]
    assert training["tokens_an_update"] == 64 and training["tokens_per_second"] > 0
    assert training["host_memory_gib"] == 0.5 and training["device_memory_gib"] is None
    assert 0.1 < lamemo["test"]["host_memory_gib"] < 4
    start = json.loads((out / "lamemo" / "seed-1" / "starts.jsonl").read_text().splitlines()[0])
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or None
    assert start["commands"][0][0] == "fairseq-train" and start["commit"] == commit

    row = next(line for line in text.splitlines() if line.startswith("| LaMemo"))
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[2:4] == [f"{lamemo[s]['loss']:.3f}" for s in ("valid", "test")]
    assert training["seconds"] > 0 and cells[8] == f"{training['seconds']:,.0f}"
    assert "- / 1.25" in text and "Reported: a paper." in text and (out / "table.md").read_text() in text
    with (out / "evaluations.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6 and float(lines[-1]["loss"]) == lamemo["test-memory-32"]["loss"]
    for name in ("summary", "curves", "memory"):
        assert (out / f"{name}.svg").read_text().startswith("<?xml") and (out / f"{name}.png").stat().st_size > 5000

    monkeypatch.setattr(plots, "write", lambda *_: [])
    monkeypatch.setattr(process, "run", lambda *_: pytest.fail("something was run again"))
    assert run(tiny) == 0
    capsys.readouterr()
    assert run(tiny, "--set", "lr=0.1") == 1
    message = capsys.readouterr().err
    assert "holds another run: options --lr is 0.1, there it was 0.02" in message and "--out" in message


def test_a_killed_runner_goes_on_from_the_checkpoint(tiny, tmp_path, monkeypatch):
    """Killed with its training: the next start trains what is left, and ends where an undisturbed run ends."""
    options = ["--only", "lamemo", "--set", "max-update=30", "save-interval-updates=5"]
    argv = [sys.executable, "-m", "examples.tables", str(tiny), "--out", str(tmp_path / "killed"), *options]
    started = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    log = tmp_path / "killed" / "lamemo" / "seed-1" / "train.log"
    wait_for(lambda: log.exists() and '"num_updates": "12"' in log.read_text(), started)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    wait_for(lambda: not locked(log.parent))
    assert not (log.parent / "trained.json").exists() and not (log.parent / "results.json").exists()

    monkeypatch.setattr(process, "run", fork)
    plan = execute.Plan(table.load(tiny), tmp_path / "killed", {"max-update": 30, "save-interval-updates": 5})
    (one,) = table.runs(plan.table, ["lamemo"])
    only_train(plan, one)
    assert "Loaded checkpoint" in log.read_text()
    trained = read(log.parent / "trained.json")
    assert trained["updates"] == 30 and trained["seconds"] is None, "a killed start logs no seconds"
    assert len(plan.folder(one).starts.read_text().splitlines()) == 2
    whole = execute.Plan(plan.table, tmp_path / "whole", plan.changes)
    only_train(whole, one)
    weights = [
        torch.load(p.folder(one).checkpoints / "checkpoint_last.pt", weights_only=False)["model"] for p in (plan, whole)
    ]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def only_train(plan, one):
    board = execute.Board(FakeBar())
    held = plan.folder(one)
    with held.lock() as descriptor:
        held.claim(plan.identity(one))
        execute._train(plan, one, held, execute.Slot(), descriptor, board)


class FakeBar:
    def set_postfix_str(self, text, refresh):
        pass

    def update(self, n=1):
        pass


def test_the_bar_counts_complete_runs_alone(monkeypatch):
    counted = []
    bar = SimpleNamespace(update=counted.append)
    runs = [table.Run("a", 1), table.Run("b", 1)]

    def complete(plan, run, slot, board):
        if run.row == "b":
            raise execute.RunError("stopped")

    monkeypatch.setattr(execute, "check", lambda plan, runs: runs)
    monkeypatch.setattr(execute, "progress", lambda *_: contextlib.nullcontext(bar))
    monkeypatch.setattr(execute, "complete", complete)
    plan = SimpleNamespace(table=SimpleNamespace(title="a table"))
    assert execute.execute(plan, runs, [execute.Slot()]) == ["b/seed-1: stopped"]
    assert counted == [1, 0]


@pytest.mark.parametrize(("terminal", "shown"), [(True, ["1", "1", "2", "3"]), (False, ["1", "3"])])
def test_a_file_gets_a_line_once_a_minute(monkeypatch, terminal, shown):
    """A terminal gets each, also one that says the same: the time that has passed is another."""
    now, file = 0.0, io.StringIO()
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    monkeypatch.setattr(file, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", file)
    with execute.progress("a table", 1, 0) as bar:
        board = execute.Board(bar)
        for at, words in ((61.0, "1"), (62.0, "1"), (120.0, "2"), (121.5, "3")):
            now = at
            board.show(table.Run("a", 1), words)
        assert re.findall(r"a/seed-1: (\d)", file.getvalue()) == shown


def locked(path):
    try:
        with folder.RunFolder(path).lock():
            return False
    except folder.BusyError:
        return True


def wait_for(condition, started=None):
    deadline = time.monotonic() + 120
    while not condition():
        assert started is None or started.poll() is None, "it ended before"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_process_and_its_memory(tmp_path):
    code = "import sys, time; held = bytearray(300 << 20); time.sleep(0.5); print('done'); sys.exit(3)"
    own = bytearray(700 << 20)  # the runner's memory is not the command's
    ended = process.run([sys.executable, "-c", code], tmp_path / "logs" / "log", {"NAME": "value"})
    assert len(own) and ended.code == 3 and 0.29 < ended.memory_gib < 0.6
    assert (tmp_path / "logs" / "log").read_text() == "done\n"


def test_a_stopped_runner_ends_its_processes(tmp_path):
    threading.Timer(0.3, process.stop).start()
    try:
        assert process.run(["sleep", "60"], tmp_path / "log", {}).code == -signal.SIGTERM
        assert process.run(["sleep", "60"], tmp_path / "log", {}).code == -signal.SIGTERM
    finally:
        process.STOPPED.clear()


def test_two_runners_do_not_share_a_run(tiny, capsys, monkeypatch):
    """A command that outlives its runner keeps the folder, as it inherits the lock."""
    monkeypatch.setattr(folder, "PATIENCE", 0.3)
    held = folder.RunFolder(tiny.parent / "out" / "lamemo" / "seed-1")
    with held.lock() as descriptor:
        arguments = (["sleep", "60"], tiny.parent / "log", {}, [descriptor])
        command = threading.Thread(target=process.run, args=arguments)
        command.start()
        wait_for(lambda: process._ALIVE)
    try:
        assert run(tiny, "--only", "lamemo") == 1
        assert "another process is at work there" in capsys.readouterr().err
    finally:
        process.stop()
        command.join()
    with held.lock():
        pass


def test_what_a_run_leaves_behind_for_seconds_is_waited_for(tmp_path, monkeypatch):
    """Such as workers that load data, which find out late that their process has ended."""
    held = folder.RunFolder(tmp_path / "run")
    with held.lock() as descriptor:
        worker = subprocess.Popen(["sleep", "1"], pass_fds=[descriptor])
    with monkeypatch.context() as impatient:
        impatient.setattr(folder, "PATIENCE", 0.0)
        assert locked(held.path)
    with held.lock():
        pass
    worker.wait()


def test_options_that_no_run_came_to_train_with_do_not_hold_the_folder(tiny, capsys, monkeypatch):
    """One that is refused, say. Once there is a checkpoint, they do."""
    monkeypatch.setattr(process, "run", lambda argv, log, *_: log.write_text("refused\n") and FAILED)
    assert run(tiny, "--only", "lamemo", "--set", "amp-init-scale=3") == 1
    assert run(tiny, "--only", "lamemo") == 1
    assert "holds another run" not in capsys.readouterr().err
    held = folder.RunFolder(tiny.parent / "out" / "lamemo" / "seed-1")
    assert "--amp-init-scale" not in read(held.identity)["options"] and len(held.started()) == 1
    held.checkpoints.mkdir()
    (held.checkpoints / "checkpoint_1_5.pt").touch()
    assert run(tiny, "--only", "lamemo", "--set", "amp-init-scale=3") == 1
    assert "holds another run: options --amp-init-scale is 3, there it was not given" in capsys.readouterr().err


FAILED = process.Ended(2, 0.1)


def test_what_was_refused_is_told_once_and_not_to_be_started_again(tiny, capsys, monkeypatch):
    """Whatever former starts have logged."""

    def refuse(argv, log, *_):
        with log.open("a") as file:
            file.write("--amp-init-scale is refused: pass another\n")
        return process.Ended(1, 0.1)

    log = tiny.parent / "out" / "lamemo" / "seed-1" / "train.log"
    log.parent.mkdir(parents=True)
    monkeypatch.setattr(process, "run", refuse)
    for arguments in (
        ["--set", "amp-init-scale=1"],
        ["--set", "amp-init-scale=1"],
        ["--speed", "--set", "amp-init-scale=1"],
    ):
        log.write_text("training on 1 devices (GPUs/TPUs)\nNaN or infinity in update 7\n")
        assert run(tiny, "--only", "lamemo", *arguments) == 1
        message = capsys.readouterr().err
        assert message.count("--amp-init-scale is refused") == 1 and "NaN" not in message
        assert "Change what the message names, and start again" in message and "to go on" not in message


def test_what_had_begun_to_train_is_to_be_started_again(tiny, capsys, monkeypatch):
    """As is what was killed before it did."""
    for text, code in (("training on 1 devices (GPUs/TPUs)\nRuntimeError: on fire\n", 1), ("", -9)):

        def fail(argv, log, *_, text=text, code=code):
            log.write_text(text)
            return process.Ended(code, 0.1)

        monkeypatch.setattr(process, "run", fail)
        assert run(tiny, "--only", "lamemo") == 1
        assert "Start again to go on from the last checkpoint" in capsys.readouterr().err


def test_the_curve_is_that_of_the_first_of_several_splits(tiny, monkeypatch):
    """By which fairseq chooses the best checkpoint."""
    read_of = []
    plan = execute.Plan(table.load(tiny), tiny.parent / "out", {"valid-subset": "test,valid"})
    (one,) = table.runs(plan.table, ["lamemo"])
    best = plan.folder(one).checkpoint
    best.parent.mkdir(parents=True)
    monkeypatch.setattr(process, "run", lambda *_: best.touch() or process.Ended(0, 0.1))
    monkeypatch.setattr(execute.logs, "training", lambda log, split: read_of.append(split) or {})
    only_train(plan, one)
    assert read_of == ["test"]


def test_a_training_without_a_best_checkpoint_is_told(tiny, capsys, monkeypatch):
    """With --validate-after-updates above --max-update, for one."""
    monkeypatch.setattr(process, "run", lambda *_: process.Ended(0, 0.1))
    assert run(tiny, "--only", "lamemo") == 1
    seed = tiny.parent / "out" / "lamemo" / "seed-1"
    message = (
        f"ended without {seed / 'checkpoints' / 'checkpoint_best.pt'}, as no validation had a loss. Let row 'lamemo'"
    )
    assert message in capsys.readouterr().err and not (seed / "trained.json").exists()


def test_a_failed_run_is_told_and_the_others_go_on(tiny, capsys, monkeypatch):
    tried = []

    def fail(argv, log, *_):
        tried.append(argv)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("RuntimeError: the GPU is on fire\n")
        return process.Ended(1, 0.1)

    monkeypatch.setattr(process, "run", fail)
    assert run(tiny) == 1
    message = capsys.readouterr().err
    assert len(tried) == 2 and message.count("the GPU is on fire") == 2
    assert "lamemo/seed-1: fairseq-train ended with 1" in message
    assert not list(tiny.parent.glob("out/*/*/results.json"))


def test_an_interrupt_ends_what_runs_and_starts_no_more(tiny, capsys, monkeypatch):
    started = []

    def sleep(command, arguments):
        started.append(command)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        return ["sleep", "60"]

    monkeypatch.setattr(commands, "argv", sleep)
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    try:
        assert run(tiny) == 130
    finally:
        signal.signal(signal.SIGINT, former)
    assert started == ["fairseq-train"] and not process._ALIVE
    assert "goes on from the last checkpoints" in capsys.readouterr().err


def test_a_changed_evaluation_is_done_again_without_training(tiny, monkeypatch):
    """Only the evaluations that are new or other ones count as missing."""
    plan = execute.Plan(table.load(tiny), tiny.parent / "out", {})
    (one,) = table.runs(plan.table, ["lamemo"])
    held = plan.folder(one)
    held.claim(plan.identity(one))
    for evaluation in plan.evaluations(one):
        found = {"identity": plan.evaluation_identity(one, evaluation), "loss": 1.0, "perplexity": 2.0}
        folder.write_json(held.evaluated(evaluation.name), found)
    folder.write_json(held.trained, result()["training"])
    folder.write_json(held.results, {})
    assert plan.complete(one)
    plan.table.evaluation.memory.lengths.append(64)
    assert [e.name for e in plan.missing(one)] == ["test-memory-64"]
    plan.table.evaluation.options["batch-size"] = 1
    assert len(plan.missing(one)) == 5
