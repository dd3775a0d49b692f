"""Which attention backend a name means."""

import logging

import pytest
import torch

from lamemo_fairseq.core.attention import Attended, Operation, RelativeBias, causal_attention, choice

from ..gpus import DEVICE
from .helpers import random_tokens, tiny_decoder


def rows(dtype=torch.float32, size=4, device="cpu"):
    return [torch.randn(1, 2, 3, size, dtype=dtype, device=device) for _ in range(3)]


def test_auto_is_blocked_without_a_gpu_and_says_so_once(caplog):
    choice._tell.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            found = causal_attention("auto", *rows(), RelativeBias())
    assert torch.isfinite(found.output).all()
    told = [r.getMessage() for r in caplog.records]
    assert told == ["--attention-backend auto: blocked, as the fused backend is for GPUs, and this is cpu"]


@pytest.mark.parametrize(
    ("dtype", "size", "reason"),
    [(torch.float64, 4, "torch.float64"), (torch.float32, 129, "heads up to 128, and these are 129")],
)
def test_fused_by_name_never_falls_back(dtype, size, reason):
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=f"--attention-backend fused cannot run here.*{reason}.*auto or eager"):
        causal_attention("fused", *rows(dtype, size, DEVICE), RelativeBias())


def test_fused_by_name_needs_a_gpu(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    decoder = tiny_decoder(attention_backend="fused", dtype=torch.float32)
    with pytest.raises(ValueError, match="it runs on GPUs, and this is cpu"):
        decoder(random_tokens(1, 3))


def test_fused_by_name_needs_triton(monkeypatch):
    monkeypatch.setattr(choice, "_has_triton", lambda: False)
    with pytest.raises(ValueError, match="pip install triton"):
        causal_attention("fused", *rows(), RelativeBias())


def test_an_operation_without_kernels(caplog):
    """`auto` takes the plain one and says so, `fused` refuses, and a backend that nobody registered it with too."""
    plain = Operation("window attention", lambda q, factor: Attended(factor * q, q[..., 0]))
    (q, *_) = rows()
    for name in ("eager", "auto"):
        assert torch.equal(plain(name, q, 2).output, 2 * q)
    with pytest.raises(ValueError, match="backend fused cannot run here: window attention has no fused implementation"):
        plain("fused", q, 2)
    with pytest.raises(
        ValueError, match="unknown attention backend 'flash'; the known ones are auto, blocked, eager, fused"
    ):
        plain("flash", q, 2)
    plain.register("other", lambda q, factor: Attended(q, q[..., 0]))
    with pytest.raises(ValueError, match="window attention has an implementation 'other' already"):
        plain.register("other", lambda q, factor: Attended(q, q[..., 0]))


def test_auto_says_which_operation_has_no_kernels(caplog):
    plain = Operation("window attention", lambda q: Attended(q, q[..., 0]))
    reason = choice.why_not_fused(rows()[0], plain)
    assert reason == "window attention has no fused implementation"
