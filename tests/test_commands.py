"""fairseq's own commands, from binarized data to figures."""

import contextlib
import gc
import io
import logging
import re
from multiprocessing import active_children
from unittest import mock

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq_cli import eval_lm, interactive, train, validate
from torch.utils._pytree import tree_leaves

from .helpers import TASK, run_command, write_data

MODEL = [
    "--decoder-layers",
    2,
    "--decoder-embed-dim",
    32,
    "--decoder-attention-heads",
    2,
    "--decoder-ffn-embed-dim",
    64,
]
TRAIN = [
    *MODEL,
    *["--optimizer", "adam", "--lr", 5e-3, "--lr-scheduler", "fixed", "--tokens-per-sample", 16, "--mem-len", 16],
    *[
        "--batch-size",
        4,
        "--no-epoch-checkpoints",
        "--log-format",
        "simple",
        "--log-interval",
        10,
        "--dropout",
        0.1,
        "--num-workers",
        0,
    ],
]
VALID, TEST = 1500, 1201


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), train=6000, valid=VALID, test=TEST)


@pytest.fixture(scope="module")
def checkpoints(data, tmp_path_factory):
    """A model of each kind after 60 updates."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for arch in ("lamemo_lm", "transformer_xl_lm", "relative_transformer_lm"):
        run_command(
            train.cli_main,
            data,
            *TASK,
            "--arch",
            arch,
            *TRAIN,
            "--max-update",
            60,
            "--roll",
            "--save-dir",
            folder / arch,
        )
    return folder


def test_workers_that_load_an_epoch_end_with_it(data, tmp_path, monkeypatch):
    """Though saving within an epoch leaves everything in circles of references, by fairseq's own doing."""
    alive, saved = [], checkpoint_utils.save_checkpoint
    monkeypatch.setattr(
        checkpoint_utils, "save_checkpoint", lambda *args: (alive.append(len(active_children())), saved(*args))
    )
    options = ["--arch", "lamemo_lm", *TRAIN, "--batch-size", 40, "--num-workers", 2, "--disable-validation"]
    few = ["--data-buffer-size", 2]  # or all batches of an epoch may be there, and its workers gone, before it is saved
    gc.collect()
    gc.disable()
    try:
        before = len(active_children())
        run_command(
            train.cli_main,
            *[data, *TASK, *options, *few, "--max-update", 48, "--save-interval-updates", 6, "--save-dir", tmp_path],
        )
    finally:
        gc.enable()
    assert len(alive) > 8 and 0 < max(alive) - before <= 4, alive  # those of an epoch, and of the one before


def printed(main, *arguments):
    """What a command prints and logs."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root = logging.getLogger()
    for name in list(logging.root.manager.loggerDict):  # fairseq-train silences the loggers it finds
        logging.getLogger(name).disabled = False
    root.setLevel(logging.INFO)
    root.addHandler(handler)
    try:
        with contextlib.redirect_stdout(stream):
            run_command(main, *arguments)
    finally:
        root.removeHandler(handler)
    return stream.getvalue()


def evaluate(data, path, *options):
    """Tokens and base-2 loss that fairseq-eval-lm reports."""
    text = printed(eval_lm.cli_main, data, *TASK, "--path", path, "--gen-subset", "test", "--num-workers", 0, *options)
    tokens = re.search(r"Evaluated ([\d,]+) tokens", text).group(1)
    return int(tokens.replace(",", "")), float(re.search(r"Loss \(base 2\): ([\d.]+)", text).group(1))


def validated(data, path, *options):
    """Tokens and base-2 loss that fairseq-validate reports."""
    text = printed(
        validate.cli_main, data, *TASK, "--path", path, "--valid-subset", "test", "--log-format", "simple",
        "--num-workers", 0, *options,
    )  # fmt: skip
    loss, tokens = re.findall(r"loss ([\d.]+) .*wpb ([\d.]+)", text)[-1]
    return int(tokens), float(loss)


@pytest.mark.parametrize("arch", ["lamemo_lm", "transformer_xl_lm", "relative_transformer_lm"])
def test_every_token_is_scored_once_and_commands_agree(arch, data, checkpoints):
    path = checkpoints / arch / "checkpoint_last.pt"
    for batch in (["--batch-size", 1], ["--batch-size", 7]):
        tokens, loss = evaluate(data, path, *batch)
        assert tokens == TEST
        assert loss < 5.0  # log2 of 36 equally likely words is 5.17
        assert validated(data, path, *batch) == (TEST, pytest.approx(loss, abs=1e-3))
    assert evaluate(data, path)[0] == TEST


def test_the_training_split_is_evaluated_as_others_are(data, checkpoints, tmp_path):
    """As it lies, though training rotates its streams, and in streams that are long enough for a memory."""
    path = checkpoints / "lamemo_lm" / "checkpoint_last.pt"
    _, loss = evaluate(data, path, "--gen-subset", "train", "--batch-size", 3)
    assert validated(data, path, "--valid-subset", "train", "--batch-size", 3) == (6000, pytest.approx(loss, abs=1e-3))
    text = printed(eval_lm.cli_main, data, *TASK, "--path", path, "--gen-subset", "train", "--num-workers", 0)
    assert re.search(r"train: (\d+) streams", text).group(1) == "5"  # of 75 segments
    command = [data, *TASK, "--arch", "lamemo_lm", *TRAIN, "--roll", "--valid-subset", "valid,train", "--batch-size", 3]
    text = printed(train.cli_main, *command, "--max-update", 15, "--save-dir", tmp_path)
    (told,) = re.findall(r"valid on 'train' subset \| loss ([\d.]+)", text)
    _, loss = evaluate(data, tmp_path / "checkpoint_last.pt", "--gen-subset", "train", "--batch-size", 3)
    assert float(told) == pytest.approx(loss, abs=1e-3)


@pytest.mark.parametrize("rolls", [[], ["--roll"]], ids=["as it lies", "rolled"])
def test_validating_on_the_training_split_leaves_no_trace_in_training(rolls, data, tmp_path):
    """Within epochs and at their ends; workers end with the epoch."""
    states, workers, saved = [], [], checkpoint_utils.save_checkpoint
    others = set(active_children())  # of former tests
    command = [data, *TASK, "--arch", "lamemo_lm", *TRAIN, *rolls, "--num-workers", 2, "--max-update", 12]
    command += ["--batch-size", 40, "--validate-interval-updates", 3, "--save-interval-updates", 3]  # epochs of 10

    def save(*args):
        workers.append(len(set(active_children()) - others))
        return saved(*args)

    for subsets in ("valid", "valid,train"):
        folder = tmp_path / subsets
        with mock.patch.object(checkpoint_utils, "save_checkpoint", save):
            run_command(train.cli_main, *command, "--valid-subset", subsets, "--save-dir", folder)
        last = torch.load(folder / "checkpoint_last.pt", weights_only=False)
        names = sorted(path.name for path in folder.iterdir())
        states.append((names, last["extra_state"]["train_iterator"], last["model"]))
    for one, other in zip(*map(tree_leaves, states), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert states[0][1]["epoch"] == 2 and max(workers) <= 8


def test_optimizers_without_a_dataclass_leave_checkpoints_that_can_be_loaded(data, tmp_path):
    options = ["--arch", "lamemo_lm", *TRAIN, "--optimizer", "sgd", "--momentum", 0.9, "--save-dir", tmp_path]
    for updates in (3, 5):
        run_command(train.cli_main, data, *TASK, *options, "--max-update", updates)
    text = printed(train.cli_main, data, *TASK, *options, "--max-update", 5)
    assert "nothing left to do: the checkpoint has 5 updates" in text
    assert evaluate(data, tmp_path / "checkpoint_last.pt")[0] == TEST


def test_memory_helps_where_segments_are_short(data, checkpoints):
    path = checkpoints / "lamemo_lm" / "checkpoint_last.pt"
    usual = evaluate(data, path, "--batch-size", 1)
    shorter = evaluate(data, path, "--batch-size", 1, "--tokens-per-sample", 5)
    assert usual[0] == shorter[0] == TEST and usual[1] != shorter[1]


def test_generation_continues_prompts_longer_than_a_segment(data, checkpoints, tmp_path, capsys):
    prompt = " ".join(f"w{i}" for i in range(20))
    (tmp_path / "prompts").write_text(f"{prompt}\nw3 w4\n")
    options = [
        "--path",
        checkpoints / "lamemo_lm" / "checkpoint_last.pt",
        "--beam",
        2,
        "--max-len-a",
        1,
        "--max-len-b",
        8,
    ]
    run_command(
        interactive.cli_main,
        data,
        *TASK,
        *options,
        "--input",
        tmp_path / "prompts",
        "--buffer-size",
        2,
        "--batch-size",
        2,
    )
    continued = re.findall(r"^H-(\d)\t\S+\t(.*)$", capsys.readouterr().out, flags=re.MULTILINE)
    assert {row for row, _ in continued} == {"0", "1"}
    for row, text in continued:
        start = prompt if row == "0" else "w3 w4"
        assert text.startswith(start) and len(text) > len(start)


def last_checkpoint(folder):
    return torch.load(folder / "checkpoint_last.pt", weights_only=False)


@pytest.mark.parametrize("arch", ["lamemo_lm", "transformer_xl_lm"])
def test_neither_validation_nor_stops_over_several_epochs_change_a_weight(arch, tmp_path):
    """Sixteen segments an epoch: one run goes through, the other stops inside an epoch and at the end of one."""
    small = write_data(tmp_path / "data", train=1000, valid=200)

    def run(folder, updates, *options):
        run_command(
            train.cli_main, small, *TASK, "--arch", arch, *TRAIN, "--roll", *options,
            *["--max-update", updates, "--save-dir", folder],
        )  # fmt: skip

    run(tmp_path / "whole", 40, "--disable-validation")
    for updates in (21, 32, 40):
        run(tmp_path / "parts", updates, "--validate-interval-updates", 3, "--save-interval-updates", 5)
    whole, parts = last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "parts")
    assert whole["extra_state"]["train_iterator"]["epoch"] == 3
    for name, weight in whole["model"].items():
        assert torch.equal(weight, parts["model"][name]), name


@pytest.mark.parametrize(
    ("arch", "options"),
    [("lamemo_lm", []), ("transformer_xl_lm", []), ("transformer_xl_lm", ["--position-encoding", "shaw"])],
    ids=["lamemo", "transformer-xl", "shaw"],
)
def test_memory_and_segments_of_another_length_at_test_time(arch, options, data, tmp_path):
    run_command(
        train.cli_main, data, *TASK, "--arch", arch, *TRAIN, *options, "--max-update", 20, "--save-dir", tmp_path,
        "--disable-validation",
    )  # fmt: skip
    path = tmp_path / "checkpoint_last.pt"
    usual = evaluate(data, path, "--batch-size", 2)
    for mem_len, length in ((40, 5), (3, 32), (100, 16)):
        longer = ["--batch-size", 2, "--model-overrides", f"{{'mem_len': {mem_len}}}", "--tokens-per-sample", length]
        tokens, loss = evaluate(data, path, *longer)
        assert tokens == TEST and abs(loss - usual[1]) < 0.5 and loss != usual[1]
        assert validated(data, path, *longer) == (TEST, pytest.approx(loss, abs=1e-3))


@pytest.mark.parametrize("criterion", ["cross_entropy", "adaptive_loss"])
def test_training_and_scoring_with_an_adaptive_softmax(criterion, data, tmp_path):
    adaptive = ["--adaptive-softmax-cutoff", "10,20", "--adaptive-softmax-factor", 2, "--adaptive-input"]
    run_command(
        train.cli_main, data, *TASK, "--arch", "lamemo_lm", *TRAIN, *adaptive, "--criterion", criterion,
        "--ddp-backend", "legacy_ddp", "--max-update", 40, "--save-dir", tmp_path, "--disable-validation",
    )  # fmt: skip
    path = tmp_path / "checkpoint_last.pt"
    tokens, loss = evaluate(data, path, "--batch-size", 3)
    assert tokens == TEST and loss < 5.0
    assert evaluate(data, path, "--batch-size", 3, "--softmax-batch", 7) == (TEST, pytest.approx(loss, abs=1e-3))
    assert validated(data, path, "--batch-size", 3) == (TEST, pytest.approx(loss, abs=1e-3))


def test_a_moving_average_of_the_weights_is_kept_and_resumed(data, tmp_path):
    arguments = [data, *TASK, "--arch", "lamemo_lm", *TRAIN, "--disable-validation", "--store-ema", "--ema-decay", 0.5]
    for updates in (3, 6):
        run_command(train.cli_main, *arguments, "--max-update", updates, "--save-dir", tmp_path)
    saved = last_checkpoint(tmp_path)
    name = "decoder.layers.0.feed_forward.fc1.weight"
    assert not torch.equal(saved["extra_state"]["ema"][name], saved["model"][name])


def test_training_with_the_chunked_criterion(tmp_path):
    """The same training as with fairseq's cross_entropy, for both softmaxes, through fairseq-train."""
    data = write_data(tmp_path / "data", words=40, train=600, valid=100)
    for name, options in (("full", []), ("adaptive", ["--adaptive-softmax-cutoff", "10,20"])):
        weights = []
        for criterion in ("cross_entropy", "chunked_cross_entropy"):
            folder = tmp_path / f"{name}-{criterion}"
            arguments = [data, *TASK, "--arch", "lamemo_lm", *options, "--criterion", criterion, "--batch-size", 4]
            arguments += [
                "--tokens-per-sample",
                "8",
                "--mem-len",
                "8",
                "--decoder-layers",
                "2",
                "--decoder-embed-dim",
                "8",
            ]
            arguments += [
                "--decoder-attention-heads",
                "2",
                "--decoder-ffn-embed-dim",
                "8",
                "--dropout",
                "0",
                "--max-update",
                "5",
            ]
            arguments += [
                "--optimizer",
                "adam",
                "--lr",
                "0.01",
                "--no-epoch-checkpoints",
                "--num-workers",
                "0",
                "--log-format",
                "none",
            ]
            run_command(train.cli_main, *arguments, "--save-dir", folder)
            weights.append(torch.load(folder / "checkpoint_last.pt", weights_only=False)["model"])
        for key, value in weights[0].items():
            torch.testing.assert_close(weights[1][key], value, rtol=1e-4, atol=1e-5, msg=key)
