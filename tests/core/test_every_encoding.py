"""The numbers of every registered position encoding: what holds whatever its formula is.

Shapes: L layers, H heads, D size of a head, U distances, d model width.
"""

import pytest
import torch

from lamemo_fairseq.core.positions import POSITIONS, PositionConfig

from .helpers import looks_ahead

L, H, D, WIDTH, TRAINED = 5, 3, 4, 12, 9
NEAR, FAR = range(-2, 4), range(-6, 12)  # distances to the right and to the left of a slot
LIMIT = 3
FARTHEST = {"shaw": LIMIT - 1}  # as released, so many distances; elsewhere the largest one
every_encoding = pytest.mark.parametrize("name", POSITIONS.names())


def encoding_of(name, clamp_len=0, seed=0):
    """An encoding with parameters that matter, in float64, and whether it takes distances to the right."""
    torch.manual_seed(seed)
    sizes = {"trained_distances": TRAINED, "clamp_len": clamp_len, "sentence_ends": (5,), "paragraph_ends": (6,)}
    config = PositionConfig(L, WIDTH, H, D, looks_ahead=looks_ahead(name), **sizes)
    encoding = POSITIONS[name](config).double().eval()
    for parameter in encoding.parameters():
        torch.nn.init.normal_(parameter)
    return encoding, looks_ahead(name)


def numbers(encoding, causal, ahead, like=None):
    """Every field of every layer as ``[.., U, ..]`` with the distances in front, by name and layer."""
    like = torch.zeros(1, 1, WIDTH, dtype=torch.float64) if like is None else like
    found = {}
    for n, bias in enumerate(encoding(causal, ahead, like)):
        for side, fields in (("causal", bias.causal), ("ahead", bias.ahead)):
            given = {} if fields is None else fields._asdict()
            found |= {(side, field, n): t for field, t in given.items() if t is not None}
        if bias.counted is not None:
            tables = {"past": bias.counted.past, "around": bias.counted.around}
            found |= {("counted", field, n): t.transpose(0, 2) for field, t in tables.items() if t is not None}
    by_distance = ("table", "score")
    return {key: t.transpose(0, 1) if key[1] in by_distance else t for key, t in found.items()}


def rotations(encoding, causal, like):
    """Return the cosines and sines ``[U, D/2]`` of every layer, by name and layer."""
    found = {}
    for n, bias in enumerate(encoding(causal, None, like)):
        if bias.rotation is not None:
            found |= {("rotation", field, n): t for field, t in bias.rotation._asdict().items()}
    return found


def rotated_scores(encoding, causal):
    """Return the scores ``[L', U, U]`` of one query for one key at all positions, for layers that rotate."""
    generator, found = torch.Generator().manual_seed(0), []
    q, k = (torch.randn(D, generator=generator, dtype=torch.float64).expand(1, 1, causal, D) for _ in range(2))
    for bias in encoding(causal, None, q):
        if bias.rotation is not None:
            found.append((bias.rotation.rotate(q) @ bias.rotation.rotate(k).transpose(2, 3))[0, 0])
    return torch.stack(found) if found else q.new_empty(0, causal, causal)


@every_encoding
@torch.no_grad()
def test_a_distance_has_the_same_numbers_in_every_segment(name):
    encoding, both_sides = encoding_of(name)
    longer = numbers(encoding, 2 * TRAINED, FAR if both_sides else None)
    shorter = numbers(encoding, TRAINED, NEAR if both_sides else None)
    assert longer.keys() == shorter.keys()
    for (side, field, n), few in shorter.items():
        many = longer[side, field, n]
        if field in ("table", "score"):
            first = NEAR.start - FAR.start if side == "ahead" else TRAINED
            many = many[first : first + len(few)]
        elif side == "counted":
            first = (len(many) - len(few)) // 2 if field == "around" else 0
            many = many[first : first + len(few)]
        torch.testing.assert_close(few, many, rtol=0, atol=1e-12, msg=f"{side}.{field} of layer {n}")
    by_position = rotated_scores(encoding, 2 * TRAINED)
    torch.testing.assert_close(by_position[:, 1:, 1:], by_position[:, :-1, :-1], rtol=0, atol=1e-9)
    fewer = rotated_scores(encoding, TRAINED)
    torch.testing.assert_close(fewer, by_position[:, :TRAINED, :TRAINED], rtol=0, atol=1e-9)


@every_encoding
@torch.no_grad()
def test_distances_beyond_the_limit_are_one(name):
    """And nearer ones are as they are without the limit; or the option is refused by name."""
    farthest = FARTHEST.get(name, LIMIT)
    try:
        limited, both_sides = encoding_of(name, clamp_len=LIMIT)
    except ValueError as error:
        assert "--clamp-len" in str(error)
        return
    ahead = FAR if both_sides else None
    free, found = numbers(encoding_of(name)[0], TRAINED, ahead), numbers(limited, TRAINED, ahead)
    for (side, field, n), clamped in found.items():
        plain, what = free[side, field, n], f"{side}.{field} of layer {n}"
        if field in ("table", "score"):
            distances = torch.tensor(list(FAR) if side == "ahead" else list(range(TRAINED - 1, -1, -1)))
        elif side == "counted":
            distances = torch.arange(len(clamped)) - (len(clamped) // 2 if field == "around" else 0)
        else:
            distances = torch.zeros(len(clamped))
        within = distances.abs() <= farthest
        torch.testing.assert_close(clamped[within], plain[within], rtol=0, atol=1e-12, msg=what)
        if side == "causal":
            beyond, last = clamped[distances > farthest], clamped[distances == farthest]
            torch.testing.assert_close(beyond, last.expand_as(beyond) if len(beyond) else beyond, msg=what)
    x = torch.zeros(1, TRAINED, WIDTH, dtype=torch.float64)
    assert len(limited.embed(x)[0].unique(dim=0)) <= LIMIT + 1


@every_encoding
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_far_distances_are_right_in_half_precision(name, dtype):
    """Neither type has all whole numbers up to the farthest distance; numbers are computed wider, then rounded."""
    encoding, both_sides = encoding_of(name)
    for parameter in encoding.parameters():
        parameter.copy_(parameter.to(dtype))
    ahead = range(-3000, 3001) if both_sides else None
    wide, half = (torch.zeros(1, 1, WIDTH, dtype=of) for of in (torch.float64, dtype))
    exact = numbers(encoding, 3001, ahead, wide) | rotations(encoding, 3001, wide)
    rough = numbers(encoding.to(dtype), 3001, ahead, half) | rotations(encoding, 3001, half)
    for key, expected in exact.items():
        assert rough[key].dtype == dtype or key[0] == "rotation", key
        within = expected.abs() < torch.finfo(dtype).max / 2
        error = (rough[key].double() - expected)[within].abs() / expected[within].abs().clamp(min=1)
        assert error.max() < 16 * torch.finfo(dtype).eps, key


@every_encoding
def test_a_layer_has_its_own_row_of_parameters(name):
    """Those that have a row a layer: the same row for distances to the left and to the right."""
    encoding, both_sides = encoding_of(name)
    found = numbers(encoding, 2 * TRAINED, FAR if both_sides else None)
    of_layers = [(key, p) for key, p in encoding.named_parameters() if p.size(0) == L]
    for (side, field, n), tensor in found.items():
        if not tensor.requires_grad:
            continue
        weight = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(n), dtype=tensor.dtype)
        gradients = torch.autograd.grad(tensor, [p for _, p in of_layers], weight, retain_graph=True, allow_unused=True)
        for (parameter, _), gradient in zip(of_layers, gradients, strict=True):
            rows = [] if gradient is None else gradient.flatten(1).any(1).nonzero().flatten().tolist()
            assert rows in ([], [n]), f"{side}.{field} of layer {n} depends on the rows {rows} of {parameter}"
