"""The table runner: what it runs, resumes and refuses, what it renders."""

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

from examples.tables import __main__ as runner
from examples.tables import commands, execute, folder, plots, process, recipes, render, scale, table

from .helpers import random_tokens, read_streams, tiny_decoder
from .tables import fork, read, run


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
    for evaluation in plan.evaluations(one):
        found = {"identity": plan.evaluation_identity(one, evaluation), "loss": 1.0}
        folder.write_json(held.evaluated(evaluation.name), found)
    folder.write_json(held.trained, {})
    folder.write_json(held.results, {})
    assert plan.complete(one)
    plan.table.evaluation.memory.lengths.append(64)
    assert [e.name for e in plan.missing(one)] == ["test-memory-64"]
    plan.table.evaluation.options["batch-size"] = 1
    assert len(plan.missing(one)) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("measure: bits\n", "unknown measure 'bits'; the known ones are perplexity"),
        ("measure: perplexity\nwrong: 1\n", "wrong"),
        ("measure: perplexity\nrows: {}\n", "at least one row"),
        ("measure: perplexity\noptions: {batch-size: 3}\n", "--batch-size is set by the runner"),
        ("measure: perplexity\nevaluation: {subsets: []}\n", "names no split"),
        ("measure: [perplexity\n", "is no YAML: .*line 4"),
        ("measure: perplexity\nrows: {a: {title: A, streams: 0}}\n", "row 'a' has 0 `streams`"),
    ],
)
def test_bad_table_files(text, message, tmp_path):
    base = "title: t\ndata: d\nstreams: 2\n"
    rows = "" if "rows" in text else "rows: {a: {title: A}}\n"
    (tmp_path / "table.yaml").write_text(base + text + rows)
    with pytest.raises(table.TableError, match=message):
        table.load(tmp_path / "table.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing"], "no row 'nothing'; its rows are transformer_xl, lamemo"),
        (["--set", "lr"], "pass OPTION=VALUE"),
        (["--set", "batch-size=3"], "follows from the table's streams"),
        (["--print", "lamemo", "--gpus", "3"], "the 4 streams of row 'lamemo' cannot be shared evenly"),
        (["--print-slurm", "--gpus", "3", "--set", "cpu=false"], "streams of row 'transformer_xl' cannot be shared"),
        (["--as", "yaml"], "--as yaml says how --print prints: pass --print ROW too"),
        (["--print", "lamemo", "--as", "yaml", "--seeds", "1", "2"], "describes one run: pass one of the --seeds 1 2"),
        (["--print", "lamemo", "--as", "shell", "--gpus", "2"], "leave out --gpus"),
        (["--environment", "v"], "--environment is for the jobs of --print-slurm"),
        (["--sbatch", "v"], "--sbatch is for the jobs of --print-slurm"),
        (["--print-slurm", "--environment", "tests"], "--environment tests: it has no bin/activate. Pass the folder"),
        (["--set", "lr=["], "--set lr=[: the value is no YAML"),
        (["--set", "data=/nowhere"], "/nowhere holds no dict.txt"),
        (["--scale", "0"], "positive number of minutes"),
        (["--set", "cpu=false", "--devices", "0", "--gpus", "2"], "there are 1 GPUs to use"),
        (
            ["--set", "disable-validation=true"],
            "row 'transformer_xl': --disable-validation leaves no checkpoint_best.pt",
        ),
        (["--only", "lamemo", "--set", "no-save=true"], "row 'lamemo': --no-save leaves no checkpoint_best.pt"),
        (["--print-slurm", "--set", "checkpoint-suffix=x"], "--checkpoint-suffix leaves no checkpoint_best.pt"),
        (
            ["--set", "log-format=simple", "no-save=false"],
            "--log-format is 'simple', and figures are read from records",
        ),
        (["--set", "log-format="], "--log-format is not given, and figures are read from records"),
    ],
)
def test_bad_arguments(arguments, message, tiny, capsys):
    assert run(tiny, *arguments) == 1
    assert message in capsys.readouterr().err


def test_runs_come_in_the_order_that_is_asked_for(tiny):
    loaded = table.load(tiny)
    found = [run_.name for run_ in table.runs(loaded, ["lamemo", "transformer_xl", "lamemo"], [2, 1, 2])]
    assert found == ["lamemo/seed-2", "transformer_xl/seed-2", "lamemo/seed-1", "transformer_xl/seed-1"]


def test_commands_that_are_printed_are_those_that_were_asked_for(tiny, capsys):
    assert run(tiny, "--print", "lamemo", "--set", "lr=0.5", "cpu=false", "--seeds", 7, 8) == 0
    text = capsys.readouterr().out.replace("\\\n", "")
    assert text.count("--lr 0.5") == 2 and "--cpu" not in text
    assert "--seed 7" in text and "--seed 8" in text and text.count("fairseq-eval-lm") == 2
    changes = ["--seeds", 7, "--set", "lr=0.5", "data=/here"]
    assert run(tiny, "--print", "lamemo", "--as", "shell", *changes) == 0
    text = capsys.readouterr().out.replace("\\\n   ", "")  # on a CPU, as the table says: one process reads all streams
    assert "--lr 0.5" in text and "--seed 7" in text and "--batch-size 4 " in text and "GPU" not in text
    assert (
        f"# Printed by `python -m examples.tables {tiny} --print lamemo --as shell --seeds 7 --set lr=0.5 data=/here`"
        in text
    )
    assert run(tiny, "--print", "lamemo", "--as", "yaml", *changes) == 0
    text = capsys.readouterr().out
    assert (
        "  lr:\n  - 0.5\n" in text and "  seed: 7\n" in text and "  data: ???\n" in text and "task.data=/here\n" in text
    )


def test_gpus_share_the_streams_and_runs_the_gpus(tiny):
    loaded = table.load(tiny)
    arguments = commands.train(loaded, table.Run("lamemo", 1), "saved", {}, gpus=2)
    assert arguments[arguments.index("--batch-size") + 1] == "2"
    args = runner.parser().parse_args([str(tiny), "--devices", "4,5,6", "--gpus", "1"])
    assert [slot.environment() for slot in runner.slots(args, False)] == [{"CUDA_VISIBLE_DEVICES": d} for d in "456"]
    args.gpus = 2
    (slot,) = runner.slots(args, False)
    assert slot.environment() == {"CUDA_VISIBLE_DEVICES": "4,5"} and slot.environment(1)["CUDA_VISIBLE_DEVICES"] == "4"


def test_a_row_may_have_its_own_streams(tiny, capsys):
    tiny.write_text(tiny.read_text().replace("    title: LaMemo\n", "    title: LaMemo\n    streams: 6\n"))
    loaded = table.load(tiny)
    plan = execute.Plan(loaded, tiny.parent / "out", {})
    for row, number in {"transformer_xl": 4, "lamemo": 6}.items():
        run_ = table.Run(row, 1)
        arguments = commands.train(loaded, run_, "saved", {}, gpus=2)
        assert arguments[arguments.index("--batch-size") + 1] == str(number // 2)
        identity = plan.identity(run_)
        assert identity["streams"] == number and plan.otherwise({"run": identity}) == []
        assert plan.otherwise({"run": {**identity, "streams": 5}})
        assert recipes.config(loaded, run_, "tiny", 2, {})["dataset"]["batch_size"] == number // 2
        script = recipes.script(loaded, run_, "tiny", {"cpu": False}, "")
        assert f"--batch-size $(({number} / GPUS))" in script and f"(({number} % GPUS))" in script
    assert run(tiny, "--print", "lamemo", "--only", "lamemo", "--gpus", "3", "--set", "cpu=false") == 0
    assert "--batch-size 2" in capsys.readouterr().out
    assert run(tiny, "--print-slurm", "--gpus", "3", "--set", "cpu=false") == 1


def test_a_scale_is_the_same_for_all_rows(tiny, monkeypatch, capsys):
    """Rates are made up here; the slower row decides with the faster one how many updates both get."""
    rates = {
        "transformer_xl": {"tokens_per_second": 640.0, "tokens_an_update": 64.0},
        "lamemo": {"tokens_per_second": 320.0, "tokens_an_update": 64.0},
    }
    monkeypatch.setattr(scale, "measure", lambda *_: rates)
    changes = {"max-update": 50000, "warmup-updates": 1000}
    plan = execute.Plan(table.load(tiny), tiny.parent / "out", changes)
    runs = table.runs(plan.table)
    shrunk = scale.shrink(plan, runs, [execute.Slot()], 2)
    updates = 260  # 65% of 120 seconds at a tenth and two tenths of a second
    assert shrunk.changes["max-update"] == updates
    assert shrunk.changes["warmup-updates"] == round(1000 * updates / 50000)
    for run_ in runs:
        identity = shrunk.identity(run_)["options"]
        assert identity["--max-update"] == updates and identity["--tokens-per-sample"] == 16
    # Of 24 seconds, each of 2 + 4 evaluations reads as many tokens, at 640 or 320 a second.
    assert shrunk.shards == -(-300 // min(300, int(24 / (2 / 640 + 4 / 320)))) == 1
    assert scale.shrink(plan, runs, [execute.Slot()] * 4, 2).changes == shrunk.changes, "decided once"
    with pytest.raises(folder.ChangedError, match="was begun with --scale 2"):
        scale.shrink(plan, runs, [execute.Slot()], 3)
    assert "reproduce nothing" in render.markdown(shrunk, runs, render.collect(shrunk, runs))

    (tiny.parent / "out" / "scale.json").unlink()
    assert scale.shrink(plan, runs, [execute.Slot()], 0.01).shards == 2  # streams keep four segments
    plan.table.rows["lamemo"].options["max-update"] = 7
    with pytest.raises(table.TableError, match="row 'lamemo' sets --max-update for itself"):
        scale.decide(plan, runs, [execute.Slot()], 2)


@pytest.mark.parametrize("positions", ["disentangled", "disentangled-content", "transformer-xl"])
def test_without_memory_every_segment_is_read_on_its_own(positions):
    """What `without_memory` in the tables does to a trained LaMemo."""
    lamemo = tiny_decoder(("lookahead", positions, "right"))
    plain = tiny_decoder(("none", "transformer-xl", "right"), seed=1)
    weights = {f"decoder.{name}": tensor for name, tensor in lamemo.state_dict().items()}
    kept = plain.upgrade_state_dict_named(weights, "decoder")
    plain.load_state_dict({name.removeprefix("decoder."): tensor for name, tensor in kept.items()})
    tokens = random_tokens(2, 9)
    alone = torch.cat([lamemo(segment)[0] for segment in tokens.split(3, dim=1)], dim=1)
    assert torch.allclose(read_streams(plain, tokens), alone, rtol=0, atol=1e-12)
    assert not torch.allclose(read_streams(lamemo, tokens), alone, rtol=0, atol=1e-3)
