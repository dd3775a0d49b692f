"""What runs have left, from anyone: results, rates, logs and scales are read right, or refused in one line."""

import csv
import io
import json

import pytest

from examples.tables import execute, folder, kept, logs, process, render, table

from .tables import load, result, run


def test_lines_of_results_with_a_mark_and_any_line_end(tmp_path):
    line = json.dumps(result(), ensure_ascii=False).replace('"D"', '"a\u2028b"')
    (tmp_path / "runs.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\r\n".encode())
    assert kept.read(tmp_path / "runs.jsonl")["a/seed-1"]["starts"][0]["device"] == "a\u2028b"


def damaged(*path, value):
    """A line of results with another value somewhere."""
    found = json.loads(json.dumps(result()))
    *way, last = path
    inner = found
    for key in way:
        inner = inner[key]
    inner[last] = value
    return json.dumps(found).encode()


@pytest.mark.parametrize("line", [
    b"{", b"\xff", b"[]", b"3", b"[" * 100_000,
    damaged("run", "row", value=3), damaged("run", "seed", value="../x"), damaged("run", "seed", value=-1),
    damaged("run", value=None),
    damaged("training", "curve", value=[[1]]), damaged("training", "curve", value=[["x", 1]]),
    damaged("training", value=1), damaged("training", "parameters", value=10**40),
    damaged("training", "tokens_per_second", value=True), damaged("evaluations", "test", "loss", value="1"),
    damaged("evaluations", value=[]), damaged("evaluations", "x", value=1), damaged("scale", value={"asked": {}}),
    damaged("starts", value=[{}]), damaged("starts", 0, "versions", value={"a": 1}),
])  # fmt: skip
def test_lines_that_are_no_results(line, tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_bytes(damaged("evaluations", "test", "loss", value=1.0) + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=f"line 2 of {path} is not the result of a run: mend it, or take it out"):
        kept.read(path)


@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        ("run.json", None, "run"),
        ("trained.json", {}, "training"),
        ("evaluations/test.json", {"loss": "x"}, "evaluations"),
        ("scale.json", {"asked": 3}, "scale"),
        ("starts.jsonl", {"device": 3}, "starts"),
    ],
)
def test_a_folder_of_a_run_with_a_damaged_file_is_refused(file, content, part, tiny, capsys):
    """Its figures went into runs.jsonl, which nobody could read after that."""
    plan, results = execute.Plan(table.load(tiny), tiny.parent / "out"), tiny.parent / "results"
    one = table.Run("lamemo", 1)
    held = plan.folder(one)
    held.claim(plan.identity(one))
    folder.write_json(held.trained, result()["training"])
    assert run(tiny, "--render", "--results", results) == 0
    written, place = (results / "runs.jsonl").read_text(), plan.out if part == "scale" else held.path
    path = place / file
    if content is None:
        path.unlink()
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    capsys.readouterr()
    assert run(tiny, "--render", "--results", results) == 1
    refusal = f"error: the {part} of {place} cannot be read: restore its files, or move it away\n"
    assert capsys.readouterr().err == refusal and (results / "runs.jsonl").read_text() == written


def test_what_results_say_means_itself(tmp_path):
    """Devices, versions and options from a file of results, on the page and in CSV."""
    loaded = load(tmp_path / "t.yaml")
    (one,) = table.runs(loaded)
    line = result()
    line["run"]["options"] = {"--lr": "0.1\n| x | <b>"}
    line["starts"][0].update(device="<b>\n# `x`", versions={"=x": "|"}, commit="*c*")
    line["evaluations"]["test"] = {"loss": 1.0, "perplexity": 2.0, "row": "other", "=formula": "+1", "identity": []}
    text = render.write(execute.Plan(loaded, tmp_path, kept={one.name: line}), [one])
    assert len([part for part in text.splitlines() if part.startswith("#")]) == 2  # of the table, and of memory lengths
    assert len([part for part in text.splitlines() if part.startswith("|")]) == 6
    assert "Device: \\<b\\> \\# \\`x\\`." in text and "\\*c\\*" in text
    lines = list(csv.DictReader(io.StringIO((tmp_path / "evaluations.csv").read_text())))
    assert {held["row"] for held in lines} == {"a"} and lines[1]["'=formula"] == "'+1"


def test_rates_that_are_none(tiny, capsys):
    (tiny.parent / "out").mkdir()
    (tiny.parent / "out" / "speed.json").write_text('{"lamemo": {"device": 3}}')
    assert run(tiny, "--render") == 1
    assert "speed.json does not hold rates of rows: remove it, and measure them" in capsys.readouterr().err


HEAD = "2026-01-01 00:00:00 | INFO | fairseq_cli.train | num. shared model params: 1,234 (num. trained: 1,234)\n"


def test_seconds_of_training_are_those_of_all_starts(tmp_path):
    """Records of before have none, and are shown without."""
    start, end = "| INFO | fairseq_cli.train | training on 1 devices\n", "| INFO | done training in {} seconds\n"
    anew = start + "| INFO | fairseq.trainer | No existing checkpoint found x/checkpoint_last.pt\n"
    for lines, seconds in (
        ([start, end.format("1208.4")], 1208.4),
        ([start, end.format("1208.4"), start, end.format("0.3")], 1208.7),
        ([start, start, end.format("0.3")], None),
        ([anew, start, end.format("0.3")], None),
        ([anew, end.format("7.0"), anew, end.format("1.5"), start, end.format("0.3")], 1.8),  # trained again
        ([anew, anew, end.format("1.5")], 1.5),
    ):
        (tmp_path / "log").write_text(HEAD + "".join(lines))
        assert logs.training(tmp_path / "log")["seconds"] == seconds
    loaded, figures = load(tmp_path / "t.yaml"), []
    (one,) = table.runs(loaded)
    for seconds in ({}, {"seconds": 1208.4}):
        line = result(training={**result()["training"], **seconds})
        text = render.write(execute.Plan(loaded, tmp_path, kept={one.name: line}), [one])
        figures += [row["training s"] for row in csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text()))]
    assert figures == ["", "1208.4"] and "| 1,208 " in text


def test_a_training_that_began_anew_has_no_figures_of_the_former(tmp_path):
    """Somebody has removed its checkpoints and trained.json; the log goes on."""

    def training(updates, wps, loss):
        lines = [
            f'train_inner | {{"num_updates": "{n}", "wps": "{wps}", "wpb": "{wps}"}}' for n in range(1, updates + 1)
        ]
        lines += [f'valid | {{"valid_num_updates": "{updates}", "valid_loss": "{loss}"}}']
        begun = ["training on 1 devices", "No existing checkpoint found x/checkpoint_last.pt"]
        return "".join(f"2026-01-01 00:00:00 | INFO | {line}\n" for line in [*begun, *lines])

    (tmp_path / "log").write_text(HEAD + training(9, 5, 3.5) + HEAD + training(4, 7, 3.0))
    found = logs.training(tmp_path / "log")
    assert found["curve"] == [[4, 3.0]] and found["updates"] == 4
    assert found["tokens_per_second"] == found["tokens_an_update"] == 7


def test_runs_of_other_data_are_told(tmp_path):
    """The data of a path were made anew between two runs, or differ between machines."""
    loaded, results = load(tmp_path / "t.yaml", seeds=[1, 2, 3]), {}
    for run_of_seed, size in zip(table.runs(loaded), (5, 6, 6), strict=True):
        data = {"dictionary": "ab", "size of test.bin": size}
        results[run_of_seed.name] = result(run={**result()["run"], "seed": run_of_seed.seed, "data": data})
    text = render.write(execute.Plan(loaded, tmp_path, kept=results), table.runs(loaded))
    told = "a/seed-1 was run on other data than most runs: size of test.bin is 6, there it was 5."
    assert told in text and text.count("other data") == 1


@pytest.mark.parametrize(("updates", "told"), [(8000, True), (9000, False), (None, False)])
def test_a_run_that_ended_early_is_told(updates, told, tmp_path):
    """--stop-time-hours and --patience end a run that is complete all the same."""
    loaded = load(tmp_path / "t.yaml")
    (one,) = table.runs(loaded)
    run_of_line = {**result()["run"], "options": {"--lr": 0.1, "--max-update": 9000}}
    line = result(run=run_of_line, training={**result()["training"], "updates": updates})
    text = render.write(execute.Plan(loaded, tmp_path, kept={one.name: line}), [one])
    assert ("a/seed-1 ended after 8,000 of 9,000 updates." in text) is told


def test_a_log_with_records_of_another_kind(tmp_path):
    for record in (
        'train_inner | {"wps": "1"}',
        'valid | {"valid_num_updates": "x"}',
        'train_inner | {"num_updates": []}',
    ):
        (tmp_path / "log").write_text(f"{HEAD}2026-01-01 00:00:00 | INFO | {record}\n")
        with pytest.raises(logs.LogError, match="has a record that is not one of fairseq's"):
            logs.training(tmp_path / "log")


def begin(plan, one):
    """A run of which there is a checkpoint."""
    held = plan.folder(one)
    held.claim(plan.identity(one))
    held.checkpoints.mkdir()
    (held.checkpoints / "checkpoint_last.pt").touch()


SCALE = {
    "asked": {"minutes": 60, "runs": ["lamemo/seed-1"], "options": {}},
    "changes": {"max-update": 3},
    "shards": 1,
    "of_updates": 12,
}


def test_a_folder_of_another_scale_is_told_before_anything_is_run(tiny, capsys, monkeypatch):
    """In either direction, by the option's name; also of results that are kept, and for jobs."""
    monkeypatch.setattr(process, "run", lambda *_: pytest.fail("something was run"))
    out, results = tiny.parent / "out", tiny.parent / "results"
    plan = execute.Plan(table.load(tiny), out)
    begin(plan, table.Run("lamemo", 1))
    for action in ([], ["--print-slurm"]):
        assert run(tiny, *action, "--scale", 60) == 1
        assert "out was begun without --scale, and this is with --scale 60: ask" in capsys.readouterr().err
    folder.write_json(out / "scale.json", SCALE)
    for minutes, asked in (([], "without --scale"), (["--scale", 30], "with --scale 30")):
        assert run(tiny, *minutes) == 1
        assert f"out was begun with --scale 60, and this is {asked}: ask" in capsys.readouterr().err
    assert run(tiny, "--render") == 1
    assert "there are no results of this table" in capsys.readouterr().err, "nothing is rendered with either"
    (out / "scale.json").write_text('{"asked": 3}')
    assert run(tiny) == 1
    assert "scale.json does not say how the table was shrunk" in capsys.readouterr().err

    results.mkdir()
    (results / "runs.jsonl").write_text(json.dumps({**result("lamemo"), "scale": SCALE}) + "\n")
    assert run(tiny, "--results", results, "--out", tiny.parent / "other") == 1
    assert (
        "results keeps results of lamemo/seed-1 with --scale 60, and this is without --scale" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("changes", "ways"),
    [
        ({}, "lr below 0.02 or clip-norm, such as 0.25;"),
        ({"clip-norm": 0.5, "fp16": True, "lr": 1}, "lr below 1 or clip-norm below 0.5 or fp16: false;"),
    ],
)
def test_advice_for_a_row_that_diverged(changes, ways, tiny, capsys, monkeypatch):
    """Going on from its last checkpoint, it would diverge again."""
    told = "NaN or infinity in update 7"
    monkeypatch.setattr(process, "run", lambda argv, log, *_: log.write_text(f"{told}\n") and process.Ended(1, 0.1))
    given_ = [f"{name}={value}" for name, value in changes.items()]
    assert run(tiny, "--only", "lamemo", *(["--set", *given_] if given_ else [])) == 1
    message = capsys.readouterr().err
    assert f"Give row 'lamemo' other options in the table ({ways}" in message and "Start again" not in message
    assert f"move {tiny.parent / 'out' / 'lamemo' / 'seed-1'} away" in message
