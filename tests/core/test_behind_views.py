"""Nothing is read from behind a view: with NaN there in place of zeros, every memory computes the same bits.

Behind a view is the rest of a wider or longer buffer, the memory of a new buffer that nobody has written yet, and in a
cache every column that no token of a row may see. Without a GPU, kernels run in Triton's interpreter.
"""

import math

import pytest
import torch
from torch.utils._pytree import tree_map_only

from lamemo_fairseq.core import MEMORIES
from lamemo_fairseq.core.attention import Operation
from lamemo_fairseq.core.decoding.state import DecodingState
from lamemo_fairseq.core.decoding.step import kernel_step
from lamemo_fairseq.core.kernels import aligned, rows
from lamemo_fairseq.core.kernels.padded import PaddedRows
from lamemo_fairseq.core.layers import layer

from ..gpus import DEVICE
from .helpers import SEVERAL, VARIANTS, first_of_each_memory, random_tokens, tiny_decoder

SEGMENTS = (17, 5, 17, 1)  # the first one finds an empty memory
# Odd widths, and a memory of odd length that is full only after some segments.
SIZES = {
    "segment_length": 17,
    "mem_len": 23,
    "store_len": 29,
    "decoder_embed_dim": 10,
    "decoder_attention_heads": 2,
    "decoder_ffn_embed_dim": 9,
    "dropout": 0.2,
}
FIRST = first_of_each_memory()
SCHEDULES = [variant for variant in VARIANTS if variant[2] in SEVERAL]
# Memories with all their positions.
MODELS = [*{variant[:2]: variant for variant in reversed(VARIANTS)}.values(), *SCHEDULES]
EMPTY = [variant for name, variant in FIRST.items() if MEMORIES[name].smallest_mem_len == 0]


class _Behind(torch.autograd.Function):
    """A view of a buffer that holds *value* everywhere else; of its gradient another."""

    @staticmethod
    def forward(ctx, tensor, value):
        ctx.value = value
        return in_the_midst(tensor, value).detach()

    @staticmethod
    def backward(ctx, grad):
        return in_the_midst(grad, ctx.value), None


def in_the_midst(tensor, value):
    """Copy a tensor into a larger buffer. Its rows begin at aligned addresses, so that nothing looks unlike padding."""
    *lead, width = tensor.shape
    buffer = tensor.new_full([*(size + 2 for size in lead), width + -width % 8 + 8], value)
    view = buffer[(*(slice(1, 1 + size) for size in lead), slice(0, width))]
    return view.copy_(tensor)


def views(tree, value, but=()):
    """Replace tensors of floating-point numbers in containers by views; not those of the type *but*."""

    def view(tensor):
        plain = tensor.is_floating_point() and tensor.dim() > 0 and not isinstance(tensor, but)
        return _Behind.apply(tensor, value) if plain else tensor

    return tree_map_only(torch.Tensor, view, tree)


@pytest.fixture
def surrounded(monkeypatch):
    """Return a function that puts *value* behind all that passes between a model's parts, and into new buffers."""
    call, allocate = Operation.__call__, {}
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        allocate[owner, name] = getattr(owner, name)

    def filled(value, function, *args, **kwargs):
        made = function(*args, **kwargs)
        return made.detach().fill_(value) if made.is_floating_point() else made

    def surround(model, value):
        for (owner, name), function in allocate.items():
            monkeypatch.setattr(owner, name, lambda *a, _f=function, **k: filled(value, _f, *a, **k))
        monkeypatch.setattr(
            Operation, "__call__", lambda *args, **kwargs: views(call(*views(args, value), **kwargs), value)
        )
        for part in (model.embed_tokens, model.positions, *model.layers, *(one.self_attn for one in model.layers)):
            # What the package itself has put behind its rows stays there: it must be zeros.
            part.register_forward_pre_hook(lambda _, args: views(args, value, but=PaddedRows))
            part.register_forward_hook(lambda _, args, output: views(output, value))
        return model

    return surround


def model_of(variant, **options):
    sizes = {**SIZES, **({"decoder_head_dim": 6} if variant[1] == "rotary" else {}), **options}
    model = tiny_decoder(variant, **sizes).to(DEVICE)
    for parameter in model.parameters():
        parameter.data.mul_(0.5)  # softmaxes that are not one-hot
    return model


def trained(model, streams, segments, value):
    """Features, losses, states and gradients of *segments*, with the memory carried and handed over as views."""
    torch.manual_seed(0)
    model.train()
    state, results, total = None, [], 0.0
    for n, length in enumerate(segments):
        text = random_tokens(streams, length + 1, seed=n).to(DEVICE)
        before = None if state is None else state.map(lambda t: views(t, value))
        lengths = torch.tensor([5, 2, 0], device=DEVICE) if streams == 3 and length == 5 else None
        features, state, losses = model.read_segment(text[:, :-1], before, lengths)
        loss = sum(losses.values(), model.loss(views(features, value), text[:, 1:])) / text.numel()
        total = total + loss
        results += [features, loss, *losses.values(), *state.tensors()]
    gradients = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    return [t.detach() for t in (*results, *gradients) if t is not None]


def compare(surround, results_of, *args, value=math.nan, **options):
    """Compare the results of two models that are alike, one among zeros and one among *value*."""
    results, others = (results_of(surround(model_of(**options), behind), *args, behind) for behind in (0.0, value))
    for one, other in zip(results, others, strict=True):
        assert other.isfinite().all()
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("variant", "streams", "options"),
    [
        *((variant, 3, {}) for variant in MODELS),
        *((variant, 1, {"decoder_normalize_before": True}) for variant in FIRST.values()),
        *((variant, 3, {"mem_len": 0}) for variant in EMPTY),
    ],
    ids=str,
)
def test_segments_by_plain_operations(variant, streams, options, surrounded):
    compare(surrounded, trained, streams, SEGMENTS, variant=variant, dtype=torch.float32, **options)


@pytest.mark.parametrize("variant", [*FIRST.values(), *SCHEDULES], ids="-".join)
def test_segments_by_kernels(variant, surrounded, monkeypatch):
    """In half precision, where rows and heads are padded."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    if DEVICE == "cpu":
        monkeypatch.setattr(aligned, "matters", lambda x: True)
        for module in (rows, layer):
            monkeypatch.setattr(module, "fusable", lambda t: t.dtype in rows.DTYPES)
    options = {"attention_backend": "fused", "decoder_attention_heads": 1, "dropout": 0.0, "dtype": torch.float16}
    streams = 3 if variant == VARIANTS[0] else 1  # it runs all kernels; more would take the interpreter long
    compare(surrounded, trained, streams, (17, 5), variant=variant, **options)


def hide(state, value):
    """Write *value* into all columns of a cache but those of a sequence's slots and tokens."""
    positions = state.cache.positions
    slots, tokens = (torch.tensor([getattr(p, n) for p in positions], device=DEVICE) for n in ("slots", "tokens"))
    for dim, buffer in state.cache.column_buffers():
        column = torch.arange(buffer.size(dim), device=DEVICE) - state.mem_len
        hidden = (column < -slots[:, None]) | (column >= tokens[:, None])
        hidden = hidden.view([n if i in (0, dim) else 1 for i, n in enumerate(buffer.shape)])
        buffer.masked_fill_(hidden, value if buffer.is_floating_point() else 9)  # or any other word


@torch.no_grad()
def decoded(model, lengths, count, value):
    """Features of prompts, and of tokens one by one; before each, all that is hidden becomes *value*."""
    state, text = DecodingState(model, len(lengths)), random_tokens(len(lengths), max(lengths) + count).to(DEVICE)
    hide(state, value)
    read = state.read(text[:, : max(lengths)], lengths)
    results = [read[b, :length] for b, length in enumerate(lengths)]
    for new in text[:, max(lengths) :].split(1, dim=1):
        hide(state, value)
        results.append(state.read(new))
    return results


@torch.no_grad()
def decoded_by_kernels(model, lengths, value):
    """Features of a token that the kernels read after the prompts, and of the next one, for which it is cached."""
    state, text = DecodingState(model, len(lengths)), random_tokens(len(lengths), max(lengths) + 2).to(DEVICE)
    state.read(text[:, :-2], lengths)
    state.refresh(model.embed_tokens(text[:, -2:-1]), [1] * len(lengths))
    hide(state, value)
    step = kernel_step(state)
    assert step is not None
    found = step(text[:, -2:-1])
    state.cache.advance([1] * len(lengths), state.network)
    hide(state, 0.0)
    return found, state.read(text[:, -1:])


@pytest.mark.parametrize(
    ("variant", "lengths", "value"),
    [
        *((variant, [1, 9, 6], 1e30) for variant in MODELS),
        *((variant, lengths, math.nan) for variant in FIRST.values() for lengths in ([3], [6, 6, 6])),
    ],
    ids=str,
)
def test_tokens_by_plain_operations(variant, lengths, value, surrounded):
    """Where positions differ, products give hidden columns a weight of zero: they must be numbers, but may be any."""
    sizes = {"segment_length": 5, "mem_len": 7, "dtype": torch.float32}
    compare(surrounded, decoded, lengths, 14, variant=variant, value=value, **sizes)


@pytest.mark.parametrize("variant", [*FIRST.values(), *SCHEDULES], ids="-".join)
def test_tokens_by_kernels(variant, surrounded):
    pytest.importorskip("triton", reason="the kernels need Triton")
    sizes = {"segment_length": 5, "mem_len": 7, "dtype": torch.float32}
    compare(surrounded, decoded_by_kernels, [4, 9, 6, 1], variant=variant, **sizes)
