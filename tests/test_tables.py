"""Table files and arguments of the table runner: what it refuses, prints and shares out."""

import pytest
import torch

from examples.tables import __main__ as runner
from examples.tables import commands, execute, folder, recipes, render, scale, table

from .helpers import random_tokens, read_streams, tiny_decoder
from .tables import run


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
        result = {"run": identity, "scale": None, "starts": []}
        assert identity["streams"] == number and plan.otherwise(result) == []
        assert plan.otherwise({**result, "run": {**identity, "streams": 5}}) == [f"streams 5 (table: {number})"]
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
    with pytest.raises(table.TableError, match="row 'lamemo' sets --max-update for itself: copy the table without"):
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
