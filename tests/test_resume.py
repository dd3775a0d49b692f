"""A run killed at any moment and started again computes what a run that was never stopped computes, to the last bit."""

import pytest
import torch

from . import processes
from .helpers import TASK, write_data
from .processes import assert_same_run, train_in_processes

MODEL = [
    "--decoder-layers", 2, "--decoder-embed-dim", 16, "--decoder-attention-heads", 2, "--decoder-ffn-embed-dim", 32,
    "--tokens-per-sample", 16, "--mem-len", 24, "--dropout", 0.1,
]  # fmt: skip
TRAIN = [
    *MODEL, "--optimizer", "adam", "--lr", 5e-3, "--lr-scheduler", "inverse_sqrt", "--warmup-updates", 4,
    "--no-epoch-checkpoints", "--max-update", 24, "--save-interval-updates", 5, "--keep-interval-updates", 2,
    "--valid-subset", "valid,valid1",
]  # fmt: skip
SEGMENTS = 11  # an epoch, with four streams; the last one is shorter
TOKENS = 4 * (SEGMENTS * 16 - 3) - 1


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), train=TOKENS, valid=150, valid1=90)


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
    "inside the first update": processes.killed_inside_update(1),
    "before the first save": processes.killed_after_update(4),
    "mid-epoch": processes.killed_after_update(7),
    "inside an update": processes.killed_inside_update(8),
    "at the epoch's edge": processes.killed_after_update(SEGMENTS),
    "after the epoch's edge": processes.killed_inside_update(SEGMENTS + 1),
    "during validation": processes.killed_in_validation(9),
    "right after a save": processes.killed_after_saving(2),
    "right after the save at the epoch's edge": processes.killed_after_saving(3),
    "while writing the first checkpoint": processes.killed_while_writing(1),
    "while writing a later checkpoint": processes.killed_while_writing(3),
    "while copying a checkpoint": processes.killed_while_copying(2),
    "while copying a later checkpoint": processes.killed_while_copying(5),
}


@pytest.mark.parametrize("name", FAULTS)
def test_killed(name, data, whole, tmp_path):
    command = arguments(data, "--roll")
    assert train_in_processes(command, tmp_path, fault=FAULTS[name]) == [-9]
    assert train_in_processes(command, tmp_path) == [0]
    assert_same_run(whole("--roll"), tmp_path)


@pytest.mark.parametrize(
    ("options", "arch", "ranks", "streams"),
    [
        ([], "transformer_xl_lm", 1, 4),
        (["--roll", "--position-encoding", "shaw"], "transformer_xl_lm", 1, 4),
        ([], "relative_transformer_lm", 1, 4),
        (["--roll", "--update-freq", 3], "lamemo_lm", 1, 4),
        (["--roll", "--store-ema", "--ema-decay", 0.7], "lamemo_lm", 1, 4),
        (["--checkpoint-activations"], "lamemo_lm", 1, 4),
        (["--roll"], "lamemo_lm", 2, 2),
        (["--update-freq", 2], "transformer_xl_lm", 2, 2),
        (["--roll", "--store-ema", "--ema-decay", 0.7], "lamemo_lm", 3, 1),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value),
)
def test_killed_with_other_options(options, arch, ranks, streams, data, whole, tmp_path):
    """Killed twice: inside an epoch, and again two saves later."""
    command = arguments(data, *options, arch=arch, streams=streams)
    for fault in (processes.killed_after_update(8), processes.killed_inside_update(18)):
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
