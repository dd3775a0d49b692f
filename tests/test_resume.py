"""A run killed at any moment and started again computes what a run that was never stopped computes, to the last bit."""

import os
import random
import re
import shutil

import pytest
import torch

from . import faults
from .helpers import TASK, record_documents, write_data
from .processes import assert_same_run, computed, output_of, train_in_processes, weights

MODEL = [
    "--decoder-layers", 2, "--decoder-embed-dim", 16, "--decoder-attention-heads", 2, "--decoder-ffn-embed-dim", 32,
    "--tokens-per-sample", 16, "--mem-len", 24, "--dropout", 0.1,
]  # fmt: skip
TRAIN = [
    *MODEL, "--optimizer", "adam", "--lr", 5e-3, "--lr-scheduler", "inverse_sqrt", "--warmup-updates", 4,
    "--no-epoch-checkpoints", "--max-update", 24, "--save-interval-updates", 5, "--keep-interval-updates", 2,
    "--valid-subset", "valid,valid1",
]  # fmt: skip
CONTINUOUS = ["--num-basis-functions", 8, "--basis-widths", "0.1,0.3", "--memory-samples", 9]
SEGATRON = ["--position-encoding", "segatron", "--sentence-ends", "w1 w9 w20"]
KILLS = int(os.environ.get("LAMEMO_KILLS", "6"))
SEGMENTS = 11  # an epoch, with four streams; the last one is shorter
TOKENS = 4 * (SEGMENTS * 16 - 3) - 1


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_data(tmp_path_factory.mktemp("data"), train=TOKENS, valid=150, valid1=90)
    return record_documents(folder, "train", "valid", "valid1")


def arguments(data, *options, arch="lamemo_lm", streams=4):
    return [data, *TASK, "--arch", arch, *TRAIN, "--batch-size", streams, *options]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Runs that nothing stopped, by their options."""
    done = {}

    def run(*options, ranks=1, **kwargs):
        key = (*map(str, options), ranks, *kwargs.items())
        if key not in done:
            done[key] = tmp_path_factory.mktemp("whole")
            assert train_in_processes(arguments(data, *options, **kwargs), done[key], ranks) == [0] * ranks
        return done[key]

    return run


FAULTS = {
    "inside the first update": faults.killed_inside_update(1),
    "before the first save": faults.killed_after_update(4),
    "mid-epoch": faults.killed_after_update(7),
    "inside an update": faults.killed_inside_update(8),
    "at the epoch's edge": faults.killed_after_update(SEGMENTS),
    "after the epoch's edge": faults.killed_inside_update(SEGMENTS + 1),
    "during validation": faults.killed_in_validation(9),
    "right after a save": faults.killed_after_saving(2),
    "right after the save at the epoch's edge": faults.killed_after_saving(3),
    "right after the last save": faults.killed_after_saving(7),
    "while writing the first checkpoint": faults.killed_while_writing(1),
    "while writing a later checkpoint": faults.killed_while_writing(3),
    "while copying a checkpoint": faults.killed_while_copying(2),
    "while copying a later checkpoint": faults.killed_while_copying(5),
}


@pytest.mark.parametrize("name", FAULTS)
def test_killed(name, data, whole, tmp_path):
    command = arguments(data, "--roll")
    assert train_in_processes(command, tmp_path, fault=FAULTS[name]) == [-9]
    assert train_in_processes(command, tmp_path) == [0]
    assert_same_run(whole("--roll"), tmp_path)


def test_killed_again_and_again(data, whole, tmp_path):
    """At any moment, until one of the runs comes to the end."""
    long = ("--roll", "--max-update", 120)
    command = arguments(data, *long, "--save-interval-updates", 2, "--validate-interval-updates", 3)
    moments = random.Random(1)
    exits, reached = [], set()
    for _ in range(KILLS):
        exits += train_in_processes(command, tmp_path, fault=faults.killed_after_seconds(moments.uniform(1, 3)))
        reached.add(max((update for update, _ in computed(tmp_path)), default=-1))
    print(f"{exits.count(-9)} kills, in updates {sorted(reached)}")
    assert train_in_processes(command, tmp_path) == [0] and set(exits) <= {-9, 0}
    assert_same_run(whole(*long), tmp_path)


@pytest.mark.parametrize(
    ("options", "arch", "ranks", "streams"),
    [
        ([], "transformer_xl_lm", 1, 4),
        (["--roll", "--position-encoding", "shaw"], "transformer_xl_lm", 1, 4),
        ([], "relative_transformer_lm", 1, 4),
        (["--mem-len", 10, "--compressed-len", 6], "compressive_transformer_lm", 1, 4),
        (["--roll", *SEGATRON], "ernie_doc_lm", 1, 4),
        (["--store-len", 30, "--retrieved-rows", 5], "memorizing_transformer_lm", 1, 4),
        (["--roll", "--update-freq", 3], "lamemo_lm", 1, 4),
        (["--roll", "--store-ema", "--ema-decay", 0.7], "lamemo_lm", 1, 4),
        (["--checkpoint-activations"], "lamemo_lm", 1, 4),
        (["--roll", "--bptt-segments", 2], "recurrent_memory_transformer_lm", 1, 4),
        (
            ["--roll", "--bptt-segments", 2, "--memory-update-rule", "delta", "--mem-len", 0],
            "infini_attention_lm",
            1,
            4,
        ),
        (["--roll", "--mem-len", 4], "associative_recurrent_memory_transformer_lm", 1, 4),
        (["--roll", "--recurrent-states", 5, "--state-gate", "lstm"], "block_recurrent_transformer_lm", 1, 4),
        ([*CONTINUOUS, "--checkpoint-activations"], "infinity_former_lm", 1, 4),
        (["--update-freq", 2, "--documents", "recorded", "--roll"], "transformer_xl_lm", 2, 2),
        (["--roll", "--store-ema", "--ema-decay", 0.7, "--lookahead-every", 3], "lamemo_lm", 3, 1),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value),
)
def test_killed_with_other_options(options, arch, ranks, streams, data, whole, tmp_path):
    """Killed in the second epoch; with LaMemo's memory in the first one too, two saves before."""
    command = arguments(data, *options, arch=arch, streams=streams)
    for fault in (faults.killed_after_update(8), faults.killed_inside_update(18))[arch != "lamemo_lm" :]:
        assert -9 in train_in_processes(command, tmp_path, ranks, fault)
    assert train_in_processes(command, tmp_path, ranks) == [0] * ranks
    reference = whole(*options, ranks=ranks, arch=arch, streams=streams)
    assert_same_run(reference, tmp_path)
    if "--store-ema" in options:
        averages = [
            torch.load(folder / "checkpoints" / "checkpoint_last.pt", weights_only=False)["extra_state"]["ema"]
            for folder in (reference, tmp_path)
        ]
        assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])


def test_the_loss_scale_grows_at_the_same_update(data, whole, tmp_path):
    """The last save before the kill is no multiple of the window away from a growth."""
    # Of the three ways to train in fp16, the others need a GPU.
    precision = ("--fp16", "--memory-efficient-fp16", "--fp16-init-scale", 64, "--fp16-scale-window", 7)
    command = arguments(data, *precision)
    assert train_in_processes(command, tmp_path, fault=faults.killed_after_update(11)) == [-9]
    assert train_in_processes(command, tmp_path) == [0]
    assert_same_run(whole(*precision), tmp_path)
    scales = [re.findall(r"loss_scale=(\d+)", output_of(f)) for f in (whole(*precision), tmp_path)]
    assert len(set(scales[0])) > 2 and scales[1][-3:] == scales[0][-3:]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_weights_behind_rounded_ones_are_kept(ranks, data, whole, tmp_path):
    command = arguments(data, "--bf16", streams=2)
    assert -9 in train_in_processes(command, tmp_path, ranks, fault=faults.killed_after_update(7))
    assert train_in_processes(command, tmp_path, ranks) == [0] * ranks
    assert_same_run(whole("--bf16", ranks=ranks, streams=2), tmp_path)


def test_patience_waits_as_long(data, tmp_path):
    """At a learning rate of next to nothing no validation is better than the first by the metric of tokens a batch."""
    options = ["--patience", 3, "--max-update", 60, "--validate-interval-updates", 5, "--lr", 1e-9]
    command = arguments(data, *options, "--best-checkpoint-metric", "wpb")
    assert train_in_processes(command, tmp_path / "whole") == [0]
    assert train_in_processes(command, tmp_path / "killed", fault=faults.killed_after_update(12)) == [-9]
    assert train_in_processes(command, tmp_path / "killed") == [0]
    last = [max(update for update, _ in computed(tmp_path / name)) for name in ("whole", "killed")]
    assert last[0] == last[1] < 60


def test_patience_begins_anew_in_finetuning(data, tmp_path):
    """And goes on from there after a kill."""
    options = ["--patience", 3, "--max-update", 60, "--validate-interval-updates", 5, "--lr", 1e-9]
    command = arguments(data, *options, "--best-checkpoint-metric", "wpb")
    assert train_in_processes(command, tmp_path / "trained") == [0]
    finetune = [*command, "--finetune-from-model", tmp_path / "trained" / "checkpoints" / "checkpoint_last.pt"]
    assert train_in_processes(finetune, tmp_path / "whole") == [0]
    assert train_in_processes(finetune, tmp_path / "killed", fault=faults.killed_after_update(12)) == [-9]
    assert train_in_processes(finetune, tmp_path / "killed") == [0]
    last = [max(update for update, _ in computed(tmp_path / name)) for name in ("trained", "whole", "killed")]
    assert last[0] == last[1] == last[2] < 60


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """A run of two ranks that has saved inside its first epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    command = arguments(data, "--roll", "--max-update", 5, streams=2)
    assert train_in_processes(command, folder, ranks=2) == [0, 0]
    return folder


def resumed(stopped, data, folder, *options, ranks=2, streams=2, **kwargs):
    shutil.copytree(stopped / "checkpoints", folder / "checkpoints")
    return train_in_processes(arguments(data, *options, streams=streams), folder, ranks, **kwargs)


@pytest.mark.parametrize(
    ("options", "ranks", "streams", "message"),
    [
        (["--roll"], 2, 3, "--batch-size times ranks is 6, there it was 4"),
        (["--roll"], 1, 2, "--batch-size times ranks is 2, there it was 4"),
        (["--roll", "--tokens-per-sample", 8], 1, 4, "--tokens-per-sample is 8, there it was 16"),
        (["--roll", "--mem-len", 10], 1, 4, "--mem-len is 10, there it was 24"),
        ([], 1, 4, "--roll is off, there it was on with --seed 1"),
        (["--roll", "--seed", 3], 1, 4, "there it was on with --seed 1"),
        (["--roll", "--update-freq", 2], 1, 4, "--update-freq is 2, which does not divide the 5 segments already read"),
        (["--roll", "--train-subset", "valid"], 1, 4, "the number of tokens of the split is 240, there it was 691"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value)[:20],
)
def test_another_layout_is_refused(options, ranks, streams, message, data, stopped, tmp_path):
    options = [*options, "--disable-validation"]
    assert 0 not in resumed(stopped, data, tmp_path, *options, ranks=ranks, streams=streams)
    output = output_of(tmp_path)
    assert message in output and "or pass --reset-dataloader" in output
    assert computed(tmp_path) == {}
    again = [*options, "--reset-dataloader", "--max-update", 7]
    assert train_in_processes(arguments(data, *again, streams=streams), tmp_path, ranks) == [0] * ranks


def test_another_memory_is_refused(data, stopped, tmp_path):
    """Were the architectures' weights the same, their memories would not be."""
    itself = torch.load(stopped / "checkpoints" / "checkpoint_last.pt", weights_only=False)
    saved = itself["extra_state"]["train_iterator"]
    saved["layout"]["--memory"] = "recurrent"
    (tmp_path / "checkpoints").mkdir()
    torch.save(itself, tmp_path / "checkpoints" / "checkpoint_last.pt")
    assert 0 not in train_in_processes(arguments(data, "--roll", streams=2), tmp_path, ranks=2)
    assert "--memory is lookahead, there it was recurrent" in output_of(tmp_path)


@pytest.fixture(scope="module")
def on_two_ranks(data, tmp_path_factory):
    """Four streams in float64 over two ranks, from a stop inside the first epoch; and what goes on from there."""
    folder = tmp_path_factory.mktemp("two")
    options = ["--roll", "--dropout", 0, "--disable-validation", "--max-update"]
    stop = arguments(data, *options, 5, streams=2)
    assert train_in_processes(stop, folder / "stopped", 2, dtype="float64") == [0, 0]

    def go_on(run, ranks, streams):
        exits = resumed(folder / "stopped", data, run, *options, 14, ranks=ranks, streams=streams, dtype="float64")
        assert exits == [0] * ranks
        return weights(run)

    return go_on(folder / "whole", 2, 2), go_on


@pytest.mark.parametrize(("ranks", "streams"), [(1, 4), (4, 1)])
def test_the_same_streams_go_on_over_another_number_of_ranks(ranks, streams, on_two_ranks, tmp_path):
    expected, go_on = on_two_ranks
    found = go_on(tmp_path, ranks, streams)
    assert "the checkpoint was trained with" not in output_of(tmp_path)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-10)


def test_resetting_the_dataloader_starts_from_the_first_segment_and_an_empty_memory(data, stopped, tmp_path):
    """The same as a run whose checkpoint was saved with the same weights at the edge of an epoch."""
    options = ["--roll", "--max-update", 9, "--disable-validation"]
    assert resumed(stopped, data, tmp_path / "reset", *options, "--reset-dataloader") == [0, 0]
    itself = torch.load(stopped / "checkpoints" / "checkpoint_last.pt", weights_only=False)
    itself["extra_state"]["train_iterator"] = {"version": 2, "epoch": 1, "iterations_in_epoch": 0, "shuffle": True}
    (tmp_path / "edge" / "checkpoints").mkdir(parents=True)
    torch.save(itself, tmp_path / "edge" / "checkpoints" / "checkpoint_last.pt")
    assert train_in_processes(arguments(data, *options, streams=2), tmp_path / "edge", 2) == [0, 0]
    assert_same_run(tmp_path / "reset", tmp_path / "edge")


def test_a_checkpoint_without_its_memory_is_refused(data, stopped, tmp_path):
    itself = torch.load(stopped / "checkpoints" / "checkpoint_last.pt", weights_only=False)
    del itself["extra_state"]["train_iterator"]["memory"]
    (tmp_path / "checkpoints").mkdir()
    torch.save(itself, tmp_path / "checkpoints" / "checkpoint_last.pt")
    assert 0 not in train_in_processes(arguments(data, "--roll", streams=2), tmp_path, ranks=2)
    assert "does not hold the memory that the streams had" in output_of(tmp_path)


def test_memory_in_a_checkpoint_matters(data, stopped, tmp_path):
    """Tests of exact resuming can fail: with the memory of another rank, the run takes another course."""
    options = ["--roll", "--disable-validation", "--max-update", 6]
    itself = torch.load(stopped / "checkpoints" / "checkpoint_last.pt", weights_only=False)
    memory = itself["extra_state"]["train_iterator"]["memory"]
    assert memory["embeddings"].shape == (4, 24, 16)
    memory["embeddings"] = memory["embeddings"].flip(0)
    (tmp_path / "checkpoints").mkdir()
    torch.save(itself, tmp_path / "checkpoints" / "checkpoint_last.pt")
    assert train_in_processes(arguments(data, *options, streams=2), tmp_path, ranks=2) == [0, 0]
    exact = tmp_path / "exact"
    assert resumed(stopped, data, exact, *options) == [0, 0]
    assert computed(exact) != computed(tmp_path)
