"""Options of fairseq-train that nothing else here tries, with streams."""

import logging
import math
import re
import shutil

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.trainer import Trainer
from fairseq_cli import train

from lamemo_fairseq.host.adam import FusedAdam

from .helpers import TASK, run_command, write_data

MODEL = ["--arch", "lamemo_lm", "--decoder-layers", 1, "--decoder-embed-dim", 8, "--decoder-attention-heads", 1]
MODEL += ["--decoder-ffn-embed-dim", 8, "--mem-len", 4, "--dropout", 0]
RUN = ["--num-workers", 0, "--log-format", "simple", "--log-interval", 1, "--seed", 1]
SIZES = ["--tokens-per-sample", 8, "--batch-size", 4]  # five segments a stream
ADAM = ["--optimizer", "adam", "--lr", 1e-2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), train=160, valid=60)


@pytest.fixture
def fit(data, tmp_path, caplog):
    """Train in a folder; the names of its checkpoints and what was logged."""

    def run(*options, folder="run", data=data, sizes=SIZES, optimizer=ADAM):
        caplog.clear()
        caplog.set_level(logging.INFO)
        for function in (train.should_stop_early, checkpoint_utils.save_checkpoint):  # they remember the best
            while function is not None:
                vars(function).pop("best", None)
                function = getattr(function, "__wrapped__", None)
        place = ["--save-dir", tmp_path / folder]
        run_command(train.cli_main, data, *TASK, *MODEL, *RUN, *sizes, *optimizer, *place, *options)
        return {path.name for path in (tmp_path / folder).glob("*.pt")}, caplog.text

    return run


def rates(text):
    return [float(rate) for rate in re.findall(r"train_inner.*? lr=([\d.e-]+)", text)]


def test_the_rate_in_the_log_is_that_of_the_next_update(fit, monkeypatch):
    """After the last update, a cosine's is that of a period that never begins."""
    used, update = [], FusedAdam._update
    monkeypatch.setattr(FusedAdam, "_update", lambda *given: used.append(given[1]["lr"]) or update(*given))
    _, text = fit("--lr-scheduler", "cosine", "--max-update", 4)
    assert used == pytest.approx([0.01 * (1 + math.cos(math.pi * done / 4)) / 2 for done in range(4)])
    assert rates(text) == pytest.approx([*used[1:], 0.001], rel=1e-4)


def loaded(path):
    return torch.load(path, weights_only=False)


def test_when_to_save_and_to_validate(fit):
    names, text = fit(
        *("--max-epoch", 4, "--save-interval", 2, "--keep-last-epochs", 1, "--validate-interval", 2),
        *("--validate-after-updates", 11, "--no-last-checkpoints", "--checkpoint-suffix", "_a"),
        *("--keep-best-checkpoints", 1, "--best-checkpoint-metric", "ppl", "--maximize-best-checkpoint-metric"),
    )
    assert names == {
        "checkpoint4_a.pt",
        "checkpoint_best_a.pt",
        *(n for n in names if n.startswith("checkpoint.best_ppl")),
    }
    assert len(re.findall(r"valid on 'valid' subset \| ", text)) == 1 and len(rates(text)) == 20


def test_what_is_kept_of_saves_between_updates(fit):
    names, _ = fit(
        *("--max-update", 9, "--save-interval-updates", 2, "--keep-interval-updates", 1, "--no-epoch-checkpoints"),
        *("--keep-interval-updates-pattern", 4, "--disable-validation"),
    )
    assert names == {"checkpoint_1_4.pt", "checkpoint_2_6.pt", "checkpoint_2_8.pt", "checkpoint_last.pt"}


def test_no_checkpoint_at_all(fit):
    assert fit("--max-update", 2, "--no-save")[0] == set()


def test_the_rate_by_epoch(fit):
    _, text = fit("--max-epoch", 3, "--force-anneal", 2, "--lr-shrink", 0.5, "--no-save", "--disable-validation")
    assert rates(text) == [0.01] * 5 + [0.005] * 5 + [0.0025] * 5
    _, text = fit("--max-epoch", 3, "--force-anneal", 2, "--stop-min-lr", 6e-3, "--no-save", "--disable-validation")
    assert rates(text) == [0.01] * 5 + [0.001] * 5 and "--stop-min-lr=0.006" in text


def test_going_on_with_another_optimizer(fit, tmp_path):
    fit("--max-update", 4, "--disable-validation", folder="first")
    path = tmp_path / "first" / "checkpoint_last.pt"
    after = {}
    for name, options in {
        "as it was": ["--continue-once", path],
        "momentum": ["--restore-file", path, "--optimizer-overrides", "{'betas': (0.5, 0.5)}"],
        "anew": ["--restore-file", path, "--reset-optimizer"],
    }.items():
        fit("--max-update", 6, "--disable-validation", *options, folder=name)
        after[name] = loaded(tmp_path / name / "checkpoint_last.pt")
    weights = [state["model"]["decoder.layers.0.feed_forward.fc1.weight"] for state in after.values()]
    assert not any(a.equal(b) for i, a in enumerate(weights) for b in weights[:i])
    assert after["momentum"]["last_optimizer_state"]["param_groups"][0]["betas"] == (0.5, 0.5)


def test_the_best_value_of_a_restored_run_is_told_where_no_checkpoint_has_it(fit, tmp_path):
    """It counts, as in fairseq: a run that never reaches it ended without checkpoint_best.pt, and said nothing."""
    fit("--max-epoch", 2, folder="first")
    path, worse = tmp_path / "first" / "checkpoint_last.pt", ["--max-epoch", 4, "--lr", 9]
    names, text = fit(*worse, "--restore-file", path, folder="other")
    best = f"is {loaded(path)['extra_state']['best']:.6g} or less, the best value in {path}; pass --reset-meters, once,"
    told = f"{tmp_path / 'other'} has no checkpoint_best.pt, and gets one once loss {best}"
    assert "checkpoint_best.pt" not in names and text.count(told) == 1
    names, text = fit(*worse, "--restore-file", path, "--reset-meters", folder="anew")
    assert "checkpoint_best.pt" in names and "gets one" not in text
    for folder, options in (("kept", ["--no-save"]), ("unmeasured", ["--disable-validation"])):
        assert "gets one" not in fit(*worse, "--restore-file", path, *options, folder=folder)[1]
    assert "gets one" not in fit(*worse, folder="first")[1]  # which has it


def test_a_checkpoint_without_optimizer(fit, tmp_path):
    """It serves evaluation and finetuning; a run that went on from it would begin anew without a word."""
    fit("--max-update", 4, "--disable-validation", "--no-save-optimizer-state")
    path = tmp_path / "run" / "checkpoint_last.pt"
    assert "last_optimizer_state" not in loaded(path)
    with pytest.raises(ValueError, match=r"saved with --no-save-optimizer-state.*pass --finetune-from-model"):
        fit("--max-update", 6, "--disable-validation")
    fit("--max-update", 2, "--disable-validation", "--finetune-from-model", path, folder="tuned")


def test_a_split_in_parts(fit, data, tmp_path):
    parts = shutil.copytree(data, tmp_path / "parts")
    write_data(parts, valid1=40, seed=1)
    options = ["--max-update", 1, "--no-save"]
    with pytest.raises(ValueError, match=r"valid1.*--ignore-unused-valid-subsets"):
        fit(*options, data=parts)
    assert "valid: 60 tokens" in fit(*options, "--ignore-unused-valid-subsets", data=parts)[1]
    assert "valid: 100 tokens" in fit(*options, "--combine-valid-subsets", data=parts)[1]
    both = fit(*options, "--valid-subset", "valid,valid1", data=parts)[1]
    assert "valid: 60 tokens" in both and "valid1: 40 tokens" in both
    with pytest.raises(ValueError, match=r"--combine-valid-subsets is refused: .*leave --valid-subset out"):
        fit(*options, "--valid-subset", "valid,valid1", "--combine-valid-subsets", data=parts)


def test_validation_on_the_split_that_is_trained_on(fit, data, tmp_path):
    """It reads what evaluation reads, in every epoch the same. fairseq validates on the text of the epoch's folder."""
    parts, other = shutil.copytree(data, tmp_path / "parts"), shutil.copytree(data, tmp_path / "other")
    write_data(parts, train1=160, seed=1)
    write_data(other, train=80, seed=2)
    options = ["--max-epoch", 2, "--lr", 1e-9, "--valid-subset", "train", "--no-save"]
    losses = {}
    for name, folders in {"alone": data, "joined": parts, "in turn": f"{parts}:{other}"}.items():
        _, text = fit(*options, data=folders)
        losses[name] = re.findall(r"valid on 'train' subset \| loss ([\d.]+)", text)
        left_out = "'train' is read without train1, which training joins to it: evaluate each with a command of its own"
        assert (left_out in text) == (name != "alone") and ("train: 320 tokens" in text) == (name != "alone")
    assert len(set(losses["alone"])) == 1 and losses["alone"] == losses["joined"] == losses["in turn"]


def test_streams_from_tokens(fit):
    options = ["--max-update", 1, "--no-save"]
    sizes = ["--tokens-per-sample", 8, "--max-tokens", 32]
    text = fit(*options, "--max-tokens-valid", 16, sizes=sizes)[1]
    assert "train: 4 streams" in text and "valid: 1 streams" in text


@pytest.mark.parametrize("criterion", ["cross_entropy", "chunked_cross_entropy", "label_smoothed_cross_entropy"])
def test_a_last_segment_of_one_token_counts_in_the_loss_per_token(fit, criterion):
    """fairseq's criterions leave out a batch with as many tokens as streams."""
    sizes = ["--tokens-per-sample", 7, "--batch-size", 4]  # of 15 tokens a stream of the validation
    _, text = fit("--max-update", 1, "--no-save", "--sentence-avg", "--criterion", criterion, sizes=sizes)
    [values] = re.findall(r"valid on .* loss ([\d.]+) .* nll_loss ([\d.]+) .* ppl ([\d.]+)", text)
    loss, per_token, perplexity = map(float, values)
    assert perplexity == pytest.approx(2**per_token, rel=1e-3)
    assert per_token == pytest.approx(loss * 12 / 60, abs=1e-3)  # of 3 segments of 4 streams, and of 60 tokens


def test_the_seed_of_validation_changes_nothing_else(fit, tmp_path):
    for seed in (1, 2):
        options = [
            "--max-update",
            6,
            "--validate-interval-updates",
            2,
            "--dropout",
            0.5,
            "--fixed-validation-seed",
            seed,
        ]
        fit(*options, folder=str(seed))
    first, second = (loaded(tmp_path / folder / "checkpoint_last.pt")["model"] for folder in "12")
    assert all(first[name].equal(second[name]) for name in first)


def test_how_text_was_cut_is_noted_for_the_hub(fit, tmp_path):
    fit(
        "--max-update",
        1,
        "--disable-validation",
        "--bpe",
        "subword_nmt",
        "--bpe-codes",
        "codes",
        "--tokenizer",
        "space",
    )
    cfg = loaded(tmp_path / "run" / "checkpoint_last.pt")["cfg"]
    assert cfg["bpe"]["_name"] == "subword_nmt" and cfg["tokenizer"]["_name"] == "space"


def test_the_segment_length_of_a_preset(fit):
    assert "5 segments each" in fit("--max-update", 1, "--preset-tokens-per-sample", 8, sizes=["--batch-size", 4])[1]


def test_fairseqs_own_trainer_is_refused(fit, tmp_path, monkeypatch):
    """Its checkpoints would lack the memory, and the run could not be resumed."""

    class Unwrapped(Trainer):
        __wrapped__ = Trainer  # as if `fairseq_cli.train` chose the trainer already

    monkeypatch.setattr(train, "Trainer", Unwrapped)
    with pytest.raises(RuntimeError, match=r"fairseq's own Trainer saves no memory.*SegmentTrainer"):
        fit("--max-update", 4)
    assert not list(tmp_path.rglob("*.pt"))
