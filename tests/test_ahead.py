"""A training segment that is run before it is asked for: the same losses and gradients, to the last bit.

A CPU replays with stand-ins for graphs.
"""

import copy

import pytest
import torch

from lamemo_fairseq.core import graphs
from lamemo_fairseq.core.layers.vocabulary import AdaptiveSoftmax, FullSoftmax
from lamemo_fairseq.core.memory import StreamMemory
from lamemo_fairseq.models.decoder import FairseqMemoryDecoder

from .core import fake_graphs
from .core.helpers import recording_of
from .gpus import gpu
from .helpers import random_tokens, read_streams, segments_of, tiny_decoder

SEGMENTS = 7
AHEAD = 3  # of them: the memory has to be full, and two segments of the same shapes are read before a replay


def nothing(decoder):
    pass


def trained(
    begins=True,
    between=nothing,
    targets=True,
    begin=FairseqMemoryDecoder.begin_segment,
    off=0,
    device="cpu",
    **options,
):
    """The losses and gradients of all segments; *between* is called when the next segment has begun."""
    decoder = tiny_decoder(dtype=torch.float32, dropout=0.3, **options).train().to(device)
    decoder.graphs = graphs.SegmentGraphs()
    tokens = random_tokens(2, SEGMENTS * decoder.segment_length + 1).to(device)
    following = tokens[:, 1:].split(decoder.segment_length, dim=1)
    read = zip(segments_of(decoder, tokens[:, :-1], "train"), following, strict=True)
    segments = [(position, words, after) for (position, words), after in read]
    computed = []
    for number, (position, segment, target) in enumerate(segments):
        torch.manual_seed(number)
        output, extra = decoder(segment, position=position, target=target if targets else None)
        loss = sum((extra or {}).values(), output.sum())
        loss.backward()
        computed += [loss.detach().clone(), *(p.grad for p in decoder.parameters() if p.grad is not None)]
        with torch.no_grad():
            for p in decoder.parameters():
                p -= 1e-3 * (0 if p.grad is None else p.grad)
        decoder.zero_grad()
        for later, words, after in segments[number + 1 : number + 2] if begins else ():
            begin(decoder, words, after, after.to("cpu", copy=True), later, seed=number + 1 + off)
        between(decoder)
    assert recording_of(decoder).passes > AHEAD
    return computed


def other_output_weights(decoder):
    with torch.no_grad():
        decoder.loss_layer.biases[0].mul_(1.5)


def other_weights(decoder):
    with torch.no_grad():
        decoder.layers[0].feed_forward.fc1.weight.mul_(1.1)


def validation(decoder):
    with torch.no_grad():
        read_streams(decoder.eval(), random_tokens(2, 20, seed=1))
    decoder.train()


def a_copy(decoder):
    assert copy.deepcopy(decoder)._ahead is None


@pytest.fixture
def losses(monkeypatch):
    """How often each kind of softmax has computed a loss."""
    fake_graphs.install(monkeypatch)
    counts = {}
    for kind in (FullSoftmax, AdaptiveSoftmax):

        def counted(*args, _kind=kind, _loss=kind.loss):
            counts[_kind] = counts.get(_kind, 0) + 1
            return _loss(*args)

        monkeypatch.setattr(kind, "loss", counted)
    return counts


CASES = {
    "nothing": ({}, 0),
    "validation": ({"between": validation}, 0),
    "a copy": ({"between": a_copy}, 0),
    "other weights": ({"between": other_weights}, AHEAD),
    "other output weights": ({"between": other_output_weights}, AHEAD),
    "another seed, as after an overflow": ({"off": 1}, AHEAD),
}


KINDS = {FullSoftmax: {}, AdaptiveSoftmax: {"adaptive_softmax_cutoff": "5,10"}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("options", "discarded"), CASES.values(), ids=CASES)
def test_a_loss_ahead_is_taken_only_where_it_is_the_same(options, discarded, kind, losses):
    options = {**options, **KINDS[kind]}
    expected = trained(False, **options)
    losses.clear()
    assert all(map(torch.equal, trained(**options), expected))
    assert losses == {kind: SEGMENTS + discarded}


@gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_ahead_on_a_gpu(kind):
    options = {"device": "cuda", **KINDS[kind]}
    assert all(map(torch.equal, trained(**options), trained(False, **options)))


@pytest.mark.parametrize("kind", KINDS)
def test_no_loss_is_computed_that_is_not_asked_for(kind, losses):
    """Some criterions compute their own."""
    options = {"targets": False, **KINDS[kind]}
    expected = trained(False, **options)
    losses.clear()
    assert all(map(torch.equal, trained(**options), expected)) and losses == {}


WITHOUT_MEMORY = {
    "the memory of streams": (StreamMemory, "before", 0),
    "the plan of the loss": (FullSoftmax, "plan", 0),
    "the segment": (graphs._TrainingRecording, "_connected", AHEAD),
    "the loss": (FullSoftmax, "loss", AHEAD),
}


@pytest.mark.parametrize(("owner", "name", "times"), WITHOUT_MEMORY.values(), ids=WITHOUT_MEMORY)
@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError("other")], ids=str)
def test_memory_that_does_not_suffice_ahead(error, owner, name, times, losses, monkeypatch):
    """Where the segment is asked for, the trainer tries once more; ahead of that it would end the run."""
    failed = []

    def begin_without_memory(*args, **kwargs):
        def fail(*_, **__):
            failed.append(True)
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(owner, name, fail)
            FairseqMemoryDecoder.begin_segment(*args, **kwargs)

    if "out of memory" not in str(error):
        with pytest.raises(RuntimeError, match="other"):
            trained(begin=begin_without_memory)
    else:
        assert all(map(torch.equal, trained(begin=begin_without_memory), trained(False)))
        assert len(failed) == (times or SEGMENTS - 1)
