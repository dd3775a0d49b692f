"""Results of several kinds in one table: other scales, evaluations, data and trainings are told, in files too."""

import csv
import io
import json

import pytest

from examples.tables import execute, folder, kept, logs, plots, process, render, speed, table

from .tables import load, result, run
from .test_table_records import HEAD, SCALE


def rendered(path, results, **changes):
    """The page and the CSV files of a table with the seeds of these results."""
    loaded = load(path / "t.yaml", seeds=[one["run"]["seed"] for one in results], **changes)
    plan = execute.Plan(loaded, path, kept={kept.run_of(one).name: one for one in results})
    files = {}
    text = render.write(plan, table.runs(loaded))
    for name in ("table", "evaluations", "curves"):
        files[name] = list(csv.DictReader(io.StringIO((path / f"{name}.csv").read_text())))
    return text, files, plan


def of_seed(seed, **changes):
    return result(run={**result()["run"], "seed": seed}, **changes)


def test_a_mean_says_over_how_many_seeds_it_was_taken(tmp_path):
    """A seed may lack an evaluation, or its seconds: its training was killed and resumed."""
    training = [{**result()["training"], "seconds": seconds} for seconds in (10.0, None, 20.0)]
    results = [of_seed(seed, training=of_run) for seed, of_run in enumerate(training, 1)]
    results[1]["evaluations"] = {"valid": result()["evaluations"]["valid"]}
    results[2]["evaluations"] = {"valid": result()["evaluations"]["valid"]}
    text, files, plan = rendered(tmp_path, results)
    cells = [cell.strip() for cell in next(line for line in text.splitlines() if line.startswith("| A ")).split("|")]
    assert [cells[column] for column in (2, 3, 8, 9)] == ["2.00 ± 0.00", "2.00 (1 seed)", "15 ± 7 (2 seeds)", "3"]
    counted = {name: files["table"][0][f"{name} seeds"] for name in ("valid", "test", "tokens/s", "training s")}
    assert counted == {"valid": "3", "test": "1", "tokens/s": "0", "training s": "2"}
    rate = {**dict.fromkeys(speed.FIGURES, 1.0), "device": "D", "versions": {"torch": "2"}}
    folder.write_json(plan.speed, {"a": rate})
    assert "| 1        | 1.00       |" in rendered(tmp_path, results)[0], "a rate of a row alone is of no seed"


def test_runs_that_were_shrunk_are_named_beside_others(tmp_path):
    """Every file of figures says it, as a CSV has no page."""
    text, files, _ = rendered(tmp_path, [of_seed(1, scale=SCALE), of_seed(2)])
    assert "reproduce nothing. Only these runs were shrunk so: a/seed-1." in text
    words = "--scale 60: 3 of 12 updates"
    assert words in files["table"][0]["departures"]
    for name in ("evaluations", "curves"):
        assert {line["seed"] for line in files[name] if words in line["departures"]} == {"1"}
    text, files, _ = rendered(tmp_path, [of_seed(1, scale=SCALE)])
    assert "reproduce nothing." in text and "Only these" not in text


def test_evaluations_with_other_options_are_told_in_files_and_plots(tmp_path):
    results = [of_seed(1), of_seed(2)]
    _, _, plan = rendered(tmp_path, results, evaluation={"subsets": ["valid", "test"]})
    for one in results:
        for evaluation in plan.evaluations(kept.run_of(one)):
            figures = {**one["evaluations"][evaluation.name]}
            figures["identity"] = plan.evaluation_identity(kept.run_of(one), evaluation)
            one["evaluations"][evaluation.name] = figures
    results[1]["evaluations"]["test"]["identity"] = ["--batch-size", "1"]
    text, files, plan = rendered(tmp_path, results, evaluation={"subsets": ["valid", "test"]})
    assert "a/seed-2 was evaluated with other options than here: test." in text
    told = "test evaluated with other options"
    assert files["table"][0]["departures"] == told
    assert [(e["seed"], e["subset"]) for e in files["evaluations"] if e["departures"] == told] == [("2", "test")]
    assert not any(line["departures"] for line in files["curves"])
    plots.write(plan, table.runs(plan.table))
    assert "other options of evaluations than the table" in (tmp_path / "summary.svg").read_text()


def test_data_made_anew_since_a_run_are_told(tiny, tmp_path):
    """By the path of the table, and of a single run: there is no other run to compare it with.

    Older records have no command, and so no path.
    """
    plan = execute.Plan(table.load(tiny), tmp_path, {})
    one = table.Run("lamemo", 1)
    start = {"commands": [["fairseq-train", plan.table.data]], **result()["starts"][0]}
    line = result(run=plan.identity(one), starts=[start])
    assert plan.otherwise(line) == []
    of_test = "size of test.bin"
    line["run"]["data"][of_test] += 2
    assert plan.otherwise(line) == [
        f"data {plan.table.data}, {of_test} is {line['run']['data'][of_test] - 2}, there it was "
        f"{line['run']['data'][of_test]}"
    ]
    assert plan.otherwise({**line, "starts": result()["starts"]}) == plan.otherwise(line)


@pytest.mark.parametrize("asked", [["--render"], ["--only", "transformer_xl"]])
def test_another_run_in_a_folder_takes_no_place_of_a_kept_one(asked, tiny, capsys, monkeypatch):
    """As one that was tried on a CPU, before the published results are rendered."""
    monkeypatch.setattr(process, "run", lambda *_: pytest.fail("something was run"))
    plan, one = execute.Plan(table.load(tiny), tiny.parent / "out", {"lr": 7}), table.Run("lamemo", 1)
    plan.folder(one).claim(plan.identity(one))
    folder.write_json(plan.folder(one).trained, result()["training"])
    results = tiny.parent / "results" / "runs.jsonl"
    kept.add(results, [result(run=execute.Plan(plan.table, plan.out).identity(one))])
    before = results.read_text()
    assert run(tiny, *asked, "--results", results.parent) == 1
    told = f"{plan.folder(one).path} holds another lamemo/seed-1 than {results.parent}: options --lr is 7, there it was"
    assert told in capsys.readouterr().err and results.read_text() == before
    results.write_text(json.dumps(plan.result(one)))
    assert run(tiny, "--render", "--results", results.parent) == 0


def test_runs_of_rows_that_a_table_does_not_have_are_told(tmp_path):
    """Of another table, or of a row that was renamed: in a file of results, and in folders."""
    folder.write_json(tmp_path / "<b>" / "seed-2" / "trained.json", result()["training"])
    text, _, plan = rendered(tmp_path, [result()])
    left_out = "Left out, as the table has no such rows: "
    assert f"{left_out}\\<b\\>/seed-2.\n" in text
    plan.kept["former/seed-1"] = result("former")
    assert f"{left_out}former/seed-1, \\<b\\>/seed-2.\n" in render.write(plan, table.runs(plan.table))


def test_runs_of_several_devices_and_commits_are_named(tmp_path):
    """A mean of tokens/s over seeds of two GPUs is of neither. A row is named where all its runs are meant."""
    start, rows = result()["starts"][0], {name: {"title": name} for name in ("a", "b")}
    results = [of_seed(1), of_seed(2, starts=[{**start, "device": "E", "commit": "c" * 40, "changed_files": "x"}])]
    results += [result("b", starts=[start, {**start, "device": "E"}])]
    text, _, _ = rendered(tmp_path, results, rows=rows)
    several = "(several: compare tokens/s and memory within one only)"
    assert f"Device {several}: D (a/seed-1, b); E (a/seed-2, b).\n" in text and "Versions: torch 2.\n" in text
    assert f"Commit {several}: cccccccccc with changes (a/seed-2); unknown (a/seed-1, b).\n" in text


def test_rates_of_several_commits_are_told(tmp_path):
    rate = {**dict.fromkeys(speed.FIGURES, 1.0), "device": "D", "versions": {"torch": "2"}}
    rows = {name: {"title": name} for name in ("a", "b")}
    for commit, told in (("d" * 40, "on D, torch 2, commit dddddddddd (`"), ("e" * 40, "on several devices or vers")):
        folder.write_json(tmp_path / "speed.json", {"a": {**rate, "commit": "d" * 40}, "b": {**rate, "commit": commit}})
        assert told in rendered(tmp_path, [result()], rows=rows)[0]


@pytest.mark.parametrize(
    ("noted", "told"),
    [
        ({"data": "d"}, ""),
        ({"data": "other"}, "data other (table: d)"),
        ({"options": {"lr": 0.1, "data": "other"}, "changes": {"data": "other"}}, "data other (table: d)"),  # as before
        ({}, ""),
    ],
)
def test_rates_of_other_data_are_told(noted, told, tmp_path):
    """Those of a table with another vocabulary, in the same folder of results."""
    rate = {**dict.fromkeys(speed.FIGURES, 1.0), "device": "D", "versions": {"torch": "2"}, **noted}
    folder.write_json(tmp_path / "speed.json", {"a": rate})
    text, _, _ = rendered(tmp_path, [result()])
    assert (f"are of other options or data than the table's: {told}." in text) == bool(told)
    assert ("memory are of other" in text) == bool(told)


def test_lines_of_two_runs_are_not_joined(tmp_path, capsys):
    """The same training with other options: one of the lines is of something else."""
    path = tmp_path / "runs.jsonl"
    lines = [result(), result(run={**result()["run"], "options": {"--lr": 5}})]
    lines[1]["evaluations"] = {"valid": {"loss": 9.0, "perplexity": 9.0}}
    path.write_text("\n".join(map(json.dumps, lines)))
    assert kept.read(path) == {"a/seed-1": lines[0]}
    assert "has several trainings of a/seed-1" in capsys.readouterr().err


def test_a_training_that_takes_the_place_of_another_is_told(tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    kept.add(path, [result()])
    kept.add(path, [result()])
    assert capsys.readouterr().err == ""
    kept.add(path, [result(training={"parameters": 2, "curve": []})])
    assert f"{path} had another training of a/seed-1: the one with more evaluations counts" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["valid", "valid-small", "valid.1"])
def test_the_curve_of_a_split_with_any_name(split, tmp_path):
    """Its validations also tell which rates have the seconds of a validation in them."""
    lines = ['train_inner | {"num_updates": "1", "wps": "9"}', 'train_inner | {"num_updates": "2", "wps": "5"}']
    lines += [f'{split} | {{"{split}_num_updates": "2", "{split}_loss": "3.5"}}']
    lines += ['train_inner | {"num_updates": "3", "wps": "1"}', 'train_inner | {"num_updates": "4", "wps": "5"}']
    (tmp_path / "log").write_text(HEAD + "".join(f"2026-01-01 00:00:00 | INFO | {line}\n" for line in lines))
    found = logs.training(tmp_path / "log", split)
    assert found["curve"] == [[2, 3.5]] and found["tokens_per_second"] == 5


def test_evaluations_of_a_former_training_are_made_again(tiny, monkeypatch):
    """Checkpoints and trained.json were removed to train a run again."""
    plan = execute.Plan(table.load(tiny), tiny.parent / "out", {})
    one = table.Run("lamemo", 1)
    held, asked = plan.folder(one), []
    for evaluation in plan.evaluations(one):
        identity = plan.evaluation_identity(one, evaluation)
        folder.write_json(held.evaluated(evaluation.name), {"loss": 1.0, "perplexity": 2.0, "identity": identity})

    def train_alone(argv, log, *rest):
        if "examples.tables.evaluate" in argv:
            asked.extend(job["result"] for job in json.loads((held.path / "evaluations" / "jobs.json").read_text()))
            return process.Ended(1, 0.1)
        held.checkpoints.mkdir(exist_ok=True)
        held.checkpoint.touch()
        log.write_text(HEAD)
        return process.Ended(0, 0.1)

    monkeypatch.setattr(process, "run", train_alone)
    assert run(tiny, "--only", "lamemo") == 1
    assert len(asked) == len(plan.evaluations(one))


def test_two_figures_of_one_evaluation_are_told(tmp_path, capsys):
    """And joined lines keep the starts of both: where it was trained, and where it was evaluated."""
    path = tmp_path / "runs.jsonl"
    lines = [result(), result(starts=[{**result()["starts"][0], "device": "E"}])]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert [start["device"] for start in kept.read(path)["a/seed-1"]["starts"]] == ["D", "E"]
    assert capsys.readouterr().err == ""
    for change, told in (({"loss": 1.0001}, False), ({"loss": 1.1, "identity": ["x"]}, False), ({"loss": 1.1}, True)):
        lines[1]["evaluations"] = {"test": {**lines[0]["evaluations"]["test"], **change}}
        path.write_text("\n".join(map(json.dumps, lines)))
        assert kept.read(path)["a/seed-1"]["evaluations"]["test"]["loss"] == change["loss"]
        assert ("other figures of the same evaluation, a/seed-1 test: the later" in capsys.readouterr().err) is told


def test_the_tokens_of_an_update_are_those_of_most(tmp_path):
    """The last record may be of the end of an epoch."""
    lines = [f'{{"num_updates": "{n}", "wpb": "{words}"}}' for n, words in ((1, 64), (2, 64), (3, 32))]
    (tmp_path / "log").write_text(HEAD + "".join(f"2026-01-01 00:00:00 | INFO | train_inner | {x}\n" for x in lines))
    assert logs.training(tmp_path / "log")["tokens_an_update"] == 64


@pytest.mark.parametrize(
    ("evaluated", "trained", "told"),
    [
        ({}, {}, (True, True)),
        ({"batch-size": 4}, {"batch-size-valid": 4}, (False, False)),
        ({"documents": "recorded"}, {}, (False, True)),
        ({"documents": "recorded", "at-document": "keep"}, {}, (True, True)),
    ],
)
def test_rows_that_are_read_in_unlike_numbers_of_streams_are_told(evaluated, trained, told, tmp_path):
    """Without --batch-size, fairseq-eval-lm reads as many as its --max-tokens holds segments."""
    rows = {
        "a": {"title": "A", "options": {"tokens-per-sample": 8}},
        "b": {"title": "B", "options": {"tokens-per-sample": 16}, "streams": 1},
    }
    evaluation = {"options": evaluated, "subsets": ["test"]}
    text, _, _ = rendered(tmp_path, [result()], rows=rows, evaluation=evaluation, options=trained)
    assert ("were read in fewer streams" in text, "Curves are of validations" in text) == told
    del rows["b"]
    text, _, _ = rendered(tmp_path, [result()], rows=rows, evaluation=evaluation, options=trained)
    assert "streams" not in text.split("Device")[0].split("Other options")[0]
