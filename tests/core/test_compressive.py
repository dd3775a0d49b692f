"""The Compressive Transformer's memory: against the paper, where its gradients go, what it keeps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamemo_fairseq.core import LanguageModel
from lamemo_fairseq.core.decoding.state import DecodingState
from lamemo_fairseq.core.kernels import aligned
from lamemo_fairseq.core.memory.compressive import COMPRESSIONS, attention

from ..gpus import DEVICE
from .compressive_paper import Paper
from .helpers import config_of, random_tokens, read_texts, tiny_decoder, whole_segments

SIZES = [
    {"segment_length": 5, "mem_len": 4, "compressed_len": 3, "compression_rate": 2},
    {"segment_length": 3, "mem_len": 7, "compressed_len": 2, "compression_rate": 3},
    {"segment_length": 5, "mem_len": 2, "compressed_len": 4, "compression_rate": 3},
    {"segment_length": 4, "mem_len": 8, "compressed_len": 3, "compression_rate": 4},
]
TRAINED = [(c, loss) for c in ("conv", "dilated-conv") for loss in ("attention-reconstruction", "auto-encoding")]
KINDS = [*TRAINED, ("mean-pool", "none"), ("max-pool", "none"), ("most-used", "none")]
LOSS = "compression"


def decoder_of(compression="conv", loss="attention-reconstruction", **options):
    return tiny_decoder(("compressive", "transformer-xl", compression), compression_loss=loss, **options)


def paper_of(decoder, **options):
    chosen = decoder.memory.config.options
    weights = {name: t.numpy() for name, t in decoder.state_dict().items()}
    return Paper(
        weights, len(decoder.layers), 2, decoder.memory.config.mem_len, chosen.compressed_len,
        chosen.compression_rate, chosen.compression, chosen.compression_loss, **options,
    )  # fmt: skip


def read_by_segments(decoder, tokens, state=None):
    """Passages of ``tokens [B, T]``."""
    for segment in tokens.split(decoder.segment_length, dim=1):
        passage = decoder.read_segment(segment, state)
        state = passage.state
        yield passage


def assert_equals_paper(decoder, **options):
    """Features and losses, in training without dropout."""
    length = decoder.segment_length
    tokens, papers = random_tokens(2, 6 * length), [paper_of(decoder, **options) for _ in range(2)]
    positive = 0
    for k, passage in enumerate(read_by_segments(decoder.train(), tokens)):
        features, losses = zip(
            *(p.read(t[k * length :][:length]) for p, t in zip(papers, tokens, strict=True)), strict=True
        )
        np.testing.assert_allclose(passage.features.detach(), features, rtol=0, atol=1e-10)
        assert float(passage.losses.get(LOSS, torch.zeros(())).detach()) == pytest.approx(np.mean(losses), rel=1e-10)
        positive += np.mean(losses) > 1e-6
    assert all(len(c) == papers[0].compressed_len for c in papers[0].compressed)
    assert positive > 2 or papers[0].loss == "none"


@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize(("compression", "loss"), KINDS)
def test_equals_the_paper(compression, loss, sizes, monkeypatch):
    monkeypatch.setattr(attention, "QUERIES_AT_ONCE", 2)
    assert_equals_paper(decoder_of(compression, loss, **sizes))


def test_equals_the_paper_with_norms_before():
    assert_equals_paper(decoder_of(decoder_normalize_before=True, **SIZES[2]), before=True)


def test_equals_the_paper_where_distances_are_limited():
    decoder = decoder_of("most-used", "none", clamp_len=3, same_length=True, decoder_layers=3, **SIZES[2])
    assert_equals_paper(decoder, clamp=3, span=6)


@pytest.mark.parametrize(("compression", "loss"), [KINDS[0], KINDS[-1]])
def test_other_sizes_at_test_time(compression, loss):
    trained = decoder_of(compression, loss, **SIZES[0])
    decoder = decoder_of(compression, loss, **{**SIZES[0], "segment_length": 3, "mem_len": 9, "compressed_len": 1})
    decoder.load_state_dict({name: t * 1.1 if t.is_floating_point() else t for name, t in trained.state_dict().items()})
    assert_equals_paper(decoder)


def test_no_compressed_slots_is_transformer_xl():
    compressive = decoder_of("mean-pool", "none", compressed_len=0, compression_rate=4, segment_length=4, mem_len=8)
    recurrent = tiny_decoder(("recurrent", "transformer-xl", "right"), segment_length=4, mem_len=8)
    recurrent.load_state_dict(compressive.state_dict())
    tokens = random_tokens(2, 24)
    assert torch.equal(read_texts(recurrent, tokens), read_texts(compressive, tokens))


@pytest.mark.parametrize(("compression", "loss"), TRAINED)
def test_the_loss_has_the_gradient_of_the_papers(compression, loss):
    """Against finite differences of the numpy computation, memory being held."""
    decoder = decoder_of(compression, loss, **SIZES[2], compression_loss_weight=3.0).train()
    tokens, paper = random_tokens(1, 15), paper_of(decoder)
    *_, passage = read_by_segments(decoder, tokens)
    for k in range(2):
        paper.read(tokens[0, 5 * k : 5 * k + 5])
    passage.losses[LOSS].backward()
    for name, parameter in decoder.named_parameters():
        if not name.startswith("memory."):
            continue
        for entry in (0, parameter.numel() // 2, parameter.numel() - 1):
            found = []
            for sign in (1, -1):
                changed = paper.copy()
                changed.weights[name].flat[entry] += sign * 1e-5
                found.append(changed.read(tokens[0, 10:])[1])
            expected = 3 * (found[0] - found[1]) / 2e-5
            assert float(parameter.grad.flatten()[entry]) == pytest.approx(expected, rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_is_the_papers_with_padded_heads_too(padded, monkeypatch):
    """Heads of 5 columns become 8 on a GPU: zeros change neither the scores' factor nor the mean."""
    monkeypatch.setattr(aligned, "matters", lambda x: padded)
    assert_equals_paper(decoder_of(decoder_head_dim=5))


@pytest.mark.parametrize("before", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize(("compression", "loss"), TRAINED)
def test_each_loss_trains_its_own_part(compression, loss, before):
    decoder = decoder_of(compression, loss, decoder_normalize_before=before, **SIZES[2]).train()
    parameters = dict(decoder.named_parameters())

    def gradients(weigh):
        """Of a loss over all segments, by name; None where it does not reach."""
        passages = list(read_by_segments(decoder, random_tokens(2, 20)))
        language = sum(decoder.output_layer(p.features).logsumexp(-1).sum() for p in passages)
        compression = sum(p.losses[LOSS] for p in passages)
        found = torch.autograd.grad(weigh(language, compression), list(parameters.values()), allow_unused=True)
        return dict(zip(parameters, found, strict=True))

    language, compressing = gradients(lambda language, _: language), gradients(lambda _, compression: compression)
    both = gradients(lambda language, compression: language + compression)
    for name, parameter in parameters.items():
        mine, other = (compressing, language) if name.startswith("memory.") else (language, compressing)
        assert other[name] is None and mine[name].count_nonzero() > 0, name
        assert torch.equal(both[name], mine[name]) and parameter.requires_grad, name


def test_what_has_no_weights_has_no_loss():
    decoder = decoder_of("most-used", "attention-reconstruction").train()
    assert [p.losses for p in read_by_segments(decoder, random_tokens(2, 12))] == [{}] * 4
    assert list(decoder.memory.parameters()) == []


def test_projections_train_on():
    """They are held constant for the loss of the compression alone."""
    decoder = decoder_of(**SIZES[0]).train()
    optimizer = torch.optim.SGD(decoder.parameters(), lr=1e-3)
    before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    for passage in read_by_segments(decoder, random_tokens(2, 20)):
        optimizer.zero_grad()
        (decoder.output_layer(passage.features).logsumexp(-1).sum() + passage.losses[LOSS]).backward()
        optimizer.step()
    assert [name for name, p in decoder.named_parameters() if torch.equal(p, before[name])] == []


def test_losses_of_streams_add_up_whatever_shares_their_batch():
    """Also where some end within the segment, whose padding teaches nothing."""
    decoder = decoder_of(**SIZES[0]).train()
    tokens, lengths = random_tokens(3, 15), torch.tensor([5, 3, 5])
    *_, passage = read_by_segments(decoder, tokens[:, :10])
    last = tokens[:, 10:].masked_fill(torch.arange(5) >= lengths.unsqueeze(1), 1)

    def total(streams):
        state, real = passage.state.map(lambda t: t[streams]), lengths[streams]
        part = last[streams, : real.max()]
        ragged = None if (real == part.size(1)).all() else real
        return float(decoder.read_segment(part, state, ragged).losses[LOSS].detach()) * int(real.sum())

    every = total([0, 1, 2])
    assert every > 0
    assert every == pytest.approx(total([0, 1]) + total([2]), rel=1e-12)
    assert every == pytest.approx(total([0]) + total([1]) + total([2]), rel=1e-12) and total([1]) == 0


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 7), rate=st.integers(2, 5), compressed_len=st.integers(0, 6),
    spare=st.integers(0, 9), segments=st.integers(1, 8),
)  # fmt: skip
def test_no_row_is_lost_or_compressed_twice(length, rate, compressed_len, spare, segments):
    mem_len = rate - 1 + spare
    decoder = decoder_of(
        "max-pool", "none", decoder_layers=1, segment_length=length, mem_len=mem_len,
        compression_rate=rate, compressed_len=compressed_len,
    )  # fmt: skip
    tokens = random_tokens(1, length * segments)
    with torch.no_grad():
        *_, (_, state, _) = read_by_segments(decoder, tokens)
        embedded = decoder.embed_tokens(tokens)
    (hidden,), (compressed,) = state.hidden, state.compressed
    left = tokens.size(1) - hidden.size(1)
    assert hidden.size(1) <= mem_len and left % rate == 0
    assert left == 0 or hidden.size(1) > mem_len - rate
    assert torch.equal(hidden, embedded[:, left:])
    groups = embedded[:, :left].unflatten(1, (left // rate, rate)).amax(2) if left else embedded[:, :0]
    assert torch.equal(compressed, groups[:, max(0, left // rate - compressed_len) :])


@pytest.mark.parametrize("compression", COMPRESSIONS.names())
@torch.no_grad()
def test_rows_at_any_place_decode_as_segments_do(compression):
    decoder = decoder_of(compression, decoder_normalize_before=True, **SIZES[2])
    tokens, read = random_tokens(4, 40), [0, 23, 4, 9]
    state, expected = DecodingState(decoder, 4), whole_segments(decoder, tokens)
    state.read(tokens[:, :23], read)
    for _ in range(16):
        features = state.read(torch.stack([tokens[row, n] for row, n in enumerate(read)]).unsqueeze(1))
        for row, n in enumerate(read):
            torch.testing.assert_close(features[row, 0], expected[row, n], rtol=0, atol=1e-9)
        read = [n + 1 for n in read]


def test_a_fused_backend_gives_the_same():
    pytest.importorskip("triton", reason="the fused backend needs Triton")
    tokens, found = random_tokens(1, 16).to(DEVICE), []
    for backend in ("eager", "fused"):
        decoder = decoder_of(attention_backend=backend, dtype=torch.float32, **SIZES[3]).to(DEVICE).train()
        passages = list(read_by_segments(decoder, tokens))
        loss = sum(p.features.square().sum() + p.losses[LOSS] for p in passages)
        found.append(
            (torch.cat([p.features for p in passages], 1), *torch.autograd.grad(loss, decoder.memory.parameters()))
        )
    for fused, eager in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-4 * float(eager.abs().max()))


def test_a_convolution_with_a_hook_is_called():
    one, old, seen = COMPRESSIONS["conv"](3, 5), torch.randn(2, 6, 5), []
    expected = one(old)
    one.conv.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(one(old), expected)
    torch.testing.assert_close(seen[0].transpose(1, 2), expected)


@pytest.mark.parametrize("compression", COMPRESSIONS.names())
def test_recomputed_activations_compress_the_same(compression):
    found = []
    for recomputed in (False, True):
        decoder = decoder_of(compression, checkpoint_activations=recomputed, **SIZES[0]).train()
        passages = list(read_by_segments(decoder, random_tokens(2, 20)))
        loss = sum(p.features.square().sum() + sum(p.losses.values()) for p in passages)
        found.append([*passages[-1].state.tensors(), *torch.autograd.grad(loss, list(decoder.layers.parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("compression", "loss"), KINDS)
def test_half_precision(compression, loss, dtype):
    decoder = decoder_of(compression, loss, dtype=dtype, **SIZES[0]).train()
    *_, passage = read_by_segments(decoder, random_tokens(2, 20))
    assert {t.dtype for t in passage.state.tensors()} == {dtype}
    assert {t.dtype for t in passage.losses.values()} <= {torch.float32}
    watched = attention.usage(*torch.ones(2, 1, 1, 3, 2, dtype=dtype), attention.RelativeBias(), None, slice(0, 3))
    assert watched.dtype == torch.float32
    torch.testing.assert_close(watched, torch.tensor([[11 / 18, 5 / 18, 1 / 9]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compressed_len": -1}, r"--compressed-len is -1, .*or 0"),
        ({"compression_rate": 1}, r"--compression-rate is 1, .*at least 2.*--memory recurrent"),
        ({"compression_rate": 6, "mem_len": 4}, r"--mem-len 4 is too short for --compression-rate 6.*--mem-len 5"),
        ({"compression": "zip"}, r"unknown --compression 'zip'; .*conv, .*most-used"),
        (
            {"compression_loss": "l1"},
            r"unknown --compression-loss 'l1'; .*attention-reconstruction, auto-encoding, none",
        ),
        (
            {"compression_loss": "none"},
            r"--compression conv has weights, .*pass one of attention-reconstruction, auto-enc",
        ),
        ({"compression_loss_weight": 0.0}, r"--compression-loss-weight is 0.0, it must be positive"),
        ({"position_encoding": "absolute"}, r"--position-encoding absolute numbers the tokens of one segment"),
        ({"position_encoding": "disentangled"}, r"take transformer-xl"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(options, message):
    chosen = {"memory": "compressive", "position_encoding": "transformer-xl", "segment_length": 4, **options}
    with pytest.raises(ValueError, match=message):
        LanguageModel(config_of(17, **chosen))
