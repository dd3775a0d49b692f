"""Every precision that fairseq trains in ends within 2% of the loss of float32. What needs a GPU is skipped without."""

import math
import re

import pytest
import torch

from . import faults
from .gpus import gpu, gpus
from .helpers import ON_GPU, TASK, write_data
from .processes import assert_same_run, computed, output_of, train_in_processes, weights

MODEL = [
    "--decoder-layers", 3, "--decoder-embed-dim", 64, "--decoder-attention-heads", 4, "--decoder-ffn-embed-dim", 128,
    "--tokens-per-sample", 32, "--mem-len", 48, "--dropout", 0.1,
]  # fmt: skip
TRAIN = [
    *MODEL, "--optimizer", "adam", "--lr", 2e-3, "--lr-scheduler", "inverse_sqrt", "--warmup-updates", 20,
    "--clip-norm", 0.5, "--roll", "--no-epoch-checkpoints", "--disable-validation", "--batch-size", 4,
]  # fmt: skip

SMALL = ["--decoder-layers", 2, "--tokens-per-sample", 16, "--mem-len", 24]  # for a CPU


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), train=20_000)


@pytest.fixture(scope="module")
def losses(data, tmp_path_factory):
    """Losses a token in nats, update by update, by device, precision and architecture."""
    done = {}

    def run(task, updates, arch, *precision):
        key = (*task, updates, arch, *precision)
        if key not in done:
            folder = tmp_path_factory.mktemp("run")
            command = [data, *task, "--arch", arch, *TRAIN, "--max-update", updates, *precision]
            assert train_in_processes(command, folder) == [0], output_of(folder)[-3000:]
            done[key] = losses_of(folder)
            memory = saved_memory(folder)
            if "normalizers" in memory:
                assert {t.dtype for t in memory["normalizers"]} == {torch.float32}
        return done[key]

    return run


def losses_of(folder):
    found = {
        update: float.fromhex(value) / (4 * 32)
        for (update, name), values in sorted(computed(folder).items())
        if "loss" in name
        for value in values
    }
    assert found and all(math.isfinite(loss) for loss in found.values())
    return list(found.values())


def saved_memory(folder):
    saved = torch.load(folder / "checkpoints" / "checkpoint_last.pt", weights_only=False)
    return saved["extra_state"]["train_iterator"]["memory"]


def last(values):
    """The mean of the last fifth."""
    part = values[-len(values) // 5 :]
    return sum(part) / len(part)


@pytest.mark.parametrize("arch", ["lamemo_lm", "transformer_xl_lm"])
def test_bf16_on_a_cpu(arch, losses):
    exact = losses(TASK, 100, arch, *SMALL)
    assert last(exact) < 0.6 * exact[0]
    assert last(losses(TASK, 100, arch, *SMALL, "--bf16")) == pytest.approx(last(exact), rel=0.02)


@gpu
@pytest.mark.parametrize("arch", ["lamemo_lm", "transformer_xl_lm"])
@pytest.mark.parametrize(
    "precision", [["--fp16"], ["--memory-efficient-fp16"], ["--bf16"], ["--amp"]], ids=lambda p: p[0][2:]
)
def test_on_a_gpu(precision, arch, losses):
    exact, other = (losses(ON_GPU, 300, arch, *options) for options in ([], precision))
    assert last(exact) < 0.5 * exact[0]
    print(f"{arch} {precision[0]}: {last(other):.4f}, float32 {last(exact):.4f}")
    assert last(other) == pytest.approx(last(exact), rel=0.02)


@gpu
def test_a_batch_that_overflows_is_tried_again_with_the_same_memory(data, tmp_path):
    """To the last bit what the run computes that begins with the scale at which the batch no longer overflows."""
    command = [data, *ON_GPU, "--arch", "lamemo_lm", *TRAIN, "--max-update", 30, "--amp"]
    high = ["--fp16-init-scale", 2**24, "--amp-batch-retries", 30]
    assert train_in_processes([*command, *high], tmp_path / "high") == [0]
    before_the_first_update = output_of(tmp_path / "high").split("train_inner")[0]
    scales = re.findall(r"AMP: overflow detected, setting scale to to (\S+)", before_the_first_update)
    assert scales
    found = ["--fp16-init-scale", int(float(scales[-1])), "--amp-batch-retries", 30]
    assert train_in_processes([*command, *found], tmp_path / "found") == [0]
    assert "AMP: overflow" not in output_of(tmp_path / "found").split("train_inner")[0]
    once, retried = (
        # Norms of gradients that overflow are no part of what is the same.
        {key: {v for v in values if math.isfinite(float.fromhex(v))} for key, values in computed(folder).items()}
        for folder in (tmp_path / "found", tmp_path / "high")
    )
    assert once == retried and all(len(values) == 1 for values in once.values())
    once, retried = weights(tmp_path / "found"), weights(tmp_path / "high")
    assert all(once[name].equal(weight) for name, weight in retried.items())


@gpu
def test_training_goes_on_after_overflows_in_fp16(data, tmp_path):
    command = [data, *ON_GPU, "--arch", "lamemo_lm", *TRAIN, "--max-update", 100]
    assert train_in_processes([*command, "--fp16", "--fp16-init-scale", 2**30], tmp_path) == [0]
    assert "gradient overflow detected" in output_of(tmp_path)
    assert math.isfinite(sum(float(t.float().sum()) for t in saved_memory(tmp_path)["outputs"]))


@gpu
@pytest.mark.parametrize(
    "precision", [["--fp16"], ["--bf16"], ["--amp"], ["--fp16", "--cuda-graphs"]], ids=lambda p: p[-1][2:]
)
def test_a_run_resumed_on_a_gpu_is_the_same_to_the_last_bit(precision, data, tmp_path):
    command = [data, *ON_GPU, "--arch", "lamemo_lm", *TRAIN, *precision, "--max-update", 40]
    command += ["--save-interval-updates", 15, "--fp16-init-scale", 64, "--fp16-scale-window", 7]
    assert train_in_processes(command, tmp_path / "whole") == [0]
    assert train_in_processes(command, tmp_path / "killed", fault=faults.killed_after_update(22)) == [-9]
    assert train_in_processes(command, tmp_path / "killed") == [0]
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


AHEAD = ["--save-interval-updates", 15, "--update-freq", 2]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([*TASK, "--bf16"], id="bf16 on a CPU"),
        pytest.param([*ON_GPU, "--bf16", "--cuda-graphs"], id="bf16", marks=gpu),
        pytest.param([*ON_GPU, "--fp16", "--fp16-init-scale", 2**20, "--cuda-graphs"], id="fp16", marks=gpu),
        pytest.param([*ON_GPU, "--fp16", "--fp16-scale-window", 5, "--cuda-graphs"], id="fp16 growing", marks=gpu),
    ],
)
def test_a_device_that_goes_ahead_computes_the_same_to_the_last_bit(options, tmp_path):
    """Over the end of an epoch, saving and overflows."""
    updates = 90 if "--cuda-graphs" in options else 30
    data = write_data(tmp_path / "data", train=220 * updates)  # read once before the end
    command = [data, *options, "--arch", "lamemo_lm", *TRAIN, *AHEAD, "--max-update", updates]
    assert train_in_processes(command, tmp_path / "waiting", fault=faults.waiting_for_the_host()) == [0]
    assert train_in_processes(command, tmp_path / "ahead", fault=faults.telling_what_went_ahead()) == [0]
    assert_same_run(tmp_path / "waiting", tmp_path / "ahead")
    told = output_of(tmp_path / "ahead")
    assert told.count("an update went ahead") == updates
    if "--cuda-graphs" in options:
        print(told.count("a segment went ahead"), told.count("in vain"), told.count("gradient overflow detected"))
        assert told.count("a segment went ahead") > 60
    if "--fp16" in options:
        assert "gradient overflow detected" in told


@gpus
@pytest.mark.parametrize(
    "precision", [[], ["--bf16"], ["--fp16", "--cuda-graphs"]], ids=["float32", "bf16", "fp16 graphs"]
)
def test_two_gpus_compute_what_one_does_and_go_on_after_a_kill(precision, data, tmp_path):
    command = [data, *ON_GPU, "--arch", "lamemo_lm", *TRAIN, *precision, "--max-update", 60, "--dropout", 0]
    command += ["--save-interval-updates", 20]
    assert train_in_processes([*command, "--batch-size", 4], tmp_path / "one") == [0]
    two = [*command, "--batch-size", 2]
    assert train_in_processes(two, tmp_path / "two", ranks=2) == [0, 0]
    assert 0 not in train_in_processes(two, tmp_path / "killed", 2, faults.killed_after_update(33))
    assert train_in_processes(two, tmp_path / "killed", ranks=2) == [0, 0]

    def curve(folder):
        sums = {}
        for (update, name), values in computed(folder).items():
            if "loss" in name:
                sums[update] = sums.get(update, 0) + sum(map(float.fromhex, values)) / len(values)
        return [sums[update] for update in sorted(sums)]

    tolerance = 0.02 if precision else 1e-3
    print(max(abs(a / b - 1) for a, b in zip(curve(tmp_path / "two"), curve(tmp_path / "one"), strict=True)))
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=tolerance)
    assert curve(tmp_path / "killed") == pytest.approx(curve(tmp_path / "two"), rel=tolerance)
    assert weights(tmp_path / "killed").keys() == weights(tmp_path / "two").keys()
    assert [t.size(0) for t in saved_memory(tmp_path / "two")["outputs"]] == [4, 4]
