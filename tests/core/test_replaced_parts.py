"""Parts of a layer that a user replaces, or hangs hooks on, are called: adapters, pruned or watched layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lamemo_fairseq.core.decoding.state import DecodingState
from lamemo_fairseq.core.decoding.step import kernel_step
from lamemo_fairseq.core.kernels import aligned, residual, rows
from lamemo_fairseq.core.layers import layer

from ..gpus import DEVICE
from .helpers import VARIANTS, random_tokens, read_by_token, read_streams, tiny_decoder

MAPS = ("self_attn.qkv_proj", "self_attn.out_proj", "feed_forward.fc1", "feed_forward.fc2")
PARTS = (
    *MAPS, "self_attn_layer_norm", "final_layer_norm", "dropout", "feed_forward", "feed_forward.activation_dropout",
)  # fmt: skip


@pytest.fixture(params=["plain", "kernels"])
def by(request, monkeypatch):
    """Which operations the layers take between their products; without a GPU, kernels in Triton's interpreter."""
    if request.param == "kernels":
        pytest.importorskip("triton", reason="the kernels need Triton")
    for owner in (rows, layer):
        monkeypatch.setattr(owner, "fusable", lambda t: request.param == "kernels" and t.dtype in rows.DTYPES)
    return request.param


class LowRank(nn.Module):
    """An adapter around a linear layer, of which it keeps only what its call needs."""

    def __init__(self, around):
        super().__init__()
        self.around = around
        self.down = nn.Parameter(0.3 * torch.randn(2, around.in_features).to(around.weight))
        self.up = nn.Parameter(0.3 * torch.randn(around.out_features, 2).to(around.weight))

    def forward(self, x):
        return self.around(x) + F.linear(F.linear(x, self.down), self.up)

    def merged(self):
        """A linear layer that computes the same."""
        self.around.weight.data += self.up @ self.down
        return self.around


def replaced(decoder, path, make):
    """Put ``make(part)`` in place of a part of every layer."""
    owner, _, name = path.rpartition(".")
    for one in decoder.layers:
        holder = one.get_submodule(owner)
        setattr(holder, name, make(getattr(holder, name)))


# Maps of a memory's own.
OWN = {"continuous": [f"self_attn.{name}" for name in ("long_term_k_proj", "long_term_v_proj", "density_proj")]}
EVERY = [(variant, path) for variant in VARIANTS for path in (*MAPS, *OWN.get(variant[0], ()))]


@pytest.mark.parametrize(("variant", "path"), EVERY, ids=lambda part: part if isinstance(part, str) else "-".join(part))
@torch.no_grad()
def test_an_adapter_is_what_its_merged_weights_are(variant, path):
    """Read in segments, and token by token."""
    decoder, tokens, found = tiny_decoder(variant), random_tokens(2, 11), []
    before = read_streams(decoder, tokens)
    for make in (LowRank, LowRank.merged):
        replaced(decoder, path, make)
        found.append(torch.cat([read_streams(decoder, tokens), read_by_token(decoder, tokens[:, :8], first=6)], dim=1))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)
    assert (found[0][:, :11] - before).abs().max() > 1e-3


@pytest.mark.parametrize("path", MAPS)
@pytest.mark.parametrize("before", [False, True])
def test_an_adapter_learns(by, path, before):
    """Outputs and gradients with widths that padding makes wider, in training, by plain operations and kernels."""
    options = {"decoder_embed_dim": 10, "decoder_head_dim": 5, "decoder_ffn_embed_dim": 13}
    decoder = tiny_decoder(dtype=torch.float32, decoder_normalize_before=before, **options).to(DEVICE).train()
    tokens = random_tokens(2, 6).to(DEVICE)
    replaced(decoder, path, LowRank)
    adapters = [part for part in decoder.modules() if isinstance(part, LowRank)]
    found = read_streams(decoder, tokens)
    grads = torch.autograd.grad(found.square().mean(), [t for a in adapters for t in (a.up, a.down, a.around.weight)])
    replaced(decoder, path, LowRank.merged)
    merged = read_streams(decoder, tokens)
    weights = [a.around.weight for a in adapters]
    wanted = torch.autograd.grad(merged.square().mean(), weights)
    torch.testing.assert_close(found, merged, rtol=1e-4, atol=1e-4)
    for n, (adapter, grad) in enumerate(zip(adapters, wanted, strict=True)):
        expected = (grad @ adapter.down.T, adapter.up.T @ grad, grad)
        for mine, other in zip(grads[3 * n : 3 * n + 3], expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=2e-3, atol=1e-3 * other.abs().max().item())


@pytest.mark.parametrize("path", PARTS)
@pytest.mark.parametrize("before", [False, True])
def test_hooks_are_called_and_change_nothing(by, path, before):
    # In float64, where operations in another order differ by less than any fault; the kernels have float32.
    dtype, tolerance = (torch.float64, 1e-10) if by == "plain" else (torch.float32, 1e-5)
    decoder = tiny_decoder(dtype=dtype, decoder_normalize_before=before).to(DEVICE).train()
    tokens, calls = random_tokens(2, 6).to(DEVICE), []
    expected = read_streams(decoder, tokens)
    for one in decoder.layers:
        one.get_submodule(path).register_forward_hook(lambda part, given, output: calls.append(given[0].shape[-1]))
    torch.testing.assert_close(read_streams(decoder, tokens), expected, rtol=tolerance, atol=tolerance)
    # Two layers, two segments; dropout stands behind attention and feed-forward, its input without padding.
    assert len(calls) == (8 if path == "dropout" else 4)
    assert set(calls) == {12 if path in ("feed_forward.fc2", "feed_forward.activation_dropout") else 8}


class Doubled(nn.Dropout):
    def forward(self, x):
        return x * (1 + torch.arange(x.shape[-1], device=x.device) % 2)


def test_another_dropout_sees_no_padding(by, monkeypatch):
    """Of rows that products made wider, as in half precision on a GPU."""
    monkeypatch.setattr(aligned, "matters", lambda x: True)
    decoder = tiny_decoder(dtype=torch.float32, decoder_ffn_embed_dim=13).to(DEVICE).train()
    widths = []
    for path in ("dropout", "feed_forward.activation_dropout"):
        replaced(decoder, path, lambda part: Doubled(part.p))
        decoder.layers[0].get_submodule(path).register_forward_hook(lambda _, given, out: widths.append(out.shape[-1]))
    read_streams(decoder, random_tokens(2, 3).to(DEVICE))
    assert set(widths) == {8, 13}


@pytest.mark.parametrize("path", ["self_attn.qkv_proj", "self_attn.out_proj"])
@torch.no_grad()
def test_a_linear_layer_may_have_a_bias_that_its_former_lacked(path):
    decoder, tokens = tiny_decoder(), random_tokens(2, 7)
    found = []
    for wrap in (lambda part: part, nn.Sequential):
        one = copy.deepcopy(decoder)
        replaced(one, path, lambda part, wrap=wrap: wrap(biased(part)))
        found.append(torch.cat([read_streams(one, tokens), read_by_token(one, tokens, first=5)], dim=1))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)
    assert (found[0][:, :7] - read_streams(decoder, tokens)).abs().max() > 1e-3


def biased(part):
    made = nn.Linear(part.in_features, part.out_features, dtype=part.weight.dtype)
    made.weight = part.weight
    made.bias.copy_(torch.arange(part.out_features))
    return made


@pytest.mark.parametrize("path", ["dropout", "feed_forward.activation_dropout"])
@torch.no_grad()
def test_another_dropout_is_called(by, path):
    decoder, tokens = tiny_decoder(dtype=torch.float32).to(DEVICE).train(), random_tokens(2, 3).to(DEVICE)
    before = read_streams(decoder, tokens)
    replaced(decoder, path, lambda part: Doubled(part.p))
    assert (read_streams(decoder, tokens) - before).abs().max() > 1e-3


@pytest.mark.parametrize("path", PARTS)
def test_generation_leaves_layers_with_other_parts_to_plain_operations(path):
    pytest.importorskip("triton", reason="the kernels need Triton")
    decoder = tiny_decoder(dtype=torch.float32).to(DEVICE)
    assert kernel_step(DecodingState(decoder, 1)) is not None
    hook = decoder.layers[1].get_submodule(path).register_forward_hook(lambda *_: None)
    assert kernel_step(DecodingState(decoder, 1)) is None
    hook.remove()
    assert kernel_step(DecodingState(decoder, 1)) is not None


@pytest.mark.parametrize(
    ("path", "make"),
    [
        ("self_attn.qkv_proj", LowRank),
        ("self_attn.out_proj", lambda part: nn.Linear(part.in_features, part.out_features)),
        ("feed_forward.fc1", nn.Sequential),
        ("final_layer_norm", lambda part: nn.LayerNorm(8, elementwise_affine=False)),
        ("self_attn_layer_norm", lambda part: nn.LayerNorm(8, bias=False)),
        ("dropout", lambda part: Doubled(part.p)),
        ("feed_forward.activation_dropout", lambda part: nn.Dropout(0.5).train()),
    ],
)
def test_generation_by_kernels_is_for_parts_that_they_know(path, make):
    pytest.importorskip("triton", reason="the kernels need Triton")
    decoder = tiny_decoder(dtype=torch.float32).to(DEVICE)
    replaced(decoder, path, make)
    assert kernel_step(DecodingState(decoder.to(DEVICE), 1)) is None


def test_kernels_serve_where_nothing_is_replaced(by, monkeypatch):
    """Or the tests above would compare plain operations with themselves."""
    calls = []
    for name in ("by_kernel", "plain"):
        function = getattr(residual, name)
        monkeypatch.setattr(residual, name, lambda *a, _f=function, **k: calls.append(_f.__name__) or _f(*a, **k))
    decoder = tiny_decoder(dtype=torch.float32).to(DEVICE).train()
    read_streams(decoder, random_tokens(2, 3).to(DEVICE))
    assert set(calls) == {"by_kernel" if by == "kernels" else "plain"}
