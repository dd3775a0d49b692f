"""The infinity-former against a computation of its own in numpy, from the paper, and the parts against integrals."""

import math

import numpy as np
import pytest
import torch

from lamemo_fairseq.core.memory.continuous.attention import divergence
from lamemo_fairseq.core.memory.continuous.basis import RadialBasis, _grid
from lamemo_fairseq.core.memory.continuous.options import ContinuousOptions
from lamemo_fairseq.core.memory.continuous.sampling import BINS, Density, even_points, sticky_points
from lamemo_fairseq.core.memory.continuous.signal import Signal, _fit

from ..gpus import DEVICE
from .helpers import random_tokens, read_by_token, read_streams, read_texts, tiny_decoder
from .infinity_former import InfinityFormer

VARIANT = ("continuous", "transformer-xl", "right")
WIDTHS, PENALTY, TAU, SIGMA = (0.1, 0.3), 0.7, 0.6, 0.05
OPTIONS = {
    "basis_widths": ",".join(map(str, WIDTHS)),
    "ridge_penalty": PENALTY,
    "contraction_factor": TAU,
    "kl_sigma": SIGMA,
    "kl_weight": 0.3,
}


def decoder_of(**options):
    return tiny_decoder(VARIANT, **{**OPTIONS, **options})


SIZES = [
    {"memory_sampling": "sticky"},
    {"memory_sampling": "even", "memory_samples": 5},
    {"mem_len": 2, "segment_length": 5, "decoder_layers": 1},
    {"mem_len": 0, "segment_length": 4, "num_basis_functions": 10, "decoder_layers": 3},
    {"decoder_normalize_before": True, "basis_widths": "0.1,0.2,0.5", "clamp_len": 3},
]


@pytest.mark.parametrize("options", SIZES, ids=str)
def test_the_model_computes_what_the_paper_says(options):
    """Scores, losses and the signal that is left, over six segments."""
    decoder = decoder_of(**options).train()
    n, streams = decoder.segment_length, 2
    tokens = random_tokens(streams, 6 * n)
    state, scores, losses = None, [], []
    for segment in tokens.split(n, dim=1):
        features, state, loss = decoder.read_segment(segment, state)
        scores.append(decoder.output_layer(features))
        losses.append(loss["kl"].item())
    scores, divergences = torch.cat(scores, dim=1).detach().numpy(), []
    for b in range(streams):
        samples, sampling = options.get("memory_samples", 7), options.get("memory_sampling", "sticky")
        model = InfinityFormer(
            decoder,
            [float(width) for width in options.get("basis_widths", OPTIONS["basis_widths"]).split(",")],
            PENALTY,
            TAU,
            SIGMA,
            samples,
            sampling,
            decoder.memory.slots,
            pre_norm=options.get("decoder_normalize_before", False),
            farthest=options.get("clamp_len"),
        )
        expected, by_segment, signals = model.read(tokens[b].view(-1, n).numpy())
        np.testing.assert_allclose(scores[b], expected, rtol=0, atol=1e-9)
        for found, signal in zip(state.coefficients, signals, strict=True):
            np.testing.assert_allclose(found[b].numpy(), signal, rtol=0, atol=1e-9)
        divergences.append([np.mean(d) if d else 0.0 for d in by_segment])
    np.testing.assert_allclose(losses, 0.3 * np.mean(divergences, axis=0), rtol=0, atol=1e-9)
    assert losses[0] == 0 and losses[-1] > 0


# The parts against integrals and other solvers.


def test_expected_basis_functions_are_integrals():
    basis, t = RadialBasis(8, (0.02, 0.2)), np.linspace(-8, 9, 400_001)
    centres, squares = (x.numpy() for x in basis.grid(torch.zeros((), dtype=torch.float64)))
    for mean, variance in [(0.5, 0.7), (0.01, 1e-4), (0.99, 0.05), (0.3, 1.3)]:
        under = np.exp(-((t - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
        found = basis.expectation(*(torch.tensor(x, dtype=torch.float64) for x in (mean, variance)))
        for j in range(8):
            psi = np.exp(-((t - centres[j]) ** 2) / (2 * squares[j])) / math.sqrt(2 * math.pi * squares[j])
            assert float(found[j]) == pytest.approx((under * psi).sum() * (t[1] - t[0]), abs=1e-9)


def test_the_divergence_is_an_integral():
    t = np.linspace(-30, 30, 600_001)
    for mean, sigma, narrow in [(0.3, 0.8, 0.4), (0.5, 0.3, 0.5), (0.9, 1.1, 0.9)]:
        p = np.exp(-((t - mean) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
        log_ratio = math.log(narrow / sigma) + (t - mean) ** 2 * (1 / (2 * narrow**2) - 1 / (2 * sigma**2))
        density = Density(*(torch.tensor([x], dtype=torch.float64) for x in (mean, sigma**2)))
        assert float(divergence(density, narrow)) == pytest.approx((p * log_ratio).sum() * (t[1] - t[0]), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_regression_with_the_published_sizes(dtype):
    """The matrix to invert has a condition of 3e5: in float32, an inverse is wrong altogether, and Cholesky by .6%."""
    signal, rows = Signal(RadialBasis(512, (0.01, 0.05)), 1.0, 0.75, 512, "sticky"), 150
    fit = _fit(signal, rows, torch.device("cpu"), dtype)
    points = (np.arange(rows) + 0.5) / rows
    places = np.concatenate([0.75 * (np.arange(512) + 0.5) / 512, 0.75 + 0.25 * points])
    for found, t in [(fit.first, points), (torch.cat([fit.past, fit.new], dim=1), places)]:
        features = signal.basis.evaluate(torch.from_numpy(t)).numpy()
        expected = np.linalg.solve(features.T @ features + np.eye(512), features.T)
        error = np.abs(found.double().numpy() - expected).max() / np.abs(expected).max()
        assert error < (1e-10 if dtype == torch.float64 else 1e-7)


def test_a_penalty_that_is_lost_in_rounding_is_named():
    with pytest.raises(ValueError, match=r"--ridge-penalty is 1e-16, too little to fit 64 basis functions"):
        decoder_of(ridge_penalty=1e-16, num_basis_functions=64)


def test_training_goes_on_after_decoding_in_inference_mode():
    """What is kept between calls was not made there."""
    _grid.cache_clear(), _fit.cache_clear()
    decoder, tokens = decoder_of(), random_tokens(2, 9)
    with torch.inference_mode():
        read_streams(decoder, tokens)
    state = None
    for segment in tokens.split(3, dim=1):
        features, state, losses = decoder.train().read_segment(segment, state)
    (features.sum() + losses["kl"]).backward()
    assert decoder.layers[0].self_attn.density_proj.weight.grad.abs().max() > 0


def test_defaults_are_those_of_the_authors_sorting_task():
    options = ContinuousOptions()
    assert (options.num_basis_functions, options.basis().widths) == (512, (0.01, 0.05))
    assert (options.ridge_penalty, options.contraction_factor, options.memory_samples) == (1.0, 0.75, 512)
    assert (str(options.memory_sampling), options.kl_weight, options.kl_sigma) == ("sticky", 1e-6, 0.05)


def test_gradients_of_densities_and_expectations():
    torch.manual_seed(0)
    basis = RadialBasis(6, (0.05, 0.4))
    mean, variance = torch.rand(2, 3, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64) + 0.01
    inputs = (mean.requires_grad_(), variance.requires_grad_())
    assert torch.autograd.gradcheck(basis.expectation, inputs)
    assert torch.autograd.gradcheck(lambda m, v: divergence(Density(m, v), 0.3), inputs)


def test_gradients_of_the_long_term_attention():
    """Of queries and of every weight; the signal is state and has none."""
    attn = decoder_of().layers[0].self_attn
    torch.manual_seed(0)
    coefficients = torch.randn(2, 6, 8, dtype=torch.float64) / 4
    names = ["long_term_k_proj", "long_term_v_proj", "density_proj"]
    weights = [(torch.randn_like(getattr(attn, name).weight) / 2).requires_grad_() for name in names]
    q = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)

    def read_out(q, *weights):
        for name, weight in zip(names, weights, strict=True):
            getattr(attn, name).weight = weight
        long_term = attn.long_term(coefficients)
        density = attn.locate(q, long_term)
        return attn.read(density, long_term), divergence(density, 0.4)

    for name in names:
        del getattr(attn, name).weight  # so that a plain tensor may stand there
    assert torch.autograd.gradcheck(read_out, (q, *weights))


def test_gradients_of_the_whole_model_are_differences():
    """Of the loss with its KL term, in a segment that reads a signal; none flows into the memory."""
    decoder = decoder_of().train()
    first, second = random_tokens(2, 12).split(9, dim=1)
    state = None
    for segment in first.split(3, dim=1):
        _, state, _ = decoder.read_segment(segment, state)
    assert not any(t.requires_grad for t in state.tensors())

    def loss():
        features, _, losses = decoder.read_segment(second, state)
        return decoder.output_layer(features).logsumexp(-1).mean() + losses["kl"]

    loss().backward()
    for name in ("long_term_k_proj", "long_term_v_proj", "density_proj", "out_proj", "qkv_proj"):
        for layer in decoder.layers:
            weight = getattr(layer.self_attn, name).weight
            direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            with torch.no_grad():
                weight.add_(1e-6 * direction)
                above = float(loss())
                weight.sub_(2e-6 * direction)
                below = float(loss())
                weight.add_(1e-6 * direction)
            slope = float((weight.grad * direction).sum())
            assert slope != 0 and (above - below) / 2e-6 == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_sticky_samples_are_where_attention_is():
    def density(*pairs):
        mean, sigma = torch.tensor(pairs, dtype=torch.float64).unbind(-1)
        return Density(mean.view(1, 1, -1), sigma.square().view(1, 1, -1))

    points = sticky_points(density((0.2, 0.02), (0.8, 0.02), (0.8, 0.02)), 300)[0]
    assert (points.diff() > 0).all() and points[0] >= 0 and points[-1] <= 1
    near = [int(((points - mode).abs() < 0.06).sum()) for mode in (0.2, 0.8)]
    assert near == [pytest.approx(100, abs=2), pytest.approx(200, abs=2)]
    # One wide density over the whole interval samples evenly, and a narrow one at a bin's width.
    even = even_points(density((0.5, 100)), 7)
    torch.testing.assert_close(sticky_points(density((0.5, 100)), 7)[0], even, rtol=0, atol=1e-4)
    narrow = sticky_points(density((0.5 + 0.5 / BINS, 1e-3)), 101)[0]
    assert (narrow - 0.5 - 0.5 / BINS).abs().max() < 1 / BINS


@pytest.mark.parametrize("sampling", ["sticky", "even"])
def test_float32_does_not_drift_from_float64(sampling):
    """Fifty updates of published sizes, each from the one before it."""
    signal = Signal(RadialBasis(512, (0.01, 0.05)), 1.0, 0.75, 512, sampling)
    generator = torch.Generator().manual_seed(0)
    exact = torch.zeros(1, 512, 4, dtype=torch.float64)
    rounded, errors = exact.float(), []
    psi = signal.basis.evaluate(torch.linspace(0, 1, 1000, dtype=torch.float64))
    for update in range(50):
        rows = torch.randn(1, 150, 4, generator=generator, dtype=torch.float64)
        mean = torch.rand(1, 2, 20, generator=generator, dtype=torch.float64)
        density = Density(mean, torch.full_like(mean, 0.02) * torch.rand(mean.shape, generator=generator) + 1e-4)
        taken_in = torch.tensor([[150 * update]])
        exact = signal.extend(exact, taken_in, rows, density)
        rounded = signal.extend(rounded, taken_in, rows.float(), Density(*(t.float() for t in density)))
        values, approximate = (psi @ c.double() for c in (exact, rounded))
        errors.append(float((values - approximate).abs().max() / values.abs().max()))
    print(f"{sampling}: {max(errors[:10]):.1e} in ten updates, {max(errors):.1e} in fifty")
    assert max(errors) < 1e-4 and max(errors[40:]) < 3 * max(errors[:10])


@pytest.mark.parametrize(("count", "samples", "penalty"), [(16, 16, 1.0), (16, 32, 1.0), (76, 512, 1.0), (6, 7, 0.7)])
def test_how_a_signal_grows_by_itself(count, samples, penalty):
    """Against as many updates without new rows as show it."""
    signal = Signal(RadialBasis(count, (0.01, 0.05)), penalty, TAU, samples, "even")
    generator = torch.Generator().manual_seed(0)
    density, rows = Density(*torch.ones(2, 1, 1, 1, dtype=torch.float64)), torch.zeros(1, 5, 1, dtype=torch.float64)
    held, sizes = torch.randn(1, count, 1, generator=generator, dtype=torch.float64), []
    for _ in range(400):
        held = signal.extend(held, torch.ones(1, 1), rows, density)
        sizes.append(held.norm().log())
        held = held / held.norm()
    assert signal.growth(5) == pytest.approx(float(torch.stack(sizes[200:]).mean().exp()), rel=1e-3)


def test_options_with_which_a_signal_would_grow_without_end():
    """Nearly as many samples as functions that are narrower than the distance of their centres."""
    sizes = {"num_basis_functions": 16, "basis_widths": "0.01,0.05", "ridge_penalty": 1.0, "contraction_factor": 0.75}
    with pytest.raises(ValueError, match=r"would grow 1\.88 times a segment: pass a --ridge-penalty above 1"):
        decoder_of(memory_samples=16, **sizes)
    decoder_of(memory_samples=32, **sizes)
    decoder_of(memory_samples=16, **{**sizes, "ridge_penalty": 10.0})


# What the memory does.


def test_a_signal_begins_when_the_slots_are_full():
    """Before, the model is Transformer-XL to the last bit, and the KL term is zero."""
    decoder = decoder_of(mem_len=9).train()
    plain = tiny_decoder(("recurrent", "transformer-xl", "right"), mem_len=9).train()
    own = {k: v for k, v in decoder.state_dict().items() if "long_term" not in k and "density" not in k}
    own = {k: v[:, :8] if "attn.out_proj" in k else v for k, v in own.items()}
    plain.load_state_dict(own)
    state = other = None
    for index, segment in enumerate(random_tokens(2, 18).split(3, dim=1)):
        features, state, losses = decoder.read_segment(segment, state)
        expected, other, _ = plain.read_segment(segment, other)
        empty = index <= 3  # nine tokens fill the slots, the next three push others out when their segment ends
        difference = (features - expected).abs().max().item()
        assert (difference < 1e-12) == empty and (losses["kl"].item() == 0) == empty
        assert state.taken_in.tolist() == [[max(0, 3 * index - 6)]] * 2
        assert all(bool(c.count_nonzero()) == (index >= 3) for c in state.coefficients)


def test_streams_without_a_signal_yet_stay_without():
    signal = Signal(RadialBasis(6, WIDTHS), PENALTY, TAU, 7, "sticky")
    past, rows = torch.randn(2, 6, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    density = Density(*torch.rand(2, 2, 1, 5, dtype=torch.float64))
    both = signal.extend(past, torch.tensor([[0], [9]]), rows, density)
    alone = signal.extend(torch.zeros_like(past), torch.tensor([[0], [0]]), rows, density)
    assert torch.equal(both[0], alone[0]) and not torch.equal(both[1], alone[1])


def test_the_kl_term_leaves_out_padding():
    decoder = decoder_of().train()
    last = random_tokens(2, 12)[:, 9:]
    state = None
    for segment in random_tokens(2, 9, seed=5).split(3, dim=1):
        _, state, _ = decoder.read_segment(segment, state)
    losses = [
        decoder.read_segment(last[row : row + 1], state.map(lambda t, r=row: t[r : r + 1])).losses for row in (0, 1)
    ]
    padded = torch.cat([last, torch.ones(2, 3, dtype=torch.int64)], dim=1)
    both = decoder.read_segment(padded, state, torch.tensor([3, 0])).losses["kl"]
    torch.testing.assert_close(both, losses[0]["kl"])
    both = decoder.read_segment(padded, state, torch.tensor([3, 3])).losses["kl"]
    torch.testing.assert_close(both, (losses[0]["kl"] + losses[1]["kl"]) / 2)
    assert decoder.eval().read_segment(last, state).losses == {}


@pytest.mark.parametrize(
    "options", [{"position_encoding": "shaw"}, {"mem_len": 0}, {"memory_sampling": "even"}], ids=str
)
@torch.no_grad()
def test_decoding_with_other_options(options):
    decoder = decoder_of(**options)
    tokens = random_tokens(2, 18)
    scores = read_by_token(decoder, tokens)
    for end in range(1, 19):
        expected = read_texts(decoder, tokens[:, :end])[:, -1]
        torch.testing.assert_close(scores[:, end - 1], expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_the_fused_backend_does_the_short_term_part():
    pytest.importorskip("triton")
    backends = ("eager", "fused")
    eager, fused = (decoder_of(dtype=torch.float32, attention_backend=name).to(DEVICE) for name in backends)
    tokens = random_tokens(2, 12).to(DEVICE)
    torch.testing.assert_close(read_texts(fused, tokens), read_texts(eager, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_signal_in_float32(dtype, autocast):
    exact, decoder = decoder_of(dtype=torch.float32), decoder_of(dtype=torch.float32 if autocast else dtype)
    states = [None, None]
    for segment in random_tokens(2, 30).split(3, dim=1):
        _, states[0], _ = exact.read_segment(segment, states[0])
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            features, states[1], _ = decoder.read_segment(segment, states[1])
    assert autocast or features.dtype == dtype
    assert {c.dtype for c in states[1].coefficients} == {torch.float32}
    # The first layer's rows are embeddings, so that its signal differs by their rounding and its samples' places.
    one, other = (s.coefficients[0] for s in states)
    assert (one - other).abs().max() < 0.05 * one.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mem_len": -1}, r"--mem-len is -1, but --memory continuous needs at least 0"),
        ({"mem_len": 0, "same_length": True}, r"--same-length .* but --memory continuous has none"),
        ({"num_basis_functions": 7}, r"--num-basis-functions is 7, .*multiple of .*--basis-widths, 2"),
        ({"num_basis_functions": 0}, r"--num-basis-functions is 0"),
        ({"basis_widths": "0.1;0.2"}, r"--basis-widths '0.1;0.2': pass numbers such as 0.01,0.05"),
        ({"basis_widths": "0.1,0"}, r"--basis-widths '0.1,0': every width must be positive"),
        ({"basis_widths": "0.1,1e-30"}, r"every width must be positive, from 1e-06 to 1e\+06"),
        ({"ridge_penalty": 0.0}, r"--ridge-penalty is 0.0"),
        ({"contraction_factor": 1.0}, r"--contraction-factor is 1.0, .*between 0 and 1"),
        ({"memory_samples": 0}, r"--memory-samples is 0"),
        ({"memory_sampling": "nothing"}, r"unknown --memory-sampling 'nothing'; the known ones are sticky, even"),
        ({"kl_weight": -1.0}, r"--kl-weight is -1.0: pass 0"),
        ({"kl_sigma": 0.0}, r"--kl-sigma is 0.0"),
        ({"kl_sigma": 1e200}, r"--kl-sigma is 1e\+200, it must be positive, from 1e-06 to 1e\+06"),
        ({"position_encoding": "absolute"}, r"absolute numbers the tokens of one segment"),
        ({"position_encoding": "disentangled"}, r"take transformer-xl"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        decoder_of(**options)
