"""The kernels' step against plain operations; without a GPU under Triton's interpreter (TRITON_INTERPRET=1)."""

import copy
import os
from types import SimpleNamespace

import pytest
import torch

from lamemo_fairseq.core import MEMORIES
from lamemo_fairseq.core.decoding import sampler
from lamemo_fairseq.core.decoding.drawing import Adjustment, Draw
from lamemo_fairseq.core.decoding.sampler import Sampler
from lamemo_fairseq.core.decoding.state import DecodingState
from lamemo_fairseq.core.decoding.step import kernel_step

from ..gpus import DEVICE
from .helpers import random_tokens, tiny_decoder

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="no GPU, no interpreter"
)
CHOICES_OF = {"compressive": ["most-used"], "infini": ["delta"], "memorizing": ["top-k", "dense"]}
CHOICES_OF["block-recurrent"] = ["fixed"]
LOOKAHEAD, RECURRENT = ("lookahead", "disentangled", "right"), ("recurrent", "transformer-xl", "right")
LONGEST = 70  # memory
LENGTHS = [17, 79, 38, 58, 3]  # in segments of 20, after 0, 60, 20, 40 and 0 slots


def cached(cache):
    """What a cache holds of its rows' slots and tokens, zeros in the columns between and beyond."""
    columns = torch.arange(cache.layers[0].keys.size(2), device=DEVICE)
    first = columns.new_tensor([LONGEST - position.slots for position in cache.positions])
    end = columns.new_tensor([LONGEST + position.tokens for position in cache.positions])
    others = (columns < first[:, None]) | (columns >= end[:, None])
    found = [cache.tokens, cache.slots]
    for dim, t in cache.column_buffers():
        shape = [t.size(n) if n in (0, dim) else 1 for n in range(t.dim())]
        found.append(t.masked_fill(others.view(shape), 0))
    return found


def steps(decoder, rows, count):
    """Features ``[B, count, d]`` by the kernels and by plain operations."""
    prompts, words = random_tokens(rows, max(LENGTHS)).to(DEVICE), random_tokens(rows, count, seed=5).to(DEVICE)
    plain, kernel = DecodingState(decoder, rows), DecodingState(decoder, rows)
    for state in (plain, kernel):
        state.read(prompts, LENGTHS[:rows])
    step, ones, found, expected = kernel_step(kernel), [1] * rows, [], []
    for new in words.split(1, dim=1):
        kernel.refresh(decoder.embed_tokens(new), ones)
        found.append(step(new))
        kernel.cache.advance(ones, kernel.network)
        expected.append(plain.read(new))
    tolerance = 1e-4 if kernel.cache.layers[0].keys.dtype == torch.float32 else 0.1
    for mine, other in zip(cached(kernel.cache), cached(plain.cache), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=tolerance)  # some normalisers are above 200
    return torch.cat(found, dim=1), torch.cat(expected, dim=1)


@pytest.mark.parametrize(
    ("variant", "rows", "options"),
    [
        (LOOKAHEAD, 1, {}),
        (LOOKAHEAD, 5, {"decoder_layers": 3}),
        (RECURRENT, 3, {"decoder_layers": 1}),
        (LOOKAHEAD, 3, {"decoder_normalize_before": True, "clamp_len": 9}),
        (RECURRENT, 2, {"activation_fn": "gelu", "decoder_input_dim": 6, "decoder_head_dim": 5}),
        (("recurrent", "alibi", "right"), 3, {"decoder_layers": 1}),
        (("recurrent", "shaw", "right"), 2, {"decoder_layers": 1, "same_length": True}),
        (("lookahead", "alibi", "right"), 2, {"same_length": True}),
    ],
    ids=str,
)
@torch.no_grad()
def test_steps_by_the_kernels_are_the_plain_ones(variant, rows, options):
    sizes = {"mem_len": LONGEST, "segment_length": 20, "decoder_embed_dim": 12, **options}
    decoder = tiny_decoder(variant, dtype=torch.float32, **sizes).to(DEVICE)
    # The first row alone comes to the end of its segment in the fourth step, others before.
    found, expected = steps(decoder, rows, 4 if rows == 1 else 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("memory", "choice"), [(name, choice) for name in MEMORIES.names() for choice in CHOICES_OF.get(name, ["right"])]
)
@torch.no_grad()
def test_every_memory_has_the_kernels_step(memory, choice):
    """Over the end of a segment, with slots so few that what a memory keeps of a step decides the next ones."""
    positions = MEMORIES[memory].architecture.defaults.get("position_encoding", "disentangled")
    sizes = {"mem_len": 1, "segment_length": 4, "decoder_embed_dim": 12}
    decoder = tiny_decoder((memory, positions, choice), dtype=torch.float32, **sizes).to(DEVICE)
    prompts, words = random_tokens(2, 10).to(DEVICE), random_tokens(2, 3, seed=5).to(DEVICE)
    plain, kernel = DecodingState(decoder, 2), DecodingState(decoder, 2)
    for state in (plain, kernel):
        state.read(prompts, [10, 7])
    step, ones = kernel_step(kernel), [1, 1]
    assert step is not None
    for new in words.split(1, dim=1):
        kernel.refresh(decoder.embed_tokens(new), ones)
        found = step(new)
        kernel.cache.advance(ones, kernel.network)
        torch.testing.assert_close(found, plain.read(new), rtol=0, atol=1e-4)


@pytest.mark.parametrize("widest", [1024, 8])
@torch.no_grad()
def test_half_precision_is_as_exact_as_plain_operations(widest, monkeypatch):
    """And so are rows too wide to be normalised within a map."""
    monkeypatch.setattr("lamemo_fairseq.core.kernels.row_kernels.WIDEST", widest)
    sizes = {"mem_len": LONGEST, "segment_length": 20, "decoder_embed_dim": 32, "decoder_ffn_embed_dim": 48}
    decoder = tiny_decoder(LOOKAHEAD, dtype=torch.float16, **sizes).to(DEVICE)
    for parameter in decoder.parameters():
        parameter.mul_(0.3)  # softmaxes that are not one-hot
    exact = copy.deepcopy(decoder).double()
    found, plain = steps(decoder, 4, 3)
    prompts, words = random_tokens(4, max(LENGTHS)).to(DEVICE), random_tokens(4, 3, seed=5).to(DEVICE)
    state = DecodingState(exact, 4)
    state.read(prompts, LENGTHS[:4])
    expected = torch.cat([state.read(new) for new in words.split(1, dim=1)], dim=1)
    assert (found.double() - expected).abs().mean() <= 1.1 * (plain.double() - expected).abs().mean()
    assert (found.double() - expected).abs().max() <= 2 * (plain.double() - expected).abs().max()


@torch.no_grad()
def test_a_row_does_not_depend_on_the_others():
    """To the last bit, from four rows on, which are multiplied in tiles; while the columns are split alike."""
    decoder = tiny_decoder(LOOKAHEAD, dtype=torch.float32, mem_len=LONGEST, segment_length=20).to(DEVICE)
    words, states = random_tokens(5, 1, seed=5).to(DEVICE), []
    for rows in (4, 5):
        state = DecodingState(decoder, 5)
        state.read(random_tokens(5, max(LENGTHS)).to(DEVICE), LENGTHS)
        state.reorder(torch.arange(rows, device=DEVICE))
        states.append(kernel_step(state)(words[:rows]))
    assert states[0].equal(states[1][:4])


class Replayed(Sampler):
    """On the host, where there are no graphs."""

    def _record(self, run, warm_up=0):
        return SimpleNamespace(replay=run)


@torch.no_grad()
def test_the_sampler_by_the_kernels_finds_the_most_probable_words(monkeypatch):
    """Across segments, and what is held on the device, collected in parts."""
    monkeypatch.setattr(sampler, "BUFFERED_WORDS", 3)
    decoder = tiny_decoder(LOOKAHEAD, dtype=torch.float32).to(DEVICE)
    prompts, found = random_tokens(2, 8).to(DEVICE), []
    adjust = Adjustment(0.7, torch.linspace(-1, 0, 17, device=DEVICE))
    for kind, graphs in ((Replayed, True), (Sampler, False)):
        state = DecodingState(decoder, 2)
        state.read(prompts[:, :-1], [7, 5])
        going = kind(state, Draw(top_k=1), graphs=graphs, adjust=adjust)
        assert (going._drawing is not None) == graphs
        first = going.go_on(prompts[:, -1], 5)
        found.append((first, going.go_on(first.words[:, -1], 2)))
    for mine, plain in zip(*found, strict=True):
        assert mine.words.equal(plain.words)
        torch.testing.assert_close(mine.log_probs, plain.log_probs, rtol=0, atol=1e-4)
