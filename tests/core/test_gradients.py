"""Gradients of a replayed backward pass in buckets: the same as without, complete when they are said to be."""

import copy

import pytest
import torch

from lamemo_fairseq.core import graphs
from lamemo_fairseq.core.gradients import Bucket

from ..gpus import gpu
from . import fake_graphs
from .helpers import VARIANTS, random_tokens, recording_of, tiny_decoder

SEGMENT = 4
SIZES = {"segment_length": SEGMENT, "dropout": 0.3}


class Reducer:
    """Doubles gradients instead of summing them over ranks, as soon as it may."""

    def __init__(self, *groups):
        self.buckets = [Bucket(parameters) for parameters in groups]
        self.reduces = True
        self.order, self.ready = [], []
        self.pending = False

    def begin(self):
        self.order, self.ready, self.pending = [], [], self.reduces
        return self.reduces

    def reduce(self, bucket, ready):
        self.order.append(bucket)
        self.ready.append(ready)

    def finish(self):
        self.pending = False
        for bucket in self.buckets:
            for p, view in zip(bucket.parameters, bucket.views, strict=True):
                assert p.grad is None
                p.grad = 2 * view


@pytest.fixture(autouse=True)
def fakes(monkeypatch, request):
    if request.node.get_closest_marker("gpu") is None:
        fake_graphs.install(monkeypatch)


def decoder_and_segments(variant=VARIANTS[0], segments=9):
    decoder = tiny_decoder(variant, **SIZES, cuda_graphs=True).train()
    return decoder, random_tokens(2, segments * SEGMENT).split(SEGMENT, dim=1)


def layers_of(decoder):
    """Parameters of the layers, the last one's first, and of all else but the output layer."""
    outside = {id(p) for p in decoder.loss_layer.parameters()}
    within = {id(p) for layer in decoder.layers for p in layer.parameters()}
    rest = [p for p in decoder.parameters() if id(p) not in outside | within]
    return [*(list(layer.parameters()) for layer in reversed(decoder.layers)), rest]


def gradients(decoder, read, segment, state):
    """Of all parameters; zeros where there is none."""
    torch.manual_seed(0)
    decoder.zero_grad()
    features, after, losses = read(segment, state)
    loss = sum(losses.values(), decoder.loss(features, segment))
    loss.backward()
    if decoder.graphs.reducer.pending:
        decoder.graphs.reducer.finish()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in decoder.parameters()], after


def by_graph(decoder):
    return lambda segment, state: decoder.graphs(decoder.read_segment, decoder, segment, state)


@pytest.mark.parametrize("variant", [VARIANTS[0], *(v for v in VARIANTS if v[0] in ("compressive", "token"))][:4])
def test_each_bucket_is_reduced_once_in_order_and_the_rest_is_returned(variant):
    decoder, segments = decoder_and_segments(variant)
    decoder.graphs.reducer = reducer = Reducer(*layers_of(decoder))
    bucketed = {id(p) for bucket in reducer.buckets for p in bucket.parameters}
    state, replayed = None, 0
    for segment in segments:
        expected, _ = gradients(decoder, decoder.read_segment, segment, state)
        reducer.order = []
        found, state = gradients(decoder, by_graph(decoder), segment, state)
        replayed += bool(reducer.order)
        if reducer.order:
            assert reducer.order == reducer.buckets
            expected = [2 * g if id(p) in bucketed else g for p, g in zip(decoder.parameters(), expected, strict=True)]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert replayed >= 4


def test_a_bucket_is_complete_when_its_event_happens_and_later_ones_are_not():
    decoder, segments = decoder_and_segments()
    decoder.graphs.reducer = reducer = Reducer(*layers_of(decoder))
    state = None
    for segment in segments[:-1]:
        _, state = gradients(decoder, by_graph(decoder), segment, state)
    then = []
    for event in reducer.ready:
        assert event.external
        event.waiting.append(lambda: then.append([bucket.flat.clone() for bucket in reducer.buckets]))
    for bucket in reducer.buckets:
        bucket.flat.fill_(torch.nan)
    gradients(decoder, by_graph(decoder), segments[-1], state)
    assert len(then) == len(reducer.buckets) == 3
    for n, seen in enumerate(then):
        assert torch.equal(seen[n], reducer.buckets[n].flat) and not seen[n].isnan().any()
        assert all(later.isnan().any() for later in seen[n + 1 :]), "it waited for the end of the pass"


def test_gradients_that_are_not_reduced_add_up_over_passes():
    """The buckets are written over by every replay; what was handed on before stays."""
    decoder, segments = decoder_and_segments()
    decoder.graphs.reducer = reducer = Reducer(*layers_of(decoder))
    reducer.reduces = False
    state, parameters = None, list(decoder.parameters())
    for n, segment in enumerate(segments):
        if n in (0, 6):  # the first gradients of all, and the first that come from a graph
            assert (recording_of(decoder) is None) == (n == 0)
            decoder.zero_grad()
            total = [torch.zeros_like(p) for p in parameters]
        torch.manual_seed(0)
        features, _, losses = decoder.read_segment(segment, state)
        expected = torch.autograd.grad(sum(losses.values(), decoder.loss(features, segment)), parameters)
        total = [one + other for one, other in zip(total, expected, strict=True)]
        torch.manual_seed(0)
        features, state, losses = by_graph(decoder)(segment, state)
        sum(losses.values(), decoder.loss(features, segment)).backward()
    assert recording_of(decoder).passes >= 5 and reducer.order == []
    for p, one in zip(parameters, total, strict=True):
        torch.testing.assert_close(p.grad, one, rtol=1e-9, atol=1e-11)


def test_a_parameter_without_a_gradient_counts_as_zeros():
    """Such as one of a module that a graph leaves out; another rank's segment may have left something in its place."""
    decoder, segments = decoder_and_segments()
    unused = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    last, *others = layers_of(decoder)
    decoder.graphs.reducer = reducer = Reducer([unused[0], *last], [unused[1]], *others)
    state = None
    for segment in segments:
        for bucket in reducer.buckets:
            bucket.flat.fill_(7)
        _, state = gradients(decoder, by_graph(decoder), segment, state)
        if reducer.order:
            assert not unused[0].grad.any() and not unused[1].grad.any()
            unused[0].grad = unused[1].grad = None
    assert reducer.order == reducer.buckets


def test_without_external_events_all_wait_for_the_replay(monkeypatch):
    """As with torch before 2.8."""
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing=False: None)
    decoder, segments = decoder_and_segments()
    decoder.graphs.reducer = reducer = Reducer(*layers_of(decoder))
    state = None
    for segment in segments:
        _, state = gradients(decoder, by_graph(decoder), segment, state)
    assert reducer.order == reducer.buckets and reducer.ready == [None] * 3


def test_other_buckets_are_recorded_anew():
    decoder, segments = decoder_and_segments()
    decoder.graphs.reducer = Reducer(*layers_of(decoder))
    state = None
    for n, segment in enumerate(segments):
        if n == 5:
            assert recording_of(decoder) is not None
            decoder.graphs.reducer = other = Reducer(*layers_of(decoder))
        expected, _ = gradients(decoder, decoder.read_segment, segment, state)
        found, state = gradients(decoder, by_graph(decoder), segment, state)
    assert recording_of(decoder).buckets == other.buckets == other.order
    bucketed = {id(p) for bucket in other.buckets for p in bucket.parameters}
    for p, one, wanted in zip(decoder.parameters(), found, expected, strict=True):
        torch.testing.assert_close(one, wanted * (2 if id(p) in bucketed else 1), rtol=1e-9, atol=1e-12)


def test_a_copy_of_the_model_has_no_reducer():
    decoder, _ = decoder_and_segments()
    decoder.graphs.reducer = Reducer(*layers_of(decoder))
    assert copy.deepcopy(decoder).graphs.reducer is None
    assert isinstance(decoder.graphs, graphs.SegmentGraphs)


@gpu
def test_another_stream_sees_a_bucket_complete_before_the_replay_ends():
    decoder = tiny_decoder(dtype=torch.float32, decoder_ffn_embed_dim=4096, cuda_graphs=True).to("cuda").train()
    stream, copies = torch.cuda.Stream(), []

    class Copying(Reducer):
        def reduce(self, bucket, ready):
            super().reduce(bucket, ready)
            stream.wait_event(ready)
            with torch.cuda.stream(stream):
                copies.append(bucket.flat.clone())

    decoder.graphs.reducer = reducer = Copying(*layers_of(decoder))
    state = None
    for segment in random_tokens(64, 30 * decoder.segment_length).to("cuda").split(decoder.segment_length, dim=1):
        for bucket in reducer.buckets:
            bucket.flat.fill_(torch.nan)
        copies.clear()
        _, state = gradients(decoder, by_graph(decoder), segment, state)
        torch.cuda.synchronize()
        for copy_of_bucket, bucket in zip(copies, reducer.buckets if copies else (), strict=True):
            assert torch.equal(copy_of_bucket, bucket.flat)
    assert len(copies) == 3
