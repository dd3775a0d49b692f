"""A loss or a memory that is not a finite number stops the run, and says in which update and which streams."""

import shutil

import fairseq_cli.train
import pytest
import torch
from fairseq.trainer import Trainer
from fairseq_cli import eval_lm, validate

from lamemo_fairseq.core.memory import DivergenceError
from lamemo_fairseq.core.memory.position import SegmentPosition
from lamemo_fairseq.refusals import is_refusal
from lamemo_fairseq.tasks.faults import LossWatch

from . import disturbances
from .helpers import TASK, random_tokens, run_command, segments_of, tiny_decoder, write_data
from .processes import output_of, train_in_processes

TRAIN = [
    "--decoder-layers", 2, "--decoder-embed-dim", 16, "--decoder-attention-heads", 2, "--decoder-ffn-embed-dim", 32,
    "--tokens-per-sample", 16, "--mem-len", 24, "--optimizer", "adam", "--lr", 5e-3, "--no-epoch-checkpoints",
    "--max-update", 10, "--save-interval-updates", 5, "--batch-size", 4,
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), train=4 * 16 * 8, valid=150)


def train(data, folder, fault, *options, arch="lamemo_lm"):
    return train_in_processes([data, *TASK, "--arch", arch, *TRAIN, *options], folder, fault=fault)


@pytest.mark.parametrize("arch", ["lamemo_lm", "transformer_xl_lm"])
def test_memory_of_one_stream(arch, data, tmp_path):
    fault = disturbances.memory_spoilt(update=4, stream=2)
    assert train(data, tmp_path, fault, "--disable-validation", arch=arch) == [1]
    message = "in update 4, epoch 1: the loss of segment 3 of stream 2 of 'train' is not finite, nor is their memory"
    assert message in output_of(tmp_path)
    assert not (tmp_path / "checkpoints" / "checkpoint_last.pt").exists()


@pytest.mark.parametrize("fault", [disturbances.weights_spoilt, disturbances.gradients_thrown_away])
def test_weights(fault, data, tmp_path):
    assert train(data, tmp_path, fault(update=7), "--disable-validation") == [1]
    told = output_of(tmp_path)
    assert "NaN or infinity in update 7, epoch 1: the loss of segment 6 of streams 0, 1, 2, 3" in told
    assert (
        "gradients: {" not in told and told.count("nan") < 10 and "backward hook" not in told
    )  # fairseq prints every gradient
    saved = torch.load(tmp_path / "checkpoints" / "checkpoint_last.pt", weights_only=False)
    assert saved["optimizer_history"][-1]["num_updates"] == 5


@pytest.mark.parametrize(
    ("arch", "options", "segment"),
    [
        ("lamemo_lm", (), 2),
        ("lamemo_lm", ("--update-freq", 2), 5),  # the memory before the first of them is no longer there
        ("transformer_xl_lm", ("--position-encoding", "alibi"), 2),  # fairseq's hooks fail at modules without a tensor
        ("transformer_xl_lm", ("--position-encoding", "rotary"), 2),
        ("relative_transformer_lm", ("--position-encoding", "absolute", "--mem-len", 0), 2),
    ],
    ids=str,
)
def test_gradients(arch, options, segment, data, tmp_path):
    """The loss is finite, so that nothing but the norm of the gradients tells."""
    spoilt = disturbances.gradients_spoilt(update=3)
    assert train(data, tmp_path, spoilt, "--disable-validation", *options, arch=arch) == [1]
    message = (
        f"NaN or infinity in update 3, epoch 1: the gradients after segment {segment} are not finite, although the "
        "loss is. Go on from an earlier checkpoint, named with --restore-file, at a lower --lr"
    )
    told = output_of(tmp_path)
    assert message in told.splitlines()[-1] and "another exception occurred" not in told


@pytest.mark.parametrize("options", [[], ["--clip-norm", 0.1]])
def test_gradients_are_told_of_in_one_line(options, data, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "clip_grad_norm", lambda self, clip_norm: torch.tensor(float("nan")))
    with pytest.raises(
        DivergenceError, match="in update 1, epoch 1: the gradients after segment 0 are not finite"
    ) as it:
        run_command(fairseq_cli.train.cli_main, data, *TASK, "--arch", "lamemo_lm", *TRAIN, "--save-dir", tmp_path)
    assert is_refusal(it.value) and "\n" not in str(it.value) and it.value.__suppress_context__


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "gradients are Nan/Inf",
            "NaN or infinity in update 4, epoch 1: the gradients after segment 3 are not finite, a",
        ),
        (
            "rank   0 = nan\nrank   1 = nan",
            "NaN or infinity in update 4, epoch 1: the gradients after segment 3 are not",
        ),
        (
            "rank   0 = 0.5\nrank   1 = 0.25",
            "Fatal error: gradients are inconsistent between workers. Try B. rank 0 = 0.5 rank 1 = 0.25",
        ),
        ("made to fail", "made to fail"),
    ],
)
def test_what_fairseq_says_of_gradients(text, told):
    """Norms of several ranks are never alike if they are no numbers."""
    if text.startswith("rank"):
        line = "-" * 80
        text = f"Fatal error: gradients are inconsistent between workers. Try B.\n{line}\n{text}\n{line}"
    watch, position = LossWatch(), SegmentPosition("train", 1, 4, 16, (0, 1), 3)
    watch.note(torch.tensor(1.0), position, 4, None)
    error = FloatingPointError(text)
    explained = watch.explained(error)
    assert str(explained).startswith(told)
    assert (explained is error) == (text == told)


def test_a_loss_that_nobody_has_looked_at_explains_the_gradients():
    """fairseq's second run of an update may end before it."""
    watch, position = LossWatch(), SegmentPosition("train", 1, 4, 16, (0, 1), 3)
    watch.note(torch.tensor(float("nan")), position, 4, tiny_decoder().streams)
    told = str(watch.explained(FloatingPointError("gradients are Nan/Inf")))
    assert told.startswith(
        "NaN or infinity in update 4, epoch 1: the loss of segment 3 of streams 0, 1 of 'train' is not"
    )


def test_nothing_is_saved_after_a_loss_that_nobody_has_looked_at(data, tmp_path):
    """The last update before a save."""
    assert train(data, tmp_path, disturbances.gradients_thrown_away(update=5), "--disable-validation") == [1]
    assert "NaN or infinity in update 5" in output_of(tmp_path)
    assert not (tmp_path / "checkpoints" / "checkpoint_last.pt").exists()


def test_validation(data, tmp_path):
    assert train(data, tmp_path, disturbances.weights_spoilt_after(update=5)) == [1]
    assert "after update 5: NaN or infinity in the last layer for streams 0, 1, 2, 3 of 'valid'" in output_of(tmp_path)


@pytest.mark.parametrize("command", ["eval_lm", "validate"])
def test_evaluation(command, data, tmp_path):
    assert train(data, tmp_path, None, "--disable-validation") == [0]
    path = tmp_path / "checkpoints" / "checkpoint_last.pt"
    shutil.copy(path, tmp_path / "sound.pt")
    saved = torch.load(path, weights_only=False)
    saved["model"]["decoder.layers.0.self_attn.out_proj.weight"][3] = float("nan")
    torch.save(saved, path)
    main = {"eval_lm": eval_lm, "validate": validate}[command].cli_main
    subset = ["--gen-subset" if command == "eval_lm" else "--valid-subset", "valid"]
    options = [data, *TASK, "--batch-size", 3, "--num-workers", 0, *subset, "--path"]
    with pytest.raises(DivergenceError, match="for streams 0, 1, 2 of 'valid', segment 0: the weights have diverged"):
        run_command(main, *options, path)
    run_command(main, *options, tmp_path / "sound.pt")


def test_one_stream_in_evaluation():
    decoder = tiny_decoder()
    (first, tokens), (second, others), *_ = segments_of(decoder, random_tokens(3, 9))
    decoder(tokens, None, first)
    decoder.streams.read(second, training=False).tensors()[0][1, 0, 0] = float("inf")
    with pytest.raises(DivergenceError, match="for stream 1 of 'valid', segment 1"):
        decoder(others, None, second)
