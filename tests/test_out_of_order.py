"""Whatever a trainer does between two updates, or has to do twice, the run is the same to the last bit."""

import pytest
import torch

from lamemo_fairseq.tasks.faults import retry_out_of_memory

from . import disturbances
from .disturbances import OUT_OF_MEMORY, out_of_memory, struck
from .helpers import TASK, random_tokens, segments_of, tiny_decoder, write_data
from .processes import assert_same_run, computed, output_of, train_in_processes

TRAIN = [
    "--decoder-layers", 2, "--decoder-embed-dim", 16, "--decoder-attention-heads", 2, "--decoder-ffn-embed-dim", 32,
    "--tokens-per-sample", 16, "--mem-len", 24, "--dropout", 0.1, "--optimizer", "adam", "--lr", 5e-3, "--roll",
    "--no-epoch-checkpoints", "--max-update", 15,
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), train=4 * 16 * 11 - 13, valid=150, valid1=90)


def run(data, folder, *options, arch="lamemo_lm", ranks=1, fault=None):
    command = [data, *TASK, "--arch", arch, *TRAIN, "--batch-size", 4 // ranks, *options]
    assert train_in_processes(command, folder, ranks, fault) == [0] * ranks, output_of(folder)[-2000:]
    return folder


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    done = {}

    def once(*options, **kwargs):
        key = (*options, *kwargs.items())
        if key not in done:
            done[key] = run(data, tmp_path_factory.mktemp("undisturbed"), "--disable-validation", *options, **kwargs)
        return done[key]

    return once


VALIDATE = ["--validate-interval-updates", 1, "--valid-subset", "valid,valid1"]
UNUSED = ["--disable-validation"]
DISTURBED = {
    "validation of two sets after every update": (VALIDATE, None),
    "max-valid-steps": ([*VALIDATE, "--max-valid-steps", 1], None),
    "another batch size and the training split for validation": (
        ["--validate-interval-updates", 2, "--valid-subset", "train,valid,valid1", "--batch-size-valid", 3],
        None,
    ),
    "hub calls": (UNUSED, disturbances.hub_calls()),
    "dummy batches": (VALIDATE, disturbances.dummy_batches()),
    "batches fed twice": (UNUSED, disturbances.batches_fed_twice()),
    "NaN detector": (UNUSED, disturbances.looked_at_by_the_nan_detector()),
    "copies": ([*UNUSED, "--store-ema"], disturbances.copied()),
    "out of memory before the memory is written": (UNUSED, out_of_memory("before the memory is written")),
    "out of memory after the memory is written": (UNUSED, out_of_memory("after the memory is written")),
    "out of memory in the backward pass": (UNUSED, disturbances.out_of_memory_in_the_backward_pass()),
    "out of memory in validation": (VALIDATE, out_of_memory("validation")),
}


@pytest.mark.parametrize("name", DISTURBED)
@pytest.mark.parametrize("arch", ["lamemo_lm"])
def test_undisturbed(name, arch, data, undisturbed, tmp_path):
    options, disturbance = DISTURBED[name]
    run(data, tmp_path, *options, arch=arch, fault=disturbance)
    assert_same_run(undisturbed(arch=arch), tmp_path)
    if "--batch-size-valid" in options:
        assert "; pass --batch-size-valid 1 for fewer, longer streams" in output_of(tmp_path)
    if disturbance is not None:
        assert struck(output_of(tmp_path)) >= 4


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--update-freq", 2, *UNUSED], out_of_memory("before the memory is written")),
        (["--update-freq", 2, *UNUSED], out_of_memory("after the memory is written")),
        (["--update-freq", 2, *VALIDATE], None),
    ],
    ids=["out of memory before", "out of memory after", "validation"],
)
def test_undisturbed_between_the_batches_of_an_update(options, fault, data, undisturbed, tmp_path):
    run(data, tmp_path, *options, fault=fault)
    assert_same_run(undisturbed("--update-freq", 2), tmp_path)


@pytest.mark.parametrize(
    ("options", "fault", "on_rank"),
    [
        (VALIDATE, None, 0),
        (VALIDATE, disturbances.dummy_batches(on_rank=1), 1),
        (UNUSED, out_of_memory("before the memory is written", on_rank=1), 1),
        (VALIDATE, out_of_memory("validation", on_rank=1), 1),
    ],
    ids=["validation", "dummy batches", "out of memory", "out of memory in validation"],
)
def test_undisturbed_on_one_of_two_ranks(options, fault, on_rank, data, undisturbed, tmp_path):
    run(data, tmp_path, *options, ranks=2, fault=fault)
    assert_same_run(undisturbed(ranks=2), tmp_path)
    if fault is not None:
        assert struck(output_of(tmp_path, on_rank)) >= 3


@pytest.mark.parametrize("segment", range(4))
def test_an_update_that_is_dropped_moves_the_memory_on(segment, data, tmp_path):
    """The weights stay the same, so that later losses show it."""
    options = ["--update-freq", 3, "--optimizer", "sgd", "--lr", 1e-30, "--dropout", 0, *UNUSED]
    options += ["--save-interval-updates", 1, "--max-epoch", 1, "--roll"]
    whole = run(data, tmp_path / "whole", *options)
    dropped = run(data, tmp_path / "dropped", *options, fault=disturbances.out_of_memory_twice(segment))
    assert struck(output_of(dropped)) >= 1
    losses = [[value for (_, what), value in computed(folder).items() if "loss" in what] for folder in (whole, dropped)]
    first = segment // 3 * 3
    assert len(losses[0]) == 11 and losses[1] == losses[0][:first] + losses[0][first + 3 :]


class Step:
    """Training steps of a decoder that run out of memory a number of times."""

    def __init__(self, failures, before_memory):
        self.decoder = tiny_decoder(dropout=0.3).train()
        self.position, self.tokens = next(segments_of(self.decoder, random_tokens(2, 9), split="train"))
        self.failures, self.before_memory = failures, before_memory

    def fail(self):
        self.failures -= 1
        if self.failures >= 0:
            raise RuntimeError(OUT_OF_MEMORY)

    def criterion(self):
        if self.before_memory:
            self.fail()
        return self.decoder(self.tokens, None, self.position)[0].logsumexp(-1).sum()

    def step(self, criterion):
        loss = criterion()
        loss.backward(retain_graph=not self.before_memory)
        if not self.before_memory:
            self.fail()
        return loss, 1, {}

    def run(self, alone=True):
        torch.manual_seed(5)

        def advance():
            with torch.no_grad():
                self.decoder.extract_features(self.tokens, None, self.position)

        return retry_out_of_memory(self.step, self.criterion, self.decoder, advance, alone)

    def memory(self):
        return self.decoder.streams.saved(self.position).tensors()


@pytest.mark.parametrize("before_memory", [True, False], ids=["forward", "backward"])
def test_a_second_try_gives_what_the_first_would_have(before_memory):
    expected, tried = Step(0, before_memory), Step(1, before_memory)
    assert torch.equal(expected.run()[0], tried.run()[0])
    for one, other in zip(expected.decoder.parameters(), tried.decoder.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("before_memory", [True, False], ids=["forward", "backward"])
def test_memory_moves_on_although_the_batch_is_dropped(before_memory):
    expected, dropped = Step(0, before_memory), Step(2, before_memory)
    expected.run()
    with pytest.raises(RuntimeError, match="out of memory"):
        dropped.run()
    for one, other in zip(expected.memory(), dropped.memory(), strict=True):
        assert torch.equal(one, other)


def test_a_backward_pass_that_others_wait_for_is_not_run_again():
    step = Step(1, before_memory=False)
    with pytest.raises(RuntimeError, match="out of memory"):
        step.run(alone=False)
    assert step.failures == 0


def test_other_errors_are_not_tried_again():
    step = Step(0, before_memory=True)
    step.criterion = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        step.run()
