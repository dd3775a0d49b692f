"""Segments from CUDA graphs against the same segments without."""

import pytest
import torch

from lamemo_fairseq.models.config import MemoryLanguageModelConfig, check
from lamemo_fairseq.modules.graphs import run_on_aliases

from .gpus import gpu
from .helpers import random_tokens, segments_of, tiny_decoder


def test_graphs_and_recomputed_activations_exclude_each_other():
    options = MemoryLanguageModelConfig(cuda_graphs=True, checkpoint_activations=True, tokens_per_sample=4)
    with pytest.raises(ValueError, match="--cuda-graphs cannot record --checkpoint-activations"):
        check(options)


def test_without_a_gpu_nothing_is_recorded():
    assert torch.equal(*(losses(cuda_graphs, "cpu")[0] for cuda_graphs in (False, True)))


@pytest.mark.parametrize("adaptive", [{}, {"adaptive_softmax_cutoff": "6", "adaptive_input": True}])
def test_aliases_of_parameters_stand_in_for_all_of_them(adaptive):
    decoder = tiny_decoder(**adaptive).train()
    tokens, parameters = random_tokens(2, 3), list(decoder.parameters())
    _, state, _ = decoder.step(tokens, None)
    expected, _, _ = decoder.step(tokens, state)
    leaves, (features, _) = run_on_aliases(decoder.step_without_losses, decoder, parameters, tokens, state)
    assert torch.equal(features, expected)
    wanted = torch.autograd.grad(expected.square().sum(), parameters, allow_unused=True)
    found = torch.autograd.grad(features.square().sum(), leaves, allow_unused=True)
    assert any(g is not None for g in wanted)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))
    leaf_of = {leaf.data_ptr() for leaf in leaves}
    assert leaf_of == {p.data_ptr() for p in parameters}


def losses(cuda_graphs, device, length=18, dtype=torch.float64):
    """Losses and gradients of training on streams; the last segment is short and ragged."""
    decoder = tiny_decoder(dtype=dtype, cuda_graphs=cuda_graphs, decoder_head_dim=4).to(device).train()
    tokens = random_tokens(2, length + 1).to(device)
    tokens[1, -2:] = 1
    found = []
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1)
    for position, segment in segments_of(decoder, tokens[:, :-1], split="train"):
        start = position.index * decoder.segment_length
        target = tokens[:, start + 1 : start + 1 + segment.size(1)]
        for _ in range(2):  # gradients add up over two passes
            loss, _ = decoder(segment, segment.ne(1).sum(1), position, target=target)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found), decoder


@gpu
@pytest.mark.parametrize("backend_dtype", [torch.float32, torch.float64], ids=str)
def test_as_without_graphs(backend_dtype):
    plain, _ = losses(False, "cuda", dtype=backend_dtype)
    graphs, decoder = losses(True, "cuda", dtype=backend_dtype)
    assert decoder.graphs._recording is not None and decoder.graphs._recording.passes > 4
    torch.testing.assert_close(graphs, plain, rtol=1e-4, atol=1e-5)


def recorded(**options):
    """A decoder that has recorded its segments, the next ones, and the state before them."""
    decoder = tiny_decoder(dtype=torch.float32, cuda_graphs=True, **options).to("cuda").train()
    state, segments = None, random_tokens(2, 30).to("cuda").split(decoder.segment_length, dim=1)
    for segment in segments[:4]:
        _, state = decoder.graphs(decoder.step_without_losses, decoder, segment, state)
    assert decoder.graphs._recording is not None
    return decoder, segments[4:], state


def read(decoder, segment, state, seed):
    """Features, the state after the segment, gradients, and the random number after them."""
    torch.cuda.manual_seed(seed)
    features, after = decoder.graphs(decoder.step_without_losses, decoder, segment, state)
    decoder.zero_grad()
    features.square().sum().backward()
    gradients = [p.grad for p in decoder.parameters() if p.grad is not None]
    return [features, *after.tensors(), *gradients, torch.rand(1, device="cuda")]


def another_seed(decoder, segment, state):
    return segment, state, 2


def another_segment(decoder, segment, state):
    return segment.flip(1), state, 1


def another_state(decoder, segment, state):
    return segment, state.map(lambda t: t * 2), 1


def other_weights(decoder, segment, state):
    with torch.no_grad():
        decoder.layers[0].feed_forward.fc1.weight.mul_(2)
    return segment, state, 1


def nothing(decoder, segment, state):
    return segment, state, 1


@gpu
@pytest.mark.parametrize("change", [nothing, another_seed, another_segment, another_state, other_weights])
def test_a_forward_pass_begun_early_is_taken_only_where_it_is_the_same(change):
    decoder, (segment, other, *_), state = recorded(dropout=0.5)
    torch.cuda.manual_seed(7)
    random_state = torch.cuda.get_rng_state()
    decoder.graphs.begin(decoder, segment, state, seed=1)
    assert torch.equal(torch.cuda.get_rng_state(), random_state)
    now = change(decoder, segment, state)
    passes = decoder.graphs._recording.passes
    found = read(decoder, *now)
    assert decoder.graphs._recording.passes == passes + (change is not nothing)
    expected = read(decoder, *now)
    assert all(torch.equal(one, another) for one, another in zip(found, expected, strict=True))
    # Begun and never asked for.
    decoder.graphs.begin(decoder, other, state, seed=1)
    assert all(torch.equal(one, another) for one, another in zip(read(decoder, *now), expected, strict=True))


@gpu
def test_a_second_forward_before_the_backward_is_an_error():
    decoder = tiny_decoder(dtype=torch.float32, cuda_graphs=True).to("cuda").train()
    tokens = random_tokens(2, 16).to("cuda")
    state = None
    for segment in tokens.split(decoder.segment_length, dim=1)[:4]:
        first, state = decoder.graphs(decoder.step_without_losses, decoder, segment, state)
    decoder.graphs(decoder.step_without_losses, decoder, segment, state)
    with pytest.raises(RuntimeError, match="leave out --cuda-graphs"):
        first.sum().backward()
