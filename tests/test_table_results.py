"""The table runner: results kept apart from the runs, and the speed of rows alone."""

import csv
import errno
import fcntl
import json
import math
import os
import shutil
import tempfile

import pytest

from examples.tables import __main__ as runner
from examples.tables import execute, folder, kept, logs, plots, process, render, scale, speed, table

from .tables import ROOT, fork, read, result, run


def test_results_that_are_kept_need_no_folders(tiny, monkeypatch, capsys):
    """What a file of results has complete is not run again; what it has in part is shown, and run again."""
    monkeypatch.setattr(plots, "write", lambda *_: [])
    monkeypatch.setattr(process, "run", fork)
    results = tiny.parent / "results"
    assert run(tiny, "--only", "lamemo", "--results", results, "--set", "max-update=2") == 0
    first = capsys.readouterr().out
    assert not (tiny.parent / "out" / "table.md").exists() and (results / "table.md").read_text() in first
    shutil.rmtree(tiny.parent / "out")
    monkeypatch.setattr(process, "run", lambda *_: pytest.fail("something was run again"))
    assert run(tiny, "--only", "lamemo", "--results", results, "--set", "max-update=2") == 0
    assert capsys.readouterr().out == first
    assert run(tiny, "--only", "lamemo", "--results", results) == 1
    message = capsys.readouterr().err
    assert "another lamemo/seed-1: options --max-update is 12, there it was 2" in message and "--results" in message
    assert run(tiny, "--print-slurm", "--results", results, "--set", "max-update=2") == 0
    (job,) = capsys.readouterr().out.splitlines()[1:]
    assert "tiny-transformer_xl-1" in job and f"--results {results}" in job

    (line,) = (results / "runs.jsonl").read_text().splitlines()
    part = json.loads(line)
    valid = part["evaluations"]["valid"]["loss"]
    del part["evaluations"]["test"]
    (results / "runs.jsonl").write_text(json.dumps(part) + "\n")
    assert run(tiny, "--render", "--results", results) == 0
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("| LaMemo"))
    assert [cell.strip() for cell in row.split("|")][2:4] == [f"{valid:.3f}", ""]
    assert "Not complete: transformer_xl/seed-1, lamemo/seed-1." in text
    kept.add(results / "runs.jsonl", [{**part, "evaluations": {}}])
    assert kept.read(results / "runs.jsonl") == {"lamemo/seed-1": part}, "more gave way to less"
    tried = []
    monkeypatch.setattr(process, "run", lambda argv, *_: tried.append(argv[2]) or process.Ended(1, 0.1))
    assert run(tiny, "--only", "lamemo", "--results", results, "--set", "max-update=2") == 1
    assert tried == ["fairseq_cli.train"]


def test_results_of_a_shrunk_table_say_so_wherever_they_are(tiny, monkeypatch, capsys):
    monkeypatch.setattr(process, "run", fork)
    rates = {"lamemo": {"tokens_per_second": 640.0, "tokens_an_update": 64.0}}
    monkeypatch.setattr(scale, "measure", lambda *_: rates)
    results, elsewhere = tiny.parent / "results", tiny.parent / "elsewhere"
    asked = ["--only", "lamemo", "--scale", 0.01]
    assert run(tiny, *asked, "--results", results) == 0
    assert "reproduce nothing" in capsys.readouterr().out
    assert run(tiny, "--render", "--results", results, "--out", elsewhere) == 0
    assert "Shrunk by --scale 0.01 to 4 of 12 updates" in capsys.readouterr().out
    assert "no reproduction" in (results / "summary.svg").read_text()
    assert run(tiny, "--render", *asked, "--results", results, "--out", elsewhere) == 0
    text = capsys.readouterr().out
    assert text.count("reproduce nothing") == 1 and "ther options" not in text and not elsewhere.exists()
    assert "not those of the table: Transformer-XL." in text and "1.25" not in text
    assert run(tiny, "--render", "--only", "lamemo", "--scale", 0.02, "--results", results, "--out", elsewhere) == 1
    assert "holds nothing to render" in capsys.readouterr().err
    assert run(tiny, "--render") == 0
    assert "reproduce nothing" in capsys.readouterr().out


def test_figures_that_are_infinite_or_missing(tiny, monkeypatch, capsys):
    """They stand in the table; what has none is not drawn, and no plot of former results stays."""
    monkeypatch.setattr(process, "run", fork)
    results = tiny.parent / "results"
    assert run(tiny, "--only", "lamemo", "--seeds", 1, 2, "--results", results, "--set", "max-update=2") == 0
    capsys.readouterr()
    lines = [json.loads(line) for line in (results / "runs.jsonl").read_text().splitlines()]
    lines[0]["evaluations"]["test"].update(loss=math.inf, perplexity=math.inf)
    for line in lines:
        line["training"]["curve"] = []
        for length in (0, 32):
            del line["evaluations"][f"test-memory-{length}"]
    assert {path.stem for path in results.glob("*.svg")} == {"summary", "curves", "memory"}
    (results / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ("--render", "--results", results, "--out", tiny.parent / "elsewhere")
    assert run(tiny, *asked) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| LaMemo"))
    assert [cell.strip() for cell in row.split("|")][3] == "inf ± nan"
    assert {path.stem for path in results.glob("*.svg")} == {path.stem for path in results.glob("*.png")} == {"summary"}


def test_a_folder_of_results_that_is_read_only_is_told(tiny, monkeypatch, capsys):
    results = shutil.copytree(ROOT / "examples" / "novels" / "words-quarter" / "results", tiny.parent / "results")

    def refuses(**options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuses)
    table_file = ROOT / "examples" / "novels" / "words-quarter" / "table.yaml"
    assert runner.main([str(table_file), "--render", "--results", str(results)]) == 1
    assert (
        f"error: --results {results} cannot be written to (Read-only file system), pass another"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("form", ["absent", "empty", "of other rows"])
def test_nothing_to_render_is_told_and_writes_nothing(form, tiny, capsys):
    results = tiny.parent / "results"
    if form != "absent":
        results.mkdir()
        (results / "valid.csv").touch()
    if form == "of other rows":
        training = {"parameters": 1, "curve": []}
        identity = {"row": "another", "seed": 1, "streams": 1, "options": {}, "data": {}}
        result = {"run": identity, "training": training, "evaluations": {}, "scale": None, "starts": []}
        (results / "runs.jsonl").write_text(json.dumps(result) + "\n")
    before = sorted(results.glob("*"))
    assert run(tiny, "--render", "--results", results) == 1
    told = capsys.readouterr()
    assert f"there are no results of this table in {results} or {tiny.parent / 'out'}: run the table" in told.err
    assert not told.out and sorted(results.glob("*")) == before and not (tiny.parent / "out").exists()


def test_damaged_rates_and_senseless_minutes_are_told(tiny, capsys):
    (tiny.parent / "out").mkdir()
    (tiny.parent / "out" / "speed.json").write_text("{")
    assert run(tiny, "--render") == 1
    assert "speed.json is damaged" in capsys.readouterr().err
    assert run(tiny, "--scale", "nan") == 1
    assert "--scale is nan, it must be a positive number" in capsys.readouterr().err


def test_a_lost_checkpoint_is_told(tiny, monkeypatch, capsys):
    plan = execute.Plan(table.load(tiny), tiny.parent / "out", {})
    (one,) = table.runs(plan.table, ["lamemo"])
    plan.folder(one).claim(plan.identity(one))
    folder.write_json(plan.folder(one).trained, result()["training"])
    monkeypatch.setattr(process, "run", lambda *_: pytest.fail("something was run"))
    assert execute.execute(plan, [one], [execute.Slot()]) == [
        f"lamemo/seed-1: {plan.folder(one).checkpoint} is gone, and these are not evaluated: valid, test, "
        f"test-memory-0, test-memory-32. To train it again, move {plan.folder(one).path} away"
    ]


def test_the_speed_of_rows_alone_is_what_the_table_shows(tiny, monkeypatch, capsys):
    monkeypatch.setattr(plots, "write", lambda *_: [])
    monkeypatch.setattr(process, "run", fork)
    assert run(tiny, "--speed", 3, "--only", "lamemo") == 0
    text = capsys.readouterr().out
    out = tiny.parent / "out"
    measured = read(out / "speed.json")
    assert list(measured) == ["lamemo"] and measured["lamemo"]["updates"] == 3
    assert logs.training(out / "speed" / "lamemo" / "train.log")["updates"] == 3
    assert not list(out.glob("**/*.pt")) and not (out / "lamemo").exists()
    row = next(line for line in text.splitlines() if line.startswith("| LaMemo"))
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[6:8] == [f"{measured['lamemo']['tokens_per_second']:,.0f}", "0.50"]
    assert "each row alone for a few updates, on " in text
    for arguments, message in (
        ([1], "--speed is 1, it must be two updates at least"),
        ([3, "--scale", 1], "leave out"),
    ):
        assert run(tiny, "--speed", *arguments) == 1
        assert message in capsys.readouterr().err


def test_rates_of_other_options_and_devices_are_told(tiny, monkeypatch, capsys):
    """In records of before, which have nothing but what --set changed, too."""
    figures = dict.fromkeys(("tokens_per_second", "tokens_an_update", "device_memory_gib", "host_memory_gib"), 1.0)
    monkeypatch.setattr(speed, "measure", lambda *_: figures)
    monkeypatch.setattr(plots, "write", lambda *_: [])
    assert run(tiny, "--speed", "--set", "max-update=3") == 0
    assert "other options" not in capsys.readouterr().out
    assert run(tiny, "--speed", "--set", "mem-len=4") == 0
    assert "lamemo's tokens/s and memory are of other options or data than the table's: --mem-len 4 (table: 16)." in (
        capsys.readouterr().out
    )
    assert run(tiny, "--speed") == 0
    capsys.readouterr()
    tiny.write_text(tiny.read_text().replace("mem-len: 16", "mem-len: 8"))
    assert run(tiny, "--render") == 0
    told = "lamemo's tokens/s and memory are of other options or data than the table's: --mem-len 16 (table: 8)."
    assert told in capsys.readouterr().out
    rates = read(tiny.parent / "out" / "speed.json")
    del rates["lamemo"]["options"], rates["lamemo"]["streams"]
    rates["lamemo"].update(changes={"fp16": True}, device="another")
    (tiny.parent / "out" / "speed.json").write_text(json.dumps(rates))
    assert run(tiny, "--render") == 0
    text = capsys.readouterr().out
    assert (
        "lamemo's tokens/s and memory are of other options or data than the table's: --fp16 True (table: not given)."
        in text
    )
    assert "on several devices or versions, within which alone to compare them (" in text and ": lamemo" in text


def test_a_row_that_fails_loses_no_other_rate(tiny, monkeypatch, capsys):
    def measure(plan, row, *_):
        if row == "transformer_xl":
            raise execute.RunError("the GPU is on fire")
        return dict.fromkeys(("tokens_per_second", "tokens_an_update", "device_memory_gib", "host_memory_gib"), 1.0)

    monkeypatch.setattr(speed, "measure", measure)
    assert run(tiny, "--speed") == 1
    assert "the GPU is on fire" in capsys.readouterr().err
    assert list(read(tiny.parent / "out" / "speed.json")) == ["lamemo"]


def test_what_was_run_with_other_options_is_told(tiny, monkeypatch, capsys):
    """Whether --set made them or an edit of the table; and a seed that the table does not name is in it."""
    monkeypatch.setattr(plots, "write", lambda *_: [])
    monkeypatch.setattr(process, "run", fork)
    assert run(tiny, "--only", "transformer_xl", "--set", "max-update=2") == 0
    text = capsys.readouterr().out
    assert "Other options or data than the table's, in transformer_xl/seed-1: --max-update 2 (table: 12)." in text
    assert "1.25" not in text and "Reported: " not in text
    assert "Reported values are left out, as the runs are not those of the table: Transformer-XL." in text
    for name in ("table.csv", "evaluations.csv"):
        with (tiny.parent / "out" / name).open() as file:
            first = next(csv.DictReader(file))
        assert first["departures"] == "'--max-update 2 (table: 12)" and not first.get("test reported")
    tiny.write_text(tiny.read_text().replace("max-update: 12", "max-update: 3").replace("streams: 4", "streams: 2"))
    assert run(tiny, "--only", "lamemo", "--seeds", 7) == 0
    text = capsys.readouterr().out
    assert (
        "Other options or data than the table's, in transformer_xl/seed-1: streams 4 (table: 2); "
        "--max-update 2 (table: 3)." in text
    )
    assert text.count("Other options") == 1
    shutil.copytree(tiny.parent / "out" / "lamemo" / "seed-7", tiny.parent / "out" / "lamemo" / "seed-7-old")
    (tiny.parent / "out" / "lamemo" / "seed-8").mkdir()
    assert run(tiny, "--render") == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| LaMemo"))
    assert row.split("|")[-2].strip() == "1"


@pytest.mark.parametrize("folder_of_its_own", [False, True])
def test_results_of_another_run_are_refused(folder_of_its_own, tiny, monkeypatch, capsys):
    """Also where the run that is asked for has begun, or has a folder without a checkpoint."""
    monkeypatch.setattr(plots, "write", lambda *_: [])
    monkeypatch.setattr(process, "run", fork)
    arguments = ["--only", "lamemo", "--results", tiny.parent / "results"]
    assert run(tiny, *arguments, "--set", "max-update=2") == 0
    shutil.rmtree(tiny.parent / "out")
    monkeypatch.setattr(process, "run", lambda *_: process.Ended(1, 0.1))
    if folder_of_its_own:
        assert run(tiny, "--only", "lamemo") == 1
    capsys.readouterr()
    assert run(tiny, *arguments) == 1
    assert "keeps the results of another lamemo/seed-1" in capsys.readouterr().err


def test_what_was_evaluated_with_other_options_is_told_and_kept(tiny, monkeypatch, capsys):
    """New figures of a model take the place of former ones, and the others stay."""
    monkeypatch.setattr(plots, "write", lambda *_: [])
    monkeypatch.setattr(process, "run", fork)
    arguments = ["--only", "lamemo", "--set", "max-update=2", "--results", tiny.parent / "results"]
    assert run(tiny, *arguments) == 0
    tiny.write_text(
        tiny.read_text().replace("batch-size: 2", "batch-size: 4").replace("lengths: [0, 32]", "lengths: []")
    )
    capsys.readouterr()
    assert run(tiny, "--render", *arguments) == 0
    assert "lamemo/seed-1 was evaluated with other options than here: valid, test." in capsys.readouterr().out
    assert run(tiny, *arguments) == 0
    assert "was evaluated with other options" not in capsys.readouterr().out
    shutil.rmtree(tiny.parent / "out")
    monkeypatch.setattr(process, "run", lambda *_: pytest.fail("something was run again"))
    assert run(tiny, *arguments) == 0
    (line,) = (tiny.parent / "results" / "runs.jsonl").read_text().splitlines()
    held = json.loads(line)["evaluations"]
    assert {name: e["identity"][e["identity"].index("--batch-size") + 1] for name, e in held.items()} == {
        "valid": "4",
        "test": "4",
        "test-memory-0": "2",
        "test-memory-32": "2",
    }


def test_lengths_are_compared_within_the_seeds_that_have_most(tiny, monkeypatch):
    plan = execute.Plan(table.load(tiny), tiny.parent / "out", {})
    plan.table.evaluation.memory.lengths[:] = [16, 32, 64]
    plan.table.seeds[:] = [1, 2, 3]
    for seed, lengths in ((1, (16, 32, 64)), (2, (16, 32)), (3, (16, 32, 64))):
        held = plan.folder(table.Run("lamemo", seed))
        training = {"parameters": 1, "tokens_per_second": 1, "device_memory_gib": 1, "host_memory_gib": 1, "curve": []}
        folder.write_json(held.trained, training)
        folder.write_json(held.identity, plan.identity(table.Run("lamemo", seed)))
        for length in lengths:
            folder.write_json(held.evaluated(f"test-memory-{length}"), {"loss": seed + length, "perplexity": 1.0})
    text = render.write(plan, table.runs(plan.table))
    row = next(line for line in text.split("## Memory")[1].splitlines() if line.startswith("| LaMemo"))
    assert [cell.strip()[:6] for cell in row.split("|")[2:5]] == ["18.000", "34.000", "66.000"]
    assert "LaMemo: seeds 1, 3 only, as others lack lengths." in text


def test_seeds_with_as_many_but_other_lengths_are_not_mixed():
    at = [table.Evaluation("test", mem_len=length) for length in (0, 8, 16)]
    seeds = [{"evaluations": {f"test-memory-{n}": {} for n in lengths}} for lengths in ((0, 8), (8, 16), (8, 16))]
    assert render.fullest(seeds, at) == seeds[1:] and render.fullest(seeds[:2], at) == seeds[:1]
    assert render.fullest([], at) == []


def test_files_of_results_are_joined_by_hand(tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    runs = [
        {
            "run": {"row": row, "seed": 1, "streams": 2, "options": {}, "data": {}},
            "training": {"parameters": parameters, "curve": []},
            "evaluations": {name: {"loss": number, "perplexity": 1.0} for name in names},
            "scale": None,
            "starts": [],
        }
        for number, (row, parameters, names) in enumerate(
            (("a", 1, "xy"), ("a", 1, "xz"), ("b", 1, "z"), ("a", 2, "xy"))
        )
    ]
    held = [runs[index]["evaluations"][name] for index, name in ((1, "x"), (0, "y"), (1, "z"))]
    path.write_text("\n\n".join(map(json.dumps, runs)) + "\n")
    joined = {**runs[1], "evaluations": dict(zip("xyz", held, strict=True))}  # those of one model; later ones count
    assert kept.read(path) == {"a/seed-1": joined, "b/seed-1": runs[2]}
    assert "has several trainings of a/seed-1: the one with more evaluations counts" in capsys.readouterr().err
    path.write_text("\n\n".join(map(json.dumps, [runs[0], runs[3]])) + "\n")
    assert kept.read(path) == {"a/seed-1": runs[3]}
    for line in ('{"run": {"row": "a", "se', "{}", "3"):
        path.write_text(f"{json.dumps(runs[0])}\n{line}\n")
        with pytest.raises(ValueError, match=f"line 2 of {path} is not the result of a run"):
            kept.read(path)


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    with folder.locked(tmp_path / "run" / "lock", "another process is at work there"):
        kept.add(tmp_path / "results" / "runs.jsonl", [])
    told = capsys.readouterr().err
    for name in ("run", "results"):
        assert f"{tmp_path / name}: its file system has no locks (No locks available): start no second runner" in told


def test_what_cannot_be_written_is_told(tiny, monkeypatch, capsys):
    """Results before anything is run; the folder of one run keeps no other from being run."""
    monkeypatch.setattr(plots, "write", lambda *_: [])
    (tiny.parent / "file").touch()
    monkeypatch.setattr(process, "run", lambda *_: pytest.fail("something was run"))
    assert run(tiny, "--results", tiny.parent / "file" / "results") == 1
    there = tiny.parent / "file"
    assert capsys.readouterr().err == f"error: --results {there / 'results'}: {there} is a file, pass a folder\n"
    assert runner.main([str(tiny), "--out", "/proc/x/t"]) == 1
    assert "error: --out /proc/x/t: /proc cannot be written to (No such file" in capsys.readouterr().err
    for option in ("--scale", "--speed"):
        assert run(tiny, option, 2, "--results", tiny.parent / "file" / "results") == 1
    (tiny.parent / "out").mkdir()
    (tiny.parent / "out" / "transformer_xl").touch()
    monkeypatch.setattr(process, "run", fork)
    assert run(tiny, "--set", "max-update=2") == 1
    assert "transformer_xl/seed-1: " in capsys.readouterr().err
    assert (tiny.parent / "out" / "lamemo" / "seed-1" / "results.json").exists()


MEASURING = pytest.mark.parametrize(
    ("option", "lock", "message"),
    [
        ("--scale", "scale.lock", "measures the rates of this table"),
        ("--speed", "speed/lamemo/lock", "measures this row"),
    ],
)


@MEASURING
def test_a_training_that_is_measured_keeps_the_lock(option, lock, message, tiny, monkeypatch):
    """Should the runner be killed."""
    kept_open = []
    monkeypatch.setattr(process, "run", lambda *args: kept_open.extend(args[3]) or process.Ended(1, 0.1))
    assert run(tiny, option, 2, "--only", "lamemo") == 1
    assert len(kept_open) == 1


@MEASURING
def test_one_process_measures(option, lock, message, tiny, monkeypatch, capsys):
    monkeypatch.setattr(process, "run", lambda *_: pytest.fail("something was run"))
    with folder.locked(tiny.parent / "out" / lock, "a test"):
        assert run(tiny, option, 2, "--only", "lamemo") == 1
    assert f"another process {message}; wait for it" in capsys.readouterr().err


def test_a_line_that_was_cut_short_is_no_start(tmp_path):
    one = folder.RunFolder(tmp_path)
    one.note_start([["fairseq-train"]], None)
    with one.starts.open("a") as file:
        file.write('{"commands": [["fairseq-tr')
    one.note_start([["fairseq-eval-lm"]], None)
    assert [start["commands"] for start in one.started()] == [[["fairseq-train"]], [["fairseq-eval-lm"]]]
