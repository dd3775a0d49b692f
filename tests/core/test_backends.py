"""Which attention backend a name means."""

import logging

import pytest
import torch

from lamemo_fairseq.core.attention import BACKENDS, RelativeBias, choice

from ..gpus import DEVICE
from .helpers import random_tokens, tiny_decoder


def rows(dtype=torch.float32, size=4, device="cpu"):
    return [torch.randn(1, 2, 3, size, dtype=dtype, device=device) for _ in range(3)]


def test_auto_is_eager_without_a_gpu_and_says_so_once(caplog):
    choice._tell.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            found = BACKENDS["auto"].causal_attention(*rows(), RelativeBias())
    assert torch.isfinite(found.output).all()
    told = [r.getMessage() for r in caplog.records]
    assert told == ["--attention-backend auto: eager, as the fused backend is for GPUs, and this is cpu"]


@pytest.mark.parametrize(
    ("dtype", "size", "reason"),
    [(torch.float64, 4, "torch.float64"), (torch.float32, 129, "heads up to 128, and these are 129")],
)
def test_fused_by_name_never_falls_back(dtype, size, reason):
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=f"--attention-backend fused cannot run here.*{reason}.*auto or eager"):
        BACKENDS["fused"].causal_attention(*rows(dtype, size, DEVICE), RelativeBias())


def test_fused_by_name_needs_a_gpu(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    decoder = tiny_decoder(attention_backend="fused", dtype=torch.float32)
    with pytest.raises(ValueError, match="it runs on GPUs, and this is cpu"):
        decoder(random_tokens(1, 3))


def test_fused_by_name_needs_triton(monkeypatch):
    monkeypatch.setattr(choice, "_has_triton", lambda: False)
    with pytest.raises(ValueError, match="pip install triton"):
        BACKENDS["fused"].causal_attention(*rows(), RelativeBias())
