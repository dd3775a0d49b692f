"""A CUDA graph goes when its decoder changes, gets hooks or is freed, or when the next recording fails."""

import gc
import weakref

import pytest
import torch

from lamemo_fairseq.core import graphs

from .graph_cases import SEGMENT, SIZES, scores
from .helpers import random_tokens, recording_of, tiny_decoder


def test_after_a_recording_that_failed(device, monkeypatch):
    """Such as for lack of memory: the one before it is gone, and is made again."""
    decoder = tiny_decoder(dtype=torch.float32, **SIZES, cuda_graphs=True).to(device).eval()
    segments, state = random_tokens(2, 6 * SEGMENT).to(device).split(SEGMENT, dim=1), None
    with torch.no_grad():
        for segment in segments[:4]:
            state = decoder.graphs(decoder.read_segment, decoder, segment, state).state
        with monkeypatch.context() as patched, pytest.raises(MemoryError):
            patched.setattr(graphs, "_EvaluationRecording", no_memory)
            for _ in range(2):
                decoder.graphs(decoder.read_segment, decoder, segments[4][:, :3], state)
        found = decoder.graphs(decoder.read_segment, decoder, segments[4], state)
        assert torch.equal(found.features, decoder.read_segment(segments[4], state).features)


def no_memory(*_):
    raise MemoryError


def test_parameters_that_moved_are_read_where_they_are(device):
    decoder = tiny_decoder(dtype=torch.float32, **SIZES, cuda_graphs=True).to(device)
    tokens = random_tokens(2, 6 * SEGMENT).to(device)
    scores(decoder, tokens)
    for parameter in decoder.parameters():
        parameter.data = parameter.data * 1.1
    found = scores(decoder, tokens)
    decoder.graphs = None
    assert all(torch.equal(*pair) for pair in zip(found, scores(decoder, tokens), strict=True))


def another_module(decoder):
    decoder.layers[1].feed_forward.fc1 = torch.nn.Sequential(decoder.layers[1].feed_forward.fc1, torch.nn.Tanh())


def another_parameter(decoder):
    norm = decoder.layers[0].final_layer_norm
    norm.weight = torch.nn.Parameter(2 * norm.weight)


def other_dropout(decoder):
    for layer in decoder.layers:
        layer.dropout.p = 0.6


def a_layer_without_dropout(decoder):
    decoder.layers[0].eval()


def a_frozen_layer(decoder):
    decoder.layers[0].requires_grad_(False)


def a_layer_that_learns_again(decoder):
    decoder.layers[1].requires_grad_(True)


CHANGES = [another_module, another_parameter, other_dropout, a_layer_without_dropout]


@pytest.mark.parametrize("change", [*CHANGES, a_frozen_layer, a_layer_that_learns_again])
def test_a_changed_module_is_recorded_anew(change, device):
    """Its features and gradients are those without a graph, and not those from before."""
    decoder = tiny_decoder(dtype=torch.float32, **SIZES, dropout=0.3, cuda_graphs=True).to(device).train()
    decoder.layers[1].requires_grad_(False)
    segments, state = random_tokens(2, 8 * SEGMENT).to(device).split(SEGMENT, dim=1), None

    def read(step, segment):
        torch.manual_seed(7)
        decoder.zero_grad()
        features, after, _ = step(segment, state)
        features.square().sum().backward()
        grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in decoder.parameters())
        return [features, *after.tensors(), *grads]

    def by_graph(segment, before):
        return decoder.graphs(decoder.read_segment, decoder, segment, before)

    for segment in segments[:4]:
        state = by_graph(segment, state).state
    old = read(by_graph, segments[4])
    recording = recording_of(decoder)
    assert recording.passes > 1
    change(decoder)
    expected = read(decoder.read_segment, segments[4])
    assert len(old) != len(expected) or not all(map(torch.equal, old, expected))
    for _ in range(3):  # as it is, recorded, replayed
        torch.testing.assert_close(read(by_graph, segments[4]), expected, rtol=1e-5, atol=1e-5)
    assert recording_of(decoder) is not recording


def test_a_decoder_is_freed_with_its_last_name(device):
    """And with it its graphs, which hold much of a GPU's memory."""
    decoder = tiny_decoder(dtype=torch.float32, **SIZES, cuda_graphs=True).to(device)
    scores(decoder, random_tokens(2, 6 * SEGMENT).to(device))
    assert recording_of(decoder, training=False) is not None
    gone = weakref.ref(decoder)
    gc.collect()
    gc.disable()
    try:
        del decoder
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_hooks_are_called(kind, device):
    decoder, calls = tiny_decoder(dtype=torch.float32, **SIZES, cuda_graphs=True).to(device), []
    tokens = random_tokens(2, 6 * SEGMENT).to(device)
    scores(decoder, tokens)
    passes = recording_of(decoder, training=False).passes
    register = getattr(decoder.layers[0], f"register_{kind}_hook")
    handle = register(lambda *_: calls.append(1))
    scores(decoder, tokens)
    assert len(calls) == 6 and recording_of(decoder, training=False).passes == passes
    handle.remove()
    scores(decoder, tokens)
    assert len(calls) == 6 and recording_of(decoder, training=False).passes > passes
