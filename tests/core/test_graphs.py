"""Segments from CUDA graphs against the same segments without."""

import gc

import pytest
import torch

from lamemo_fairseq.core import graphs
from lamemo_fairseq.core import memory as registered
from lamemo_fairseq.core.aliases import run_on_aliases
from lamemo_fairseq.core.memory.position import real_tokens

from ..gpus import gpu
from . import fake_graphs
from .graph_cases import SEGMENT, SIZES, scores
from .helpers import VARIANTS, first_of_each_memory, random_tokens, recording_of, segments_of, tiny_decoder

# One variant of each memory, two of the compressive one.
MEMORIES = [v for v in VARIANTS if v[1] in ("disentangled", "segatron") or (v[0] != "lookahead" and v[1] != "shaw")]
ALIKE = [v for v in MEMORIES if v[2] != "seldom"]  # every segment is read as the one before it
# In float32 a GPU runs the fused kernels, and a CPU what it runs in float64.
FIRST = first_of_each_memory().values()
BY_DTYPE = [
    *((variant, torch.float64) for variant in MEMORIES),
    *(pytest.param(variant, torch.float32, marks=[] if variant in FIRST else gpu) for variant in MEMORIES),
]


def test_graphs_and_recomputed_activations_exclude_each_other():
    with pytest.raises(ValueError, match="--cuda-graphs cannot record --checkpoint-activations"):
        tiny_decoder(cuda_graphs=True, checkpoint_activations=True)


def test_without_a_gpu_nothing_is_recorded():
    assert torch.equal(*(losses(cuda_graphs, "cpu")[0] for cuda_graphs in (False, True)))


@pytest.mark.parametrize(
    ("variant", "adaptive"),
    [*((variant, {}) for variant in MEMORIES), (VARIANTS[0], {"adaptive_softmax_cutoff": "6", "adaptive_input": True})],
)
def test_aliases_of_parameters_stand_in_for_all_of_them(variant, adaptive):
    decoder = tiny_decoder(variant, **sizes_of(variant), **adaptive).train()
    tokens, parameters, state = random_tokens(2, SEGMENT), list(decoder.parameters()), None
    for _ in range(3):
        state = decoder.read_segment(tokens, state).state
    expected = decoder.read_segment(tokens, state)
    leaves, passage = run_on_aliases(decoder.read_segment, decoder, parameters, tokens, state)
    assert torch.equal(passage.features, expected.features)
    assert passage.losses == expected.losses
    wanted = torch.autograd.grad(total(expected), parameters, allow_unused=True)
    found = torch.autograd.grad(total(passage), leaves, allow_unused=True)
    assert any(g is not None for g in wanted)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))
    leaf_of = {leaf.data_ptr() for leaf in leaves}
    assert leaf_of == {p.data_ptr() for p in parameters}


@pytest.mark.parametrize("variant", ALIKE)
def test_what_is_recorded_is_what_is_computed_again(variant, monkeypatch):
    """Features, state, losses and every gradient, of segments and weights other than those that were recorded."""
    fake_graphs.install(monkeypatch)
    decoder = tiny_decoder(variant, **sizes_of(variant), dropout=0.3).train()
    parameters = list(decoder.parameters())
    segments, state = random_tokens(2, 8 * SEGMENT).split(SEGMENT, dim=1), None
    for segment in segments[:4]:
        state = decoder.read_segment(segment, state).state
    recording = graphs._TrainingRecording(decoder.read_segment, decoder, parameters, segments[4], state)
    given, copies = [], []
    for seed, segment in enumerate(segments[4:]):
        torch.manual_seed(seed)
        expected = decoder.read_segment(segment, state)
        wanted = torch.autograd.grad(2 * total(expected), recording.parameters)
        torch.manual_seed(seed)
        found = recording(segment, state)
        torch.testing.assert_close(found.features, expected.features, rtol=0, atol=1e-12)
        assert {name: loss.item() for name, loss in found.losses.items()} == pytest.approx(
            {name: loss.item() for name, loss in expected.losses.items()}, rel=1e-6
        )
        for one, other in zip(found.state.tensors(), expected.state.tensors(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        gradients = torch.autograd.grad(2 * total(found), recording.parameters)
        for one, other in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        given += [found.features, *found.losses.values(), *found.state.tensors()]
        copies += [tensor.clone() for tensor in given[len(copies) :]]
        state = found.state
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(1.01)
    assert recording.passes == 4
    assert all(torch.equal(*pair) for pair in zip(given, copies, strict=True)), "a replay wrote over what one gave"
    used = {id(p) for p in recording.parameters}
    assert all(name.startswith("output.") for name, p in decoder.named_parameters() if id(p) not in used)


@pytest.mark.parametrize("variant", ALIKE)
@torch.no_grad()
def test_evaluation_is_computed_again_from_what_was_recorded(variant, monkeypatch):
    """Features and state, of segments and weights other than those that were recorded."""
    fake_graphs.install(monkeypatch)
    decoder = tiny_decoder(variant, **sizes_of(variant), dropout=0.3).eval()
    segments, state = random_tokens(2, 7 * SEGMENT).split(SEGMENT, dim=1), None
    for segment in segments[:4]:
        state = decoder.read_segment(segment, state).state
    recording = graphs._EvaluationRecording(decoder.read_segment, segments[4], state)
    given, copies = [], []
    for segment in segments[4:]:
        expected, found = decoder.read_segment(segment, state), recording(segment, state)
        torch.testing.assert_close(found.features, expected.features, rtol=0, atol=1e-12)
        assert found.losses == expected.losses == {}
        for one, other in zip(found.state.tensors(), expected.state.tensors(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        given += [found.features, *found.state.tensors()]
        copies += [tensor.clone() for tensor in given[len(copies) :]]
        state = found.state
        for parameter in decoder.parameters():
            parameter.mul_(1.01)
    assert recording.passes == 3
    assert all(torch.equal(*pair) for pair in zip(given, copies, strict=True)), "a replay wrote over what one gave"


def sizes_of(variant):
    """With gradient between segments, if the memory lets it through."""
    return {**SIZES, "bptt_segments": 2 if registered.MEMORIES[variant[0]].carries_gradient else 1}


def total(passage):
    """A loss of all that a passage gives gradients of."""
    return sum(passage.losses.values(), passage.features.square().sum())


def losses(cuda_graphs, device, variant=VARIANTS[0], dtype=torch.float64):
    """Losses of training on streams; the last segment is short and ragged."""
    options = {**sizes_of(variant), "decoder_head_dim": 4, "cuda_graphs": cuda_graphs}
    decoder = tiny_decoder(variant, dtype=dtype, **options).to(device).train()
    tokens = random_tokens(2, 8 * SEGMENT).to(device)
    lengths = [tokens.size(1) - 1, tokens.size(1) - 3]
    found, state = [], None
    optimizer = torch.optim.SGD(decoder.parameters(), lr=1e-3)
    targets = tokens[:, 1:].split(decoder.segment_length, dim=1)
    for (segment, real), target in zip(segments_of(decoder, tokens[:, :-1], lengths), targets, strict=True):
        for _ in range(2):  # gradients add up over two passes
            features, after, extra = decoder(segment, state, real)
            if real is None:
                loss = decoder.loss(features, target)
            else:
                scored = real_tokens(segment, real)
                loss = decoder.loss(features[scored].unsqueeze(0), target[scored].unsqueeze(0))
            loss = sum(extra.values(), loss)
            loss.backward()
        state = after
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found), decoder


@pytest.mark.parametrize(("variant", "backend_dtype"), BY_DTYPE, ids=str)
def test_as_without_graphs(variant, backend_dtype, device):
    plain, _ = losses(False, device, variant, backend_dtype)
    replayed, decoder = losses(True, device, variant, backend_dtype)
    assert sum(recording.passes for _, recording in decoder.graphs._recorded[True].recordings) > 4
    torch.testing.assert_close(replayed, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", MEMORIES)
def test_evaluation_is_as_without_graphs(variant, device):
    """Before training, and after it has changed the weights; either has a graph of its own."""
    made = {}
    for cuda_graphs in (False, True):
        decoder = tiny_decoder(
            variant, dtype=torch.float32, **sizes_of(variant), decoder_head_dim=4, cuda_graphs=cuda_graphs
        )
        decoder, tokens = decoder.to(device), random_tokens(2, 7 * SEGMENT + 1).to(device)
        before = scores(decoder, tokens)
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.mul_(1.1)
        made[cuda_graphs] = before + scores(decoder, tokens)
    assert recording_of(decoder) is None and recording_of(decoder, training=False).passes >= 5
    assert all(torch.equal(*pair) for pair in zip(made[False], made[True], strict=True))


def test_each_kind_of_segment_has_a_graph(device):
    """Also after another number of streams, whose graphs take the place of the first ones."""
    every = {"lookahead_every": 3, "dtype": torch.float32, **SIZES}
    plain, graphed = (tiny_decoder(cuda_graphs=on, **every).to(device) for on in (False, True))
    for streams in (2, 3, 1):
        tokens = random_tokens(streams, 10 * SEGMENT).to(device)
        assert all(map(torch.equal, scores(plain, tokens), scores(graphed, tokens)))
        made = graphed.graphs._recorded[False].recordings
        assert [signature.tokens[0] for signature, _ in made] == [streams] * 3
        assert [recording.passes for _, recording in made] == [2, 2, 2]


def test_documents_are_scored_as_without_graphs(device):
    """Segments in which streams are alike are replayed, the others are read as they are."""
    documents = [random_tokens(1, length, seed=length)[0] for length in (62, 43, 22, 6)]
    plain, graphed = (tiny_decoder(cuda_graphs=on, **sizes_of(VARIANTS[0])).to(device) for on in (False, True))
    scored = (model.score_documents(documents, 2) for model in (plain, graphed))
    for without, with_graphs in zip(*scored, strict=True):
        torch.testing.assert_close(with_graphs, without, rtol=0, atol=1e-12)
    recording = recording_of(graphed, training=False)
    assert recording is not None and recording.passes > 1


def recorded(**options):
    """A decoder that has recorded its segments, the next ones, and the state before them."""
    decoder = tiny_decoder(dtype=torch.float32, cuda_graphs=True, **options).to("cuda").train()
    state, segments = None, random_tokens(2, 30).to("cuda").split(decoder.segment_length, dim=1)
    for segment in segments[:4]:
        _, state, _ = decoder.graphs(decoder.read_segment, decoder, segment, state)
    assert recording_of(decoder) is not None
    return decoder, segments[4:], state


def read(decoder, segment, state, seed):
    """Features, the state after the segment, gradients, and the random number after them."""
    torch.cuda.manual_seed(seed)
    features, after, _ = decoder.graphs(decoder.read_segment, decoder, segment, state)
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
    passes = recording_of(decoder).passes
    found = read(decoder, *now)
    assert recording_of(decoder).passes == passes + (change is not nothing)
    expected = read(decoder, *now)
    assert all(torch.equal(one, another) for one, another in zip(found, expected, strict=True))
    # Begun and never asked for.
    decoder.graphs.begin(decoder, other, state, seed=1)
    assert all(torch.equal(one, another) for one, another in zip(read(decoder, *now), expected, strict=True))


@gpu
def test_a_recording_says_what_memory_it_keeps_to_itself(caplog):
    """As much as is free once it is gone, but for what stands for tensors of its own."""
    caplog.set_level("INFO", logger="lamemo_fairseq")
    decoder = tiny_decoder(dtype=torch.float32, decoder_ffn_embed_dim=4096, cuda_graphs=True).to("cuda").train()
    n, state = decoder.segment_length, None
    for segment in random_tokens(64, 6 * n).to("cuda").split(n, dim=1):
        features, state, losses = decoder.graphs(decoder.read_segment, decoder, segment, state)
        sum([features.sum(), *losses.values()]).backward()
    kept = recording_of(decoder).memory
    assert kept > 64 * n * 4096 * 4  # the hidden activations of one layer
    assert f"keeps {kept / 2**30:.2f} GiB to itself" in caplog.text
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    del decoder, features, state, losses
    gc.collect()
    torch.cuda.empty_cache()
    assert held - torch.cuda.memory_reserved() >= kept


@gpu
def test_a_second_forward_before_the_backward_is_an_error():
    decoder = tiny_decoder(dtype=torch.float32, cuda_graphs=True).to("cuda").train()
    tokens = random_tokens(2, 16).to("cuda")
    state = None
    for segment in tokens.split(decoder.segment_length, dim=1)[:4]:
        first, state, _ = decoder.graphs(decoder.read_segment, decoder, segment, state)
    decoder.graphs(decoder.read_segment, decoder, segment, state)
    with pytest.raises(RuntimeError, match="leave out --cuda-graphs"):
        first.sum().backward()
