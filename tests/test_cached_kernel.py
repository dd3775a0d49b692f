"""The decoding kernels against plain operations; without a GPU under Triton's interpreter (TRITON_INTERPRET=1)."""

import os

import pytest
import torch

from lamemo_fairseq.generation.step import kernel_step
from lamemo_fairseq.models.incremental import DecodingState

from .helpers import random_tokens, tiny_decoder

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1", reason="no GPU, no interpreter"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("rows", [1, 3, 5])
@pytest.mark.parametrize("variant", [("lookahead", "disentangled", "right"), ("recurrent", "transformer-xl", "right")])
@torch.no_grad()
def test_steps_by_the_kernels_are_the_plain_ones(variant, rows):
    decoder = tiny_decoder(variant, dtype=torch.float32, mem_len=70, tokens_per_sample=20, decoder_embed_dim=12)
    decoder.to(DEVICE)
    prompts = random_tokens(rows, 60).to(DEVICE)
    lengths = [7 + (23 * row) % 50 for row in range(rows)]
    plain, kernel = DecodingState(decoder, rows), DecodingState(decoder, rows)
    for state in (plain, kernel):
        state.read(prompts, lengths)
    step, ones = kernel_step(kernel), [1] * rows
    for column in random_tokens(rows, 30, seed=5).to(DEVICE).T:
        new = column.unsqueeze(1)
        kernel.open(decoder.embed_tokens(new), ones)
        found = step(new)
        kernel.cache.advance(ones, kernel.network)
        torch.testing.assert_close(found, plain.read(new), rtol=0, atol=1e-4)
