"""Recipes in shell and hydra, which say what the tables say; and figures from logs."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from examples.tables import __main__ as runner
from examples.tables import commands, execute, logs, recipes, render, scale, table
from lamemo_fairseq.host import named_checkpoints

ROOT = Path(__file__).parent.parent
TABLES = sorted((ROOT / "examples").glob("**/table.yaml"))
# Of every data set one row is in the repository as a script and as a YAML.
RECIPES = [ROOT / "examples" / name for name in ("enwik8", "text8", "wikitext-103", "novels/words", "books/words")]


@pytest.mark.parametrize("form, ending", [("shell", "sh"), ("yaml", "yaml")])
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipes_in_the_repository_are_what_is_printed(path, form, ending, capsys):
    """And there are no others, which could say something else."""
    assert runner.main([str(path / "table.yaml"), "--print", "lamemo", "--as", form]) == 0
    assert (path / f"lamemo.{ending}").read_text() == capsys.readouterr().out
    beside = {file for table in TABLES for file in table.parent.glob(f"*.{ending}")}
    assert beside - {*TABLES} == {recipe / f"lamemo.{ending}" for recipe in RECIPES}


@pytest.mark.parametrize("path", TABLES, ids=lambda p: runner.table_name(p))
def test_every_row_is_printed_as_fairseq_takes_it(path, monkeypatch, caplog):
    """Its commands pass the checks without a warning, but for the memory's length, which a table gives to all rows.

    A script has the same commands, a YAML the same options; the page of a table has LaMemo's commands.
    """
    from fairseq import options

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # the recipes' precision needs a GPU
    monkeypatch.setattr(named_checkpoints, "_files", lambda options: [])  # of --path
    loaded, page = table.load(path), (path.parent / "README.md").read_text()
    ours = next(row for row in loaded.rows if row.startswith("lamemo"))
    for row in loaded.rows:
        commands_, script, text = (printed(loaded, row, path, form) for form in recipes.FORMS)
        assert f"`{row}`" in page, f"{path.parent.name}/README.md lists no `{row}`"
        assert row != ours or commands_ in page
        train, test = map(one_line, commands_.split("\n\n"))
        number = table.streams(loaded, row)
        script = one_line(script).replace(f"$(({number} / GPUS))", str(number))
        assert f" fi {train} # On one GPU" in script and script.endswith(f" {test}")
        parsed = options.parse_args_and_arch(options.get_training_parser(), input_args=shlex.split(train)[1:])
        compare(yaml.safe_load(text), parsed, set(re.findall(r" --([\w-]+)", train)))
    options.parse_args_and_arch(options.get_eval_lm_parser(), input_args=shlex.split(test)[1:])
    told = {record.message for record in caplog.records if record.levelname == "WARNING"}
    assert told <= {"--mem-len is ignored: --memory none has no slots"}


def printed(loaded, row, path, form):
    return recipes.printed(form, loaded, table.Run(row, loaded.seeds[0]), runner.table_name(path), 1, {}, "source")


def one_line(text):
    return " ".join(text.replace("\\\n", " ").split())


def compare(groups, parsed, names):
    """See that a YAML for hydra holds the options *names* of a command line, with its values."""
    found = {key: value for group in groups.values() for key, value in group.items() if key != "_name"}
    found.update({option: groups[group]["_name"] for option, group in recipes.NAMED.items() if group in groups})
    assert {name.replace("_", "-") for name in found} - {"data"} == names
    for name, value in found.items():
        given = getattr(parsed, name.replace("-", "_"))
        wanted = {"data": "???", "user_dir": f"${{oc.env:PWD}}/{given}", "save_dir": f"${{oc.env:PWD}}/{given}"}
        assert value == wanted.get(name, given) or str(value) == str(given), name


def test_examples_hold_what_a_page_shows():
    """The map names every folder, and every picture is on a page. Files that git ignores do not count."""
    known = subprocess.run(["git", "-C", ROOT, "ls-files", "*.md", "*.svg"], capture_output=True, text=True)
    if known.returncode:
        pytest.skip("the files in the repository are known from git")
    files = [ROOT / line for line in known.stdout.splitlines()]
    pages = {file: file.read_text() for file in files if file.suffix == ".md"}
    shown = {
        (page.parent / name).resolve() for page, text in pages.items() for name in re.findall(r"[\w./-]+\.svg", text)
    }
    assert {file for file in files if file.suffix == ".svg" and "examples" in file.parts} <= shown
    folders = {file.relative_to(ROOT / "examples").parts[0] for file in files if ROOT / "examples" in file.parents}
    named = pages[ROOT / "examples" / "README.md"]
    assert all(f"`{name}`" in named or name.endswith("_lm") for name in folders - {"README.md"})


def test_what_is_rendered_anew_is_either_tracked_or_ignored():
    """So that git shows no new file. Tracked ones are those that a page shows."""
    names = [f"{plot}.{form}" for plot in ("summary", "curves", "memory") for form in ("svg", "png")]
    names += ["table.md", "table.csv", "curves.csv", "evaluations.csv", "runs.lock"]
    folders = [file.parent for file in (ROOT / "examples").glob("**/results/runs.jsonl")]
    written = {str((folder / name).relative_to(ROOT)) for folder in folders for name in names}
    outputs = [
        subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True)
        for command in (["ls-files", "examples"], ["check-ignore", "--no-index", *written])
    ]
    if any(done.returncode for done in outputs):
        pytest.skip("the files in the repository are known from git")
    tracked, ignored = (set(done.stdout.splitlines()) for done in outputs)
    assert folders and written <= tracked ^ ignored


def test_a_shell_recipe_computes_nothing_but_the_streams():
    """Whatever the values of a table look like."""
    words = ["data", "--lr", "$((1)); touch x", "--batch-size", "$((4 / GPUS))", "--title", "`x`"]
    quoted = commands.shell("fairseq-train", words)
    assert quoted == "fairseq-train data --lr '$((1)); touch x' --batch-size $((4 / GPUS)) --title '`x`'"


def test_an_option_that_no_yaml_can_hold_is_told(tiny):
    loaded = table.load(tiny)
    loaded.options["tokens-per-sampel"] = 3
    with pytest.raises(table.TableError, match="has no --tokens-per-sampel for a YAML; near are --tokens-per-sample"):
        recipes.config(loaded, table.Run("lamemo", 1), "tiny", 1, {})
    loaded.options["optimizer"] = "sgd"
    with pytest.raises(table.TableError, match="has no --optimizer sgd for a YAML"):
        recipes.config(loaded, table.Run("lamemo", 1), "tiny", 1, {})


@pytest.mark.parametrize("path", TABLES, ids=lambda p: runner.table_name(p))
def test_rows_train_on_as_many_tokens(path):
    """In all, and an update, but for rows that say otherwise in their names."""
    loaded = table.load(path)

    def tokens(row):
        options = commands.training_options(loaded, row, {})
        an_update = table.streams(loaded, row) * options["tokens-per-sample"]
        return an_update * options["max-update"], an_update

    found = {row: tokens(row) for row in loaded.rows if "longer" not in row}
    assert len({total for total, _ in found.values()}) == 1
    assert len({an_update for row, (_, an_update) in found.items() if "half_updates" not in row}) == 1


@pytest.mark.parametrize("name", ["enwik8", "text8", "wikitext-103"])
def test_published_tables_can_be_shrunk(name):
    loaded = table.load(ROOT / "examples" / name / "table.yaml")
    assert not {option for row in loaded.rows.values() for option in row.options} & set(scale.SHRUNK)


def test_a_shell_recipe_shares_the_streams_of_the_table(tmp_path, capsys):
    """Run with stand-ins for fairseq's commands, and for the Python that counts GPUs."""
    for name, text in {
        "python": "echo $DEVICES",
        "fairseq-train": 'echo train "$@"',
        "fairseq-eval-lm": 'echo "eval on $CUDA_VISIBLE_DEVICES" "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DEVICES": "4", "CUDA_VISIBLE_DEVICES": "3,2,1,0"}
    recipe = ["bash", str(ROOT / "examples" / "enwik8" / "lamemo.sh")]
    elsewhere = subprocess.run(recipe, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert elsewhere.returncode == 1 and "start from the root of the checkout" in elsewhere.stderr
    (tmp_path / "lamemo_fairseq").mkdir()
    done = subprocess.run(recipe, capture_output=True, text=True, env=environment, check=True, cwd=tmp_path)
    loaded = table.load(ROOT / "examples" / "enwik8" / "table.yaml")
    train = commands.train(loaded, table.Run("lamemo", 1), "checkpoints/enwik8/lamemo", {}, gpus=4)
    best = "checkpoints/enwik8/lamemo/checkpoint_best.pt"
    test = commands.evaluate(loaded, "lamemo", best, table.Evaluation("test"), {})
    assert done.stdout.splitlines() == [" ".join(["train", *train]), " ".join(["eval on 3", *test])]
    environment["DEVICES"] = "3"
    done = subprocess.run(recipe, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 1 and "40 streams do not divide into 3 GPUs" in done.stderr and not done.stdout


def test_hydra_recipes_train_what_the_command_line_trains(monkeypatch):
    """fairseq makes the same configuration of both."""
    from fairseq import options
    from fairseq.dataclass.initialize import add_defaults, hydra_init
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf, open_dict

    path = ROOT / "examples" / "enwik8" / "table.yaml"
    loaded = table.load(path)
    arguments = commands.train(loaded, table.Run("lamemo", 1), "checkpoints/enwik8/lamemo", {})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # the recipes' precision needs a GPU
    parsed = options.parse_args_and_arch(options.get_training_parser(), input_args=arguments)
    expected = OmegaConf.to_container(convert_namespace_to_omegaconf(parsed), resolve=True, enum_to_str=True)

    monkeypatch.setenv("PWD", "")
    hydra_init("lamemo")
    with initialize_config_dir(str(path.parent), version_base="1.1"):
        composed = compose("lamemo", overrides=["task.data=data-bin/enwik8"])
        with open_dict(composed):
            add_defaults(composed)
    found = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    for group in recipes.GROUPS:
        for key, value in found[group].items():
            wanted = expected[group].get(key)
            if key in ("user_dir", "save_dir"):
                value = value.lstrip("/")
            assert wanted == value or str(wanted) == str(value), (group, key, wanted, value)


def test_a_perplexity_says_of_what_it_is(tmp_path):
    """The data may be words, or pieces of them, which is not for the table to know."""
    loaded = table.load(ROOT / "examples/novels/words/table.yaml")
    told = "Perplexity per token of the data; mean and standard deviation over the seeds."
    assert told in render.write(execute.Plan(loaded, tmp_path), [])
    loaded.evaluation.options["post-process"] = "sentencepiece"
    assert "Perplexity; mean and" in render.write(execute.Plan(loaded, tmp_path), [])


def test_means_and_spreads():
    assert render.shown([3.0], 2) == "3.00" and render.shown([], 2) == ""
    assert render.shown([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00"


def test_a_log_of_a_resumed_run(tmp_path):
    """The first interval after a start or a validation is slow and left out; repeated validations count once."""
    lines = [
        "2026-01-01 00:00:00 | INFO | fairseq_cli.train | num. shared model params: 1,234 (num. trained: 1,234)",
        device(0, 80.0),
        "2026-01-01 00:00:00 | INFO | fairseq_cli.train | training on 1 devices (GPUs/TPUs)",
        inner(1, wps=10, free=60.0),
        inner(2, wps=100, free=55.5),
        valid(2, 3.5),
        '2026-01-01 00:00:00 | INFO | train_inner | {"epoch": 1, "lo',
        "2026-01-01 00:00:00 | INFO | fairseq_cli.train | training on 1 devices (GPUs/TPUs)",
        inner(2, wps=20, free=70.0),
        valid(2, 3.4),
        inner(3, wps=30, free=70.0),
        inner(4, wps=300, free=70.0),
        valid(4, 3.0),
    ]
    (tmp_path / "log").write_text("\n".join(lines))
    found = logs.training(tmp_path / "log")
    assert found["parameters"] == 1234 and found["curve"] == [[2, 3.4], [4, 3.0]] and found["updates"] == 4
    assert found["tokens_per_second"] == 200 and found["device_memory_gib"] == 24.5
    (tmp_path / "log").write_text("nothing")
    with pytest.raises(logs.LogError):
        logs.training(tmp_path / "log")
    with pytest.raises(logs.LogError):
        logs.evaluation(tmp_path / "log")


def test_the_curve_is_of_bits_a_token(tmp_path):
    """With --sentence-avg fairseq logs the loss of a segment, and that of a token by another name."""
    head = "2026-01-01 00:00:00 | INFO | fairseq_cli.train | num. shared model params: 1,234 (num. trained: 1,234)\n"
    (tmp_path / "log").write_text(head + valid(2, 35.6, valid_nll_loss="5.342"))
    assert logs.training(tmp_path / "log")["curve"] == [[2, 5.342]]


def test_memory_is_counted_with_the_graphs_that_there_are(tmp_path):
    """Updates before a recording, and the one that records, need for themselves what the graph keeps later."""
    lines = [
        "2026-01-01 00:00:00 | INFO | fairseq_cli.train | num. shared model params: 1,234 (num. trained: 1,234)",
        device(0, 80.0),
        "2026-01-01 00:00:00 | INFO | fairseq_cli.train | training on 1 devices (GPUs/TPUs)",
        inner(1, wps=10, free=76.0),
        graph("training", 3.5),
        inner(2, wps=10, free=75.5),
        inner(3, wps=100, free=79.0),
        graph("evaluation", 0.25),
        inner(4, wps=100, free=79.0),
        inner(5, wps=100, free=79.0),
        "2026-01-01 00:00:00 | INFO | fairseq_cli.train | training on 1 devices (GPUs/TPUs)",
        inner(5, wps=100, free=76.0),
    ]
    found = []
    for count in (5, 6, 7, 9, 10, 12):
        (tmp_path / "log").write_text("\n".join(lines[:count]))
        found.append(logs.training(tmp_path / "log")["device_memory_gib"])
    assert found == [4.0, 4.5, 4.5, 4.5, 4.75, 4.75]


def test_memory_is_that_of_each_start_s_own_device(tmp_path):
    """A run went on on a larger device, whose free memory says nothing about the former one's."""
    lines = [
        "2026-01-01 00:00:00 | INFO | fairseq_cli.train | num. shared model params: 1,234 (num. trained: 1,234)",
        device(0, 80.0),
        device(1, 40.0),
        "2026-01-01 00:00:00 | INFO | fairseq_cli.train | training on 2 devices (GPUs/TPUs)",
        inner(1, wps=10, free=60.0),
        device(0, 140.0),
        "2026-01-01 00:00:00 | INFO | fairseq_cli.train | training on 1 devices (GPUs/TPUs)",
        inner(2, wps=10, free=125.0),
    ]
    (tmp_path / "log").write_text("\n".join(lines))
    assert logs.training(tmp_path / "log")["device_memory_gib"] == 20.0


@pytest.mark.parametrize("peak, memory", [("", None), (f"{logs.DEVICE_MEMORY}0.903 GiB\n", 0.903)])
def test_a_log_of_an_evaluation(tmp_path, peak, memory):
    """The line about the device's memory is there on a GPU alone."""
    log = "Evaluated 509,508 tokens in 12.7s (40046.67 tokens/s)\nLoss (base 2): 6.3947, Perplexity: 84.14\n"
    (tmp_path / "log").write_text(log + peak)
    found = logs.evaluation(tmp_path / "log")
    assert found["device_memory_gib"] == memory
    assert (found["tokens"], found["loss"], found["perplexity"]) == (509_508, 6.3947, 84.14)


def inner(update, wps, free):
    record = {"num_updates": str(update), "loss": "3", "wps": str(wps), "wpb": "64", "gb_free": str(free)}
    return f"2026-01-01 00:00:00 | INFO | train_inner | {json.dumps(record)}"


def device(rank, memory):
    told = f"rank {rank:3d}: capabilities =  9.0  ; total memory = {memory:.3f} GB ; name"
    return f"2026-01-01 00:00:00 | INFO | fairseq.utils | {told}"


def graph(kind, memory):
    told = f"recorded a CUDA graph for {kind} segments of 4 x 16 tokens, which keeps {memory:.2f} GiB to itself"
    return f"2026-01-01 00:00:00 | INFO | lamemo_fairseq.core.graphs | {told}"


def valid(update, loss, **others):
    record = {"epoch": 1, "valid_loss": str(loss), **others, "valid_num_updates": str(update)}
    return f"2026-01-01 00:00:00 | INFO | valid | {json.dumps(record)}"
