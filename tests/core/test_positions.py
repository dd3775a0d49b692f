"""Position encodings that add a score alone or rotate: against their papers' formulas, pair by pair, in float64.

Shapes: B streams, H heads, R rows (m memory rows, then current ones), D size of a head, d model width.
"""

import math
import sys
from pathlib import Path

import pytest
import torch

import lamemo_fairseq.core.positions as positions_package
from lamemo_fairseq.core.memory.lookahead import WINDOWS
from lamemo_fairseq.core.positions import POSITIONS, PositionConfig
from lamemo_fairseq.core.positions.alibi import slopes

from .helpers import looks_ahead, random_tokens, tiny_decoder

H, D, WIDTH = 3, 4, 6


def encoding_of(name, heads=H, clamp_len=0):
    return POSITIONS[name](
        PositionConfig(2, WIDTH, heads, D, looks_ahead=True, trained_distances=9, clamp_len=clamp_len)
    )


def paper_slopes(n):
    """As in the paper's repository, ofirpress/attention_with_linear_biases."""
    if math.log2(n).is_integer():
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]
    closest = 2 ** math.floor(math.log2(n))
    return paper_slopes(closest) + paper_slopes(2 * closest)[0::2][: n - closest]


def alibi_score(q, k, i, j, head, clamp_len):
    """Press et al. 2022, section 3; the distance to the right counts as that to the left."""
    distance = min(abs(i - j), clamp_len or 99)
    return q @ k / math.sqrt(D) - paper_slopes(H)[head] * distance


def rotation(position):
    """Su et al. 2021, equation 15, entry by entry."""
    matrix = torch.zeros(D, D, dtype=torch.float64)
    for pair in range(D // 2):
        angle = position * 10000 ** (-2 * pair / D)
        turn = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        matrix[2 * pair : 2 * pair + 2, 2 * pair : 2 * pair + 2] = torch.tensor(turn, dtype=torch.float64)
    return matrix


def rotary_score(q, k, i, j, head, clamp_len):
    """Su et al. 2021, equation 16, at positions far from those of the rows: differences alone matter."""
    return (rotation(i + 70) @ q) @ (rotation(j + 70) @ k) / math.sqrt(D)


SCORES = {"alibi": alibi_score, "rotary": rotary_score}
CASES = [
    pytest.param(name, span, clamp_len, id=f"{name}-{span}-{clamp_len}")
    for name, span, clamp_len in [
        ("alibi", None, 0),
        ("alibi", 3, 0),
        ("alibi", None, 2),
        ("rotary", None, 0),
        ("rotary", 3, 0),
    ]
]


def attended(name, q, k, v, seen, clamp_len=0):
    """Read-outs ``[B, H, Q, D]`` and normalisers of queries at ``i``, given as ``(row, position)``."""
    output, normalizer = [], []
    for b in range(q.size(0)):
        for h in range(H):
            for row, i in enumerate(seen):
                scores = torch.stack([SCORES[name](q[b, h, row], k[b, h, j], i, j, h, clamp_len) for j in seen[i]])
                output.append(scores.softmax(0) @ v[b, h, list(seen[i])])
                normalizer.append(scores.logsumexp(0))
    return torch.stack(output).view_as(q), torch.stack(normalizer).view(q.shape[:3])


def heads_of(attention, rows):
    """Queries, keys and values ``[B, H, R, D]`` by the projection's weight, written out."""
    q, k, v = (rows @ attention.qkv_proj.weight.T).view(*rows.shape[:2], 3, H, D).unbind(2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def assert_same(found, expected, inputs):
    """Output and gradients of a random weighting of it."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    for mine, right in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-11)


def decoder_of(memory, name, **options):
    sizes = {"decoder_embed_dim": WIDTH, "decoder_attention_heads": H, "decoder_head_dim": D, **options}
    return tiny_decoder((memory, name, "full"), **sizes)


@pytest.mark.parametrize(("name", "span", "clamp_len"), CASES)
def test_current_rows_attend_to_memory_and_themselves(name, span, clamp_len):
    mem_len = 3
    decoder = decoder_of("recurrent", name, mem_len=mem_len, clamp_len=clamp_len, same_length=span is not None)
    attention, slots, current = decoder.layers[0].self_attn, 5, 4
    rows = torch.randn(2, slots + current, WIDTH, dtype=torch.float64, requires_grad=True)
    found, _ = attention(rows, decoder.positions(slots + current, None, rows)[0], current)
    q, k, v = heads_of(attention, rows)
    seen = {i: range(0 if span is None else i + 1 - span, i + 1) for i in range(slots, slots + current)}
    output, _ = attended(name, q[:, :, slots:], k, v, seen, clamp_len)
    expected = output.transpose(1, 2).flatten(2) @ attention.out_proj.weight.T
    assert_same(found, expected, [rows, *attention.parameters()])


@pytest.mark.parametrize("window", ["right", "full"])
@pytest.mark.parametrize(("name", "clamp_len"), [("alibi", 0), ("alibi", 2), ("rotary", 0)])
def test_slots_look_ahead(name, clamp_len, window):
    decoder = decoder_of("lookahead", name, clamp_len=clamp_len)
    attention, slots, current = decoder.layers[0].self_attn, 5, 3
    keys = WINDOWS[window](slots, current)
    rows = torch.randn(2, slots + current, WIDTH, dtype=torch.float64, requires_grad=True)
    bias = decoder.positions(slots + current, keys.distances(slots), rows)[0]
    nothing = type(attention.causal(*heads_of(attention, rows), bias, True))(
        rows.new_zeros(2, H, slots, D), rows.new_full((2, H, slots), -math.inf)
    )
    found, carried = attention(rows, bias, keys, nothing, current)
    q, k, v = heads_of(attention, rows)
    seen = {
        i: [j for j in range(keys.first, slots + 1) if window == "full" or j > i] if i < slots else range(i + 1)
        for i in range(slots + current)
    }
    output, normalizer = attended(name, q, k, v, seen, clamp_len)
    expected = output.transpose(1, 2).flatten(2) @ attention.out_proj.weight.T
    assert_same(found, expected, [rows, *attention.parameters()])
    torch.testing.assert_close(carried.normalizer, normalizer[:, :, -4:], rtol=0, atol=1e-11)


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 20])
def test_slopes(heads):
    torch.testing.assert_close(slopes(heads, torch.float64).tolist(), paper_slopes(heads), rtol=1e-14, atol=0)


def test_scores_without_parameters_need_no_gradient():
    bias = encoding_of("alibi")(4, range(-1, 3), torch.zeros(1, requires_grad=True))[0]
    for score in (bias.causal.score, bias.ahead.score):
        assert not score.requires_grad and score.shape == (H, 4)
    assert not list(encoding_of("alibi").parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"decoder_head_dim": 5},
            r"rotary rotates pairs .* a head has 5: pass an even --decoder-head-dim",
        ),
        ({"clamp_len": 9}, r"--clamp-len 9 clamps distances, .* rotary .*: pass --clamp-len 0, or another encoding"),
    ],
)
def test_rotary_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_decoder(("recurrent", "rotary", "right"), **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_padded_heads_rotate_as_their_own_numbers(dtype):
    """And zeros behind them stay zeros; the norm stays what it was."""
    heads = torch.randn(2, H, 5, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    rotation = encoding_of("rotary")(9, None, heads)[0].rotation
    rotated = rotation.rotate(heads, 2)
    wide = rotation.rotate(torch.nn.functional.pad(heads, (0, 8 - D)), 2)
    assert rotated.dtype == dtype and wide[..., :D].equal(rotated) and not wide[..., D:].any()
    torch.testing.assert_close(rotated.norm(dim=-1), heads.norm(dim=-1))
    chosen = rotation.at(torch.arange(2, 7).expand(2, 5)).rotate(heads)
    assert chosen.equal(rotated)


def test_penalties_of_half_precision_are_finite():
    bias = encoding_of("alibi", heads=32)(200_000, None, torch.zeros(1, dtype=torch.float16))[0]
    assert bias.causal.score.isfinite().all() and bias.causal.score[0, 0] < -30_000


def test_encodings_are_found_automatically():
    """Each module of the folder is imported with the package, and nothing names it."""
    folder = Path(positions_package.__file__).parent
    names = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert {"base", "alibi", "shaw", "sinusoidal"} <= names
    assert all(f"{positions_package.__name__}.{name}" in sys.modules for name in names)
    assert not names & set((folder / "__init__.py").read_text().replace(".base", "").split())


@pytest.mark.parametrize("name", POSITIONS.names())
def test_biases_of_a_shape_are_computed_once_while_parameters_stay(name):
    ahead = range(3) if looks_ahead(name) else None
    config = PositionConfig(2, WIDTH, 2, D, looks_ahead=ahead is not None, trained_distances=9, sentence_ends=(5,))
    encoding, like, requests = POSITIONS[name](config).eval(), torch.zeros(1), [(5, ahead), (7, None), (8, None)]
    fresh = [encoding.biases(*request, like) for request in requests]
    with torch.no_grad(), encoding.unchanged():
        first = encoding(*requests[0], like)
        assert encoding(*requests[0], like) is first
        for request, expected in zip(requests, fresh, strict=True):
            for one, other in zip(encoding(*request, like), expected, strict=True):
                pairs = zip(tensors_of(one), tensors_of(other), strict=True)
                assert all(torch.equal(found, wanted) for found, wanted in pairs)
        assert encoding(*requests[0], like) is not first  # only the last shapes are kept
        first = encoding(*requests[0], like)
        with torch.enable_grad():
            assert encoding(*requests[0], like) is not first
        assert encoding.train()(*requests[0], like) is not first
        encoding.eval()
        with encoding.unchanged():
            assert encoding(*requests[0], like) is not first
        assert encoding(*requests[0], like) is first
    with torch.no_grad():
        assert encoding(*requests[0], like) is not first


def tensors_of(bias):
    """All tensors of a layer's bias."""
    found = []
    for part in bias:
        parts = part if isinstance(part, tuple) else [part] if isinstance(part, torch.Tensor) else []
        found += [tensor for tensor in parts if isinstance(tensor, torch.Tensor)]
    return found


@pytest.mark.parametrize("clamp_len", [0, 2])
def test_distances_to_clamp_are_a_tensor(clamp_len):
    """A range, as `biases` gets it, is refused with and without a limit."""
    encoding = encoding_of("alibi", clamp_len=clamp_len)
    with pytest.raises(TypeError, match=r"takes a tensor of distances, not a range: make it one first$"):
        encoding._clamp(range(3))
    assert encoding._clamp(torch.arange(4)).tolist() == ([0, 1, 2, 2] if clamp_len else [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        (
            "alibi",
            lambda b: causal(b, score=b.causal.score[:1]),
            r"causal.score is \[1, 7\]: return \[H, U\], which is \[2, 7",
        ),
        (
            "alibi",
            lambda b: causal(b, score=b.causal.score[:, 1:]),
            r"causal.score is \[2, 6\]: return \[H, U\], which",
        ),
        (
            "alibi",
            lambda b: causal(b, content=torch.zeros(4)),
            r"causal.content is \[4\]: return \[H, D\], which is \[2, 4",
        ),
        (
            "alibi",
            lambda b: b._replace(ahead=b.causal),
            r"ahead.score is \[2, 7\]: return \[H, U\], which is \[2, 4\] here",
        ),
        (
            "rotary",
            lambda b: rotated(b, b.rotation.cos[1:]),
            r"rotation.cos is \[6, 2\]: return \[U, D/2\], which is \[7, 2",
        ),
    ],
)
@torch.no_grad()
def test_biases_of_a_wrong_shape(variant, change, message, monkeypatch):
    """A score of one head for all would be right by one backend and wrong by another."""
    kind = POSITIONS[variant]

    class Changed(kind):
        def biases(self, causal, ahead, like):
            biases = kind.biases(self, causal, ahead, like)
            return [change(bias) if causal == 7 else bias for bias in biases]

    monkeypatch.setitem(POSITIONS._entries, variant, Changed)
    model, tokens = tiny_decoder(("lookahead", variant, "right")), random_tokens(1, 3)
    _, state, _ = model(tokens)
    _, state, _ = model(tokens, state)
    with pytest.raises(ValueError, match=f"^Changed.biases: {message}"):
        model(tokens, state)


def causal(bias, **fields):
    return bias._replace(causal=bias.causal._replace(**fields))


def rotated(bias, cos):
    return bias._replace(rotation=bias.rotation._replace(cos=cos))


def test_biases_of_another_number_of_layers(monkeypatch):
    monkeypatch.setattr(POSITIONS["alibi"], "biases", lambda *request: [])
    with pytest.raises(ValueError, match=r"^AlibiPositions.biases returned 0 biases: return one for each of 2 layers$"):
        tiny_decoder(("recurrent", "alibi", "right"))(random_tokens(1, 3))
