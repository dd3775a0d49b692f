"""The command that analyses checkpoints: its files and figures, and what it tells or refuses."""

import contextlib
import csv
import json
import math
import re
import resource
import shutil

import pytest
import torch
from fairseq_cli import eval_lm, train

from lamemo_fairseq import score
from lamemo_fairseq.analysis import __main__, report
from lamemo_fairseq.data.binarized import load_dictionary, load_lines
from lamemo_fairseq.models.language_models import LaMemoLanguageModel

from .helpers import TASK, run_command, write_data
from .test_commands import printed


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A LaMemo and a Transformer-XL after some updates, and their data."""
    folder = tmp_path_factory.mktemp("analysis")
    data = write_data(folder / "data", train=2000, valid=333)
    for arch, options in (("lamemo_lm", []), ("transformer_xl_lm", ["--adaptive-softmax-cutoff", "10,20"])):
        run_command(
            train.cli_main, data, *TASK, "--arch", arch, "--decoder-layers", 2, "--decoder-embed-dim", 16,
            "--decoder-attention-heads", 2, "--decoder-ffn-embed-dim", 32, "--tokens-per-sample", 8, "--mem-len", 16,
            "--batch-size", 4, "--optimizer", "adam", "--lr", 0.02, "--max-update", 10, "--no-epoch-checkpoints",
            "--num-workers", 0, "--save-dir", folder / arch, *options,
        )  # fmt: skip
    return folder


def lines(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_one_command_from_checkpoints_to_figures(trained, capsys):
    """The loss is that of fairseq-eval-lm, which reads the same streams, and averages the positions."""
    names = {"LaMemo": "lamemo_lm", "Transformer-XL": "transformer_xl_lm"}
    models = [f"{name}={trained / arch / 'checkpoint_last.pt'}" for name, arch in names.items()]
    out = trained / "figures"
    data = str(trained / "data")
    options = ["--batch-size", "2", "--cut-memory", "0", "3", "--cpu"]
    assert __main__.main([data, *models, "--out", str(out), *options]) == 0
    told = capsys.readouterr().out
    assert "with 3 slots, 2 streams" in told and "documents" not in told, "no documents were told apart"
    positions = lines(out / "loss_by_position.csv")
    for name, arch in names.items():
        path = trained / arch / "checkpoint_last.pt"
        options = ["--path", path, "--gen-subset", "valid", "--batch-size", 2, "--num-workers", 0]
        text = printed(eval_lm.cli_main, data, *TASK, *options)
        expected = float(re.search(r"Loss \(base 2\): ([\d.]+)", text).group(1))
        assert f"{name}: loss {expected:.4f} bits over 333 tokens" in told
        own = [line for line in positions if line["model"] == name]
        tokens = [int(line["tokens"]) for line in own]
        assert len(own) == 8 and sum(tokens) == 333
        mean = sum(float(line["loss"]) * n for line, n in zip(own, tokens, strict=True)) / 333
        assert mean == pytest.approx(expected, abs=6e-5)

    slots = [line for line in lines(out / "attention_by_slot.csv") if line["model"] == "LaMemo"]
    assert [int(line["offset"]) for line in slots] == list(range(-16, 0))
    layers = [float(slots[3][f"layer {i}"]) for i in (1, 2)]
    assert float(slots[3]["mean"]) == pytest.approx(sum(layers) / 2)
    figure = {(line["model"], int(line["offset"])): line for line in lines(out / "figure1.csv")}
    assert float(figure["LaMemo", -10]["into memory"]) == pytest.approx(sum(float(s["mean"]) for s in slots[6:11]))
    distances = [line for line in lines(out / "attention_by_distance.csv") if line["model"] == "LaMemo"]
    near = sum(float(d["mean"]) for d in distances[1:6])
    assert float(figure["LaMemo", -5]["from the query"]) == pytest.approx(near)
    assert figure["LaMemo", -20]["into memory"] == "" and {model for model, _ in figure} == set(names)
    ages = lines(out / "alpha.csv")
    assert [(line["model"], line["layer"], line["age"]) for line in ages] == [("LaMemo", "1", a) for a in "12"]
    for name in ("figure1", "alpha", "loss_by_position", "loss_by_document_position", "loss_by_memory"):
        assert (out / f"{name}.svg").read_text().startswith("<?xml") and (out / f"{name}.png").exists()

    # Two streams, and so two documents, from whose beginnings all tokens are counted.
    memories = {
        (line["model"], int(line["memory slots"]), line["class"]): line for line in lines(out / "loss_by_memory.csv")
    }
    assert {key[1] for key in memories} == {0, 3, 16}
    for name in names:
        own = [line for line in lines(out / "loss_by_document_position.csv") if line["model"] == name]
        own = [line for line in own if (line["memory slots"], line["class"]) == ("16", "all")]
        assert [(int(line["from"]), int(line["to"])) for line in own] == [(2**n, 2 ** (n + 1) - 1) for n in range(8)]
        assert [int(line["tokens"]) for line in own] == [2, 4, 8, 16, 32, 64, 128, 79]
        mean = sum(float(line["loss"]) * int(line["tokens"]) for line in own) / 333
        assert mean == pytest.approx(float(memories[name, 16, "all"]["loss"]), rel=1e-9)
    path = trained / "lamemo_lm" / "checkpoint_last.pt"
    none = {"memory": "none", "position_encoding": "transformer-xl"}
    own = float(memories["LaMemo", 16, "all"]["loss"])
    for slots, other in {3: {"mem_len": 3}, 0: none}.items():
        options = ["--path", path, "--gen-subset", "valid", "--batch-size", 2, "--num-workers", 0]
        text = printed(eval_lm.cli_main, data, *TASK, *options, "--model-overrides", repr(other))
        expected = float(re.search(r"Loss \(base 2\): ([\d.]+)", text).group(1))
        line = memories["LaMemo", slots, "all"]
        assert float(line["loss"]) == pytest.approx(expected, abs=6e-5) != pytest.approx(own, abs=6e-5)
        assert float(line["difference"]) == pytest.approx(float(line["loss"]) - own, abs=1e-9)


def test_the_paper_s_points_are_shown_with_its_data_alone(tmp_path):
    assert report.figure1({}, paper=False) == []
    points = {(line["model"], line["offset"]): line for line in report.figure1({}, paper=True)}
    assert points["Transformer-XL (paper)", -5]["into memory"] == 0.09
    for name in ("wikitext-103", "own"):
        (tmp_path / "preprocess.json").write_text(json.dumps({"made_from": {"settings": {"name": name}}}))
        assert __main__._is_wikitext_103(str(tmp_path)) == (name == "wikitext-103")
    assert not __main__._is_wikitext_103(str(tmp_path / "none"))


def test_every_curve_of_figure1_is_named_once_and_keeps_its_colour():
    """A model without memory has points in the right panel alone, one without attention in none."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    points = {"T": (None, 0.2), "LaMemo": (0.1, 0.2), "no attention": (None, None), "LaMemo (paper)": (0.05, 0.05)}
    figure = report._draw_figure1(
        pyplot,
        [
            {"model": name, "offset": offset, "into memory": slot, "from the query": distance}
            for name, (slot, distance) in points.items()
            for offset in (-10, -5)
        ],
    )
    (legend,) = [axis.get_legend() for axis in figure.axes if axis.get_legend()]
    named = {
        text.get_text(): line.get_color() for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)
    }
    assert [text.get_text() for text in legend.get_texts()] == ["T", "LaMemo", "LaMemo (paper)"]
    assert len(set(named.values())) == 3
    drawn = [
        {line.get_label(): line.get_color() for line in axis.get_lines() if len(line.get_xdata())}
        for axis in figure.axes
    ]
    assert [list(panel) for panel in drawn] == [["LaMemo", "LaMemo (paper)"], ["T", "LaMemo", "LaMemo (paper)"]]
    assert all(named[name] == colour for panel in drawn for name, colour in panel.items())
    pyplot.close(figure)


def test_another_memory_length_and_a_part_of_the_split(trained, capsys, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *_: {})  # takes its time
    path = trained / "lamemo_lm" / "checkpoint_last.pt"
    options = ["--mem-len", "24", "--tokens-per-sample", "4", "--segments", "9", "--batch-size", "2", "--cpu"]
    out = trained / "longer"
    assert __main__.main([str(trained / "data"), str(path), "--out", str(out), *options]) == 0
    assert "lamemo_lm: loss" in (told := capsys.readouterr().out) and "over 72 tokens" in told
    assert len(lines(out / "attention_by_slot.csv")) == 24 and lines(out / "alpha.csv")[-1]["age"] == "6"


def test_recorded_documents_are_read_each_from_an_empty_memory(trained, tmp_path, capsys, monkeypatch):
    """The loss is that of the score command."""
    monkeypatch.setattr(report, "draw", lambda *_: {})
    data = shutil.copytree(trained / "data", tmp_path / "data")
    number = len(load_lines(str(data), "valid", load_dictionary(str(data / "dict.txt")), None, False))
    (data / "valid.documents").write_text(f"3\n4\n{number - 7}\n")
    path, options = str(trained / "lamemo_lm" / "checkpoint_last.pt"), ["--batch-size", "2", "--cpu"]
    options += ["--documents", "recorded"]
    assert __main__.main([str(data), path, "--out", str(tmp_path / "out"), *options]) == 0
    all_tokens = [line for line in lines(tmp_path / "out" / "loss_by_document_position.csv") if line["class"] == "all"]
    assert all_tokens[0]["tokens"] == "3" and sum(int(line["tokens"]) for line in all_tokens) == 333
    assert all_tokens[0]["documents"] == "as recorded, each from an empty memory"
    capsys.readouterr()
    score.main([str(data), path, "--subset", "valid", *options])
    scored = json.loads(capsys.readouterr().out)
    assert scored["read_as"] == "3 documents, each from an empty memory"
    mean = sum(float(line["loss"]) * int(line["tokens"]) for line in all_tokens) / 333
    assert mean == pytest.approx(scored["bits_per_token"], rel=1e-6)


def test_a_model_without_slots(trained, tmp_path, capsys, monkeypatch):
    """Its attention is that within segments."""
    monkeypatch.setattr(report, "draw", lambda *_: {})
    run_command(
        train.cli_main, trained / "data", *TASK, "--arch", "infini_attention_lm", "--decoder-layers", 1,
        "--decoder-embed-dim", 8, "--decoder-attention-heads", 2, "--decoder-ffn-embed-dim", 8, "--tokens-per-sample",
        8, "--batch-size", 4, "--optimizer", "adam", "--lr", 0.02, "--max-update", 2, "--num-workers", 0,
        "--disable-validation", "--no-epoch-checkpoints", "--save-dir", tmp_path,
    )  # fmt: skip
    options = ["--batch-size", "2", "--segments", "3", "--cpu", "--out", str(tmp_path / "out"), "--mem-len", "9"]
    options += ["--cut-memory", "4"]
    assert __main__.main([str(trained / "data"), f"Infini={tmp_path / 'checkpoint_last.pt'}", *options]) == 0
    told = capsys.readouterr()
    for option in ("--mem-len", "--cut-memory"):
        assert f"Infini: {option} has no effect on this model: --memory infini has no slots" in told.err
    assert "of the attention" not in told.out
    assert "Infini: loss" in told.out and len(lines(tmp_path / "out" / "loss_by_position.csv")) == 8


def test_two_models_need_two_names(trained, capsys):
    path = str(trained / "lamemo_lm" / "checkpoint_last.pt")
    assert __main__.main([str(trained / "data"), path, path, "--segments", "1", "--cpu", "--out", "unused"]) == 1
    assert "two models are called 'lamemo_lm': pass NAME=CHECKPOINT" in capsys.readouterr().err


def test_figures_of_former_models_go(trained, capsys, monkeypatch):
    """And a memory that never filled up is told of."""
    monkeypatch.setattr(report, "draw", lambda *_: {})
    out, options = trained / "twice", ["--batch-size", "2", "--segments", "2", "--cpu"]
    for arch, alpha in (("lamemo_lm", True), ("transformer_xl_lm", False)):
        path = trained / arch / "checkpoint_last.pt"
        assert __main__.main([str(trained / "data"), str(path), "--out", str(out), *options]) == 0
        assert (out / "alpha.csv").exists() == alpha and (out / "loss_by_position.csv").exists()
        told = capsys.readouterr().err
        assert (
            f"{arch}: the memory of 16 slots was never full when a whole segment was read; attention is that of 8"
            in told
        )


@contextlib.contextmanager
def files_of_at_most(size):
    """As on a full disk: a file that would get longer cannot be written."""
    former, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (former, most))


def test_a_full_disk_leaves_the_former_figures(trained, capsys, monkeypatch):
    """Though all but the last file could be written."""
    monkeypatch.setattr(report, "draw", lambda *_: {"figure1.png": bytes(20000)})
    out, options = trained / "full", ["--batch-size", "2", "--segments", "2", "--cpu"]
    lamemo, other = (f"model={trained / arch / 'checkpoint_last.pt'}" for arch in ("lamemo_lm", "transformer_xl_lm"))
    assert __main__.main([str(trained / "data"), lamemo, "--out", str(out), *options]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    with files_of_at_most(10000):
        assert __main__.main([str(trained / "data"), other, "--out", str(out), *options]) == 1
    told = capsys.readouterr()
    assert "model: loss" in told.out
    message = f"error: {out / 'figure1.png'} cannot be written: File too large; {out} is left as it was\n"
    assert told.err.endswith(f"\n{message}")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert "alpha.csv" in before  # which the other model has none of


def test_a_folder_that_nothing_can_be_written_to_is_told_before_the_reading(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(__main__, "analyse", lambda *_: pytest.fail("the split was read"))
    path = str(trained / "lamemo_lm" / "checkpoint_last.pt")
    with files_of_at_most(0):
        assert __main__.main([str(trained / "data"), path, "--out", str(tmp_path), "--cpu"]) == 1
    assert capsys.readouterr().err == (
        f"error: --out {tmp_path} cannot be written to (File too large), pass another folder\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.pt", "--out", "unused"], "there is no checkpoint missing.pt, "),
        (["model=missing", "--out", "unused"], "there is no checkpoint missing, "),
        (["lamemo", "--out", "unused"], "if it is a name, pass NAME=CHECKPOINT, such as lamemo=checkpoints/"),
        (["CHECKPOINT", "--out", "CHECKPOINT"], "checkpoint_last.pt is a file, pass a folder"),
        (["CHECKPOINT", "--out", "CHECKPOINT/out"], "checkpoint_last.pt is a file, pass a folder"),
        (["CHECKPOINT", "--out", "OUT", "--subset", "other"], "(or choose another with --subset)"),
        (["CHECKPOINT", "--out", "OUT", "--batch-size", "0"], "--batch-size is 0, it must be at least 1"),
        (["CHECKPOINT", "--out", "OUT", "--segments", "0"], "0 is not positive"),
        (["CHECKPOINT", "--out", "OUT", "--documents", "two"], "--documents two: pass one, recorded, headings"),
        (["CHECKPOINT", "--out", "OUT", "--cut-memory", "-1"], "-1 is negative"),
        (["CHECKPOINT", "--out", "OUT", "--documents", "recorded"], "no documents are recorded in"),
        (["CHECKPOINT", "--out", "OUT", "--documents", "separator:none"], "'none' is not in dict.txt: pass another"),
    ],
)
def test_bad_arguments_are_told(arguments, message, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(__main__, "collect", lambda *_: pytest.fail("the split was read"))
    known = {"CHECKPOINT": str(trained / "lamemo_lm" / "checkpoint_last.pt"), "OUT": str(tmp_path / "out")}
    try:
        code = __main__.main(
            [str(trained / "data"), *(re.sub(r"^[A-Z]+", lambda m: known[m[0]], a) for a in arguments), "--cpu"]
        )
    except SystemExit as stopped:  # argparse's
        code = stopped.code
    assert code != 0 and message in capsys.readouterr().err


def test_a_rule_that_finds_no_document_is_told(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *_: {})
    path = f"model={trained / 'lamemo_lm' / 'checkpoint_last.pt'}"
    options = ["--batch-size", "2", "--segments", "1", "--cpu", "--documents"]
    for rule, is_told in (("blank-lines:9", True), ("one", False)):
        assert __main__.main([str(trained / "data"), path, "--out", str(tmp_path), *options, rule]) == 0
        told = "model: --documents blank-lines:9: no document begins inside a stream, so that each of the 2 streams"
        assert (told in capsys.readouterr().err) is is_told


def test_a_path_may_hold_the_sign(trained, tmp_path):
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    (folder / "best.pt").touch()
    assert __main__.named(f"{folder}/best.pt") == ("lr=0.1", f"{folder}/best.pt")
    assert __main__.named(f"mine={folder}/best.pt") == ("mine", f"{folder}/best.pt")


@pytest.mark.parametrize(("weight", "value", "told"), [
    ("layers.0.feed_forward.fc1.weight", math.nan, "error: NaN or infinity in the last layer"),
    ("embed_tokens.tables.0.weight", 1e38, "error: NaN or infinity in"),
])  # fmt: skip
def test_weights_that_have_diverged_are_told_and_draw_nothing(weight, value, told, trained, tmp_path, capsys):
    saved = torch.load(trained / "lamemo_lm" / "checkpoint_last.pt", weights_only=False)
    saved["model"][f"decoder.{weight}"][:] = value
    torch.save(saved, tmp_path / "diverged.pt")
    assert (
        __main__.main([str(trained / "data"), f"x={tmp_path}/diverged.pt", "--out", str(tmp_path / "o"), "--cpu"]) == 1
    )
    assert told in capsys.readouterr().err and not list((tmp_path / "o").iterdir())


def test_a_token_without_probability_has_no_mean(trained, tmp_path, capsys, monkeypatch):
    """Its loss is infinite, and so would be every mean that it is in."""
    monkeypatch.setattr(LaMemoLanguageModel, "get_normalized_probs", lambda self, output, **_: output[0] - math.inf)
    path = f"x={trained / 'lamemo_lm' / 'checkpoint_last.pt'}"
    assert __main__.main([str(trained / "data"), path, "--out", str(tmp_path / "o"), "--cpu"]) == 1
    assert "error: NaN or infinity in the loss of segment 0 of streams 0, 1" in capsys.readouterr().err
