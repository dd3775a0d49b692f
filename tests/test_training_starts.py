"""A training run begins, is refused in one line before anything is computed, or has nothing left to do."""

import shutil
import time
from types import SimpleNamespace

import fairseq.trainer
import fairseq_cli.train
import pytest
import torch
from fairseq import checkpoint_utils

from lamemo_fairseq.host import training
from lamemo_fairseq.host.training_state import check_named_checkpoint
from lamemo_fairseq.tasks.segment_language_modeling import SegmentLanguageModelingTask

from .helpers import TASK, run_command, write_data

OPTIONS = [
    "--arch", "transformer_xl_lm", "--decoder-layers", 1, "--decoder-embed-dim", 8, "--decoder-attention-heads", 1,
    "--decoder-ffn-embed-dim", 8, "--tokens-per-sample", 8, "--mem-len", 8, "--batch-size", 4, "--optimizer", "adam",
    "--lr", 5e-3, "--num-workers", 0, "--log-format", "none",
]  # fmt: skip
SEGMENTS = 6  # an epoch


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), train=4 * SEGMENTS * 8 - 6, valid=60)


def train(data, folder, *options):
    for name in ("best", "num_runs"):  # fairseq keeps them as attributes of functions
        for function in (checkpoint_utils.save_checkpoint, fairseq_cli.train.should_stop_early):
            vars(function).pop(name, None)
    run_command(fairseq_cli.train.cli_main, data, *TASK, *OPTIONS, "--save-dir", folder, *options)


def test_a_checkpoint_that_is_not_there_is_refused(data, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--restore-file typo\.pt: there is no such file"):
        train(data, tmp_path, "--restore-file", "typo.pt", "--max-update", 2)
    assert list(tmp_path.iterdir()) == []


def named(folder, **options):
    defaults = {"restore_file": "checkpoint_last.pt", "continue_once": None, "finetune_from_model": None}
    settings = {**defaults, "no_save": False, **options}
    check_named_checkpoint(SimpleNamespace(save_dir=str(folder), **settings), suffix="")


@pytest.mark.parametrize("option", ["restore_file", "continue_once", "finetune_from_model"])
def test_what_an_option_names_has_to_be_a_file(option, tmp_path, caplog):
    name = f"--{option.replace('_', '-')}"
    for path in (tmp_path / "typo.pt", tmp_path):  # fairseq trains from the start with a folder
        with pytest.raises(FileNotFoundError, match=f"{name} {path}: there is no such file"):
            named(tmp_path, **{option: str(path)})
    (tmp_path / "there.pt").touch()
    with pytest.raises(FileNotFoundError, match=f"no such file: did you mean {tmp_path / 'there.pt'}"):
        named(tmp_path, **{option: str(tmp_path / "their.pt")})
    named(tmp_path, **{option: str(tmp_path / "there.pt")})
    assert caplog.text == ""


def test_a_file_in_the_save_folder_is_proposed(tmp_path):
    (tmp_path / "checkpoint_1_5.pt").touch()
    with pytest.raises(FileNotFoundError, match=f"no such file, pass {tmp_path / 'checkpoint_1_5.pt'}"):
        named(tmp_path, restore_file="checkpoint_1_5.pt")


def test_a_run_that_has_begun_goes_on_whatever_it_began_with(tmp_path, caplog):
    (tmp_path / "checkpoint_last.pt").touch()
    named(tmp_path)
    named(tmp_path, finetune_from_model="gone.pt")
    named(tmp_path, continue_once="gone.pt")
    named(tmp_path, restore_file=str(tmp_path / "checkpoint_last.pt"))
    assert caplog.text == ""
    (tmp_path / "other.pt").touch()
    named(tmp_path, restore_file=str(tmp_path / "other.pt"))
    assert "other.pt is taken, although there is a" in caplog.text


def test_a_run_that_begins_among_checkpoints_tells_what_it_replaces(tmp_path, caplog):
    """As with --no-last-checkpoints, or after checkpoint_last.pt was moved: the best one would be gone in silence."""
    for name in ("crash.pt", "checkpoint_best_a.pt"):  # of no run, of another suffix
        (tmp_path / name).touch()
    named(tmp_path)
    assert caplog.text == ""
    for name in ("checkpoint2.pt", "checkpoint_1_5.pt", "checkpoint_best.pt"):
        (tmp_path / name).touch()
    for options in ({"no_save": True}, {"continue_once": str(tmp_path / "checkpoint2.pt")}):
        named(tmp_path, **options)
    assert caplog.text == ""
    named(tmp_path)
    told = f"{tmp_path} holds checkpoint_best.pt and 2 more, but no checkpoint_last.pt to go on from"
    assert told in caplog.text and "--restore-file" in caplog.text


def test_a_run_that_saves_nothing_for_long_is_told(data, tmp_path, caplog):
    options = ["--save-interval-updates", 1, "--max-update", 1]
    train(data, tmp_path, *options, "--validate-after-updates", 1)
    assert "--validate-after-updates: before it, --save-interval-updates saves nothing either" in caplog.text


def test_a_run_does_not_go_on_without_the_state_of_its_optimizer(data, tmp_path):
    train(data, tmp_path, "--no-save-optimizer-state", "--max-update", 4)
    with pytest.raises(ValueError, match=r"saved with --no-save-optimizer-state.*--finetune-from-model"):
        train(data, tmp_path, "--max-update", 6)
    train(data, tmp_path, "--max-update", 6, "--reset-optimizer", "--reset-dataloader")
    saved = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)
    assert saved["optimizer_history"][-1]["num_updates"] == 6


def test_a_metric_that_no_validation_has_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match=r"--best-checkpoint-metric blue is not measured.* loss, .*ppl"):
        train(data, tmp_path, "--best-checkpoint-metric", "blue", "--max-update", 2)
    assert not list(tmp_path.glob("*.pt"))


def ended(monkeypatch, num_runs=0, updates=3, hours=1.5, **options):
    settings = {"max_update": 0, "stop_time_hours": 0, "patience": -1, **options}
    command = SimpleNamespace(should_stop_early=SimpleNamespace(num_runs=num_runs))
    monkeypatch.setattr(training, "names_of", lambda name: [command])
    cfg = SimpleNamespace(optimization=SimpleNamespace(**settings), checkpoint=SimpleNamespace(**settings))
    trainer = SimpleNamespace(get_num_updates=lambda: updates, _previous_training_time=hours * 3600)
    return training._ended(cfg, trainer)


def test_a_run_that_has_ended_does_nothing_when_started_again(monkeypatch):
    assert ended(monkeypatch) is None
    assert "3 updates" in ended(monkeypatch, max_update=3)
    assert ended(monkeypatch, max_update=4) is None
    assert "2 validations were no better" in ended(monkeypatch, num_runs=2, patience=2)
    assert ended(monkeypatch, num_runs=2, patience=3) is None
    assert ended(monkeypatch, num_runs=2) is None
    assert "1.50 hours" in ended(monkeypatch, stop_time_hours=1)
    assert ended(monkeypatch, stop_time_hours=2) is None


def test_a_run_that_lost_patience_adds_no_update(data, tmp_path):
    options = ["--patience", 1, "--validate-interval-updates", 2, "--best-checkpoint-metric", "wpb", "--max-update", 30]
    train(data, tmp_path, *options)
    stopped = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)["optimizer_history"][-1]["num_updates"]
    train(data, tmp_path, *options)
    again = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)["optimizer_history"][-1]["num_updates"]
    assert again == stopped < 30


def test_hours_of_the_model_that_is_finetuned_do_not_count(data, tmp_path):
    train(data, tmp_path / "one", "--max-update", 2, "--disable-validation")
    saved = torch.load(tmp_path / "one" / "checkpoint_last.pt", weights_only=False)
    saved["extra_state"]["previous_training_time"] = 7200.0
    torch.save(saved, tmp_path / "trained.pt")
    options = ["--stop-time-hours", 1, "--max-update", 3, "--disable-validation"]
    train(data, tmp_path / "two", "--finetune-from-model", tmp_path / "trained.pt", *options)
    tuned = torch.load(tmp_path / "two" / "checkpoint_last.pt", weights_only=False)
    assert tuned["optimizer_history"][-1]["num_updates"] == 3


def test_nothing_is_written_of_a_crash_with_no_save(data, tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise ArithmeticError("made to fail")

    monkeypatch.setattr(SegmentLanguageModelingTask, "train_step", fail)
    for options, written in (([], ["crash.pt"]), (["--no-save"], [])):
        caplog.clear()
        with pytest.raises(ArithmeticError), caplog.at_level("INFO", "lamemo_fairseq.host.trainer"):
            train(data, tmp_path / str(len(written)), "--max-update", 2, "--disable-validation", *options)
        told = [message for message in caplog.messages if "crash.pt" in message and "checksum" not in message]
        crashed = tmp_path / str(len(written)) / "crash.pt"
        assert told == (
            [f"Saving checkpoint to {crashed}", f"Finished saving checkpoint to {crashed}"]
            if written
            else [f"{crashed} is not written: --no-save"]
        )
        assert [path.name for path in (tmp_path / str(len(written))).glob("*.pt")] == written
    saved = torch.load(tmp_path / "1" / "crash.pt", weights_only=False)
    assert saved["cfg"]["optimization"]["max_update"] == 2  # as in every checkpoint


def test_a_checkpoint_due_at_the_end_of_an_epoch_is_kept(data, tmp_path):
    every = ["--save-interval-updates", 3, "--no-epoch-checkpoints", "--max-update", 13, "--disable-validation"]
    train(data, tmp_path / "all", *every)
    names = ["checkpoint_1_3.pt", "checkpoint_1_6.pt", "checkpoint_2_12.pt", "checkpoint_2_9.pt", "checkpoint_last.pt"]
    assert sorted(path.name for path in (tmp_path / "all").glob("*.pt")) == names
    saved = torch.load(tmp_path / "all" / "checkpoint_2_12.pt", weights_only=False)
    assert saved["optimizer_history"][-1]["num_updates"] == 12
    train(data, tmp_path / "two", *every, "--keep-interval-updates", 2, "--max-update", 12)
    assert sorted(path.name for path in (tmp_path / "two").glob("checkpoint_?_*.pt")) == names[2:4]


@pytest.mark.parametrize(
    ("anew", "epoch"), [("--reset-optimizer", "checkpoint2.pt"), ("--restore-file", "checkpoint1.pt")]
)
def test_checkpoints_of_a_run_before_do_not_count_among_those_to_keep(anew, epoch, data, tmp_path, caplog):
    """A run that begins anew counts from lower numbers; of all, fairseq keeps the highest."""
    options = ["--disable-validation", "--save-interval-updates"]
    for update in (7, 12, 21):  # inside an epoch, and at the end of one
        train(data, tmp_path, *options, 5, "--max-update", update, "--keep-interval-updates", 9)
    assert "yet to reach" not in caplog.text
    former = {path.name: path.read_bytes() for path in tmp_path.glob("checkpoint*[0-9].pt")}
    named = tmp_path / "checkpoint_1_5.pt"
    keep = ["--keep-interval-updates", 1, "--keep-last-epochs", 1, "--reset-dataloader", anew]
    train(data, tmp_path, *options, 3, "--max-update", 14, *keep, *([named] if anew == "--restore-file" else []))
    assert "yet to reach: this run replaces those of the same names, and no --keep-... option" in caplog.text
    present = {path.name: path.read_bytes() for path in tmp_path.glob("checkpoint*[0-9].pt")}
    written = {name for name, contents in present.items() if contents != former.get(name)}
    assert written == {epoch, "checkpoint_2_12.pt"}
    assert {named.name, "checkpoint_3_15.pt", "checkpoint_4_20.pt", "checkpoint3.pt"} <= present.keys() - written


@pytest.mark.parametrize("anew", ["--reset-optimizer", "--reset-meters", "--valid-subset"])
def test_the_best_checkpoints_of_a_run_before_stay(anew, data, tmp_path):
    """Values of other validations are not compared, so that neither run's best checkpoints stand for the other's."""
    options = ["--validate-interval-updates", 2, "--save-interval-updates", 2, "--keep-best-checkpoints", 1]
    train(data, tmp_path, *options, "--max-update", 4)
    [former] = tmp_path.glob("checkpoint.best_*")
    contents = former.read_bytes()
    if anew == "--valid-subset":
        for name in ("valid.idx", "valid.bin"):
            shutil.copy(data / name, data / name.replace("valid", "other"))
    train(data, tmp_path, *options, "--max-update", 8, anew, *(["other"] if anew == "--valid-subset" else []))
    assert former.read_bytes() == contents and len(list(tmp_path.glob("checkpoint.best_*"))) == 2


def test_on_a_cpu_no_gpu_is_asked_for(data, tmp_path, monkeypatch):
    """On a machine that has one. A tensor on it would be of no use to the parameters, as one on meta is here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "meta")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *args: self)  # PyTorch for CUDA needs a driver
    for name in ("get_rng_state", "set_rng_state", "set_device", "manual_seed", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    alone = [option for option in TASK if option not in ("--distributed-world-size", "1")]
    run_command(
        fairseq_cli.train.cli_main,
        data,
        *alone,
        *OPTIONS,
        "--save-dir",
        tmp_path,
        "--max-update",
        2,
        "--clip-norm",
        0.1,
    )
    assert torch.cuda.is_available() and torch.cuda.device_count() == 2
    assert (tmp_path / "checkpoint_last.pt").exists()


def test_options_that_begin_the_meters_anew_keep_the_weights_behind_rounded_ones(data, tmp_path):
    options = ["--bf16", "--disable-validation", "--max-update", 8, "--save-interval-updates", 4]
    train(data, tmp_path / "whole", *options)
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "whole" / "checkpoint_1_4.pt", tmp_path / "resumed" / "checkpoint_last.pt")
    train(data, tmp_path / "resumed", *options, "--reset-meters")
    one, other = (
        torch.load(tmp_path / name / "checkpoint_last.pt", weights_only=False)["extra_state"]
        for name in ("whole", "resumed")
    )
    kept = [state["SegmentLanguageModelingTask"]["masters"] for state in (one, other)]
    assert torch.equal(*kept)


@pytest.mark.parametrize("hours", [-50, 50])
def test_hours_of_training_do_not_follow_a_clock_that_is_set(hours, data, tmp_path, monkeypatch):
    """A run of three hours went on for days, or ended with the first update."""
    real, step = time.time, fairseq.trainer.Trainer.train_step
    monkeypatch.setattr(time, "time", lambda: real() + jumped[0])
    jumped = [0.0]

    def jumping(self, *args, **kwargs):
        jumped[0] = 3600.0 * hours
        return step(self, *args, **kwargs)

    monkeypatch.setattr("fairseq.trainer.Trainer.train_step", jumping)
    train(data, tmp_path, "--max-update", 3, "--stop-time-hours", 3)
    saved = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)
    assert saved["optimizer_history"][-1]["num_updates"] == 3
    assert 0 <= saved["extra_state"]["previous_training_time"] < 3600
