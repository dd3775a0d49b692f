"""Which attention backend a name means."""

import logging

import pytest
import torch

from lamemo_fairseq.core.attention import BACKENDS, Attended, Operation, RelativeBias, causal_attention, choice, eager

from ..gpus import DEVICE
from .helpers import VARIANTS, random_tokens, read_streams, tiny_decoder


def rows(dtype=torch.float32, size=4, device="cpu"):
    return [torch.randn(1, 2, 3, size, dtype=dtype, device=device) for _ in range(3)]


def test_auto_is_blocked_without_a_gpu_and_says_so_once(caplog):
    choice._tell.cache_clear()
    with caplog.at_level(logging.INFO):
        tiny_decoder()  # it may move to a GPU yet
        assert not caplog.records
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
    monkeypatch.setattr(choice, "has_triton", lambda: False)
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


@pytest.fixture
def registered(monkeypatch):
    """Register backends for a test: each has an implementation of causal attention alone."""

    def register(**choices):
        for name, chosen in choices.items():
            monkeypatch.setitem(BACKENDS._entries, name, chosen)
            monkeypatch.setitem(causal_attention._implementations, name, eager.causal_attention)

    return register


def only_on_gpus(operation, q):
    if not q.is_cuda:
        raise ValueError("pass another one")
    return "gpu"


LACKING = (
    r"^--attention-backend {} cannot run here: {} has no {} implementation; pass --attention-backend auto or eager"
)


@pytest.mark.parametrize(
    ("backend", "variant", "operation"),
    [
        ("double", ("lookahead", "disentangled", "right"), "attention with look-ahead"),
        ("double", ("lookahead", "segatron", "right"), "attention by distances counted in the text"),
        ("double", ("token", "transformer-xl", "right"), "attention of memory tokens"),
        ("double", ("memorizing", "transformer-xl", "top-k"), "attention to retrieved rows"),
        ("fused", ("lookahead", "segatron", "right"), "attention by distances counted in the text"),
        ("blocked", ("block-recurrent", "t5", "fixed"), "attention to states"),
    ],
)
def test_a_model_that_the_backend_lacks_an_operation_of_is_not_made(backend, variant, operation, registered):
    registered(double=lambda operation, q: "double")
    with pytest.raises(ValueError, match=LACKING.format(backend, operation, backend)) as error:
        tiny_decoder(variant, attention_backend=backend)
    assert "\n" not in str(error.value)


def test_a_backend_may_choose_others_or_wait_for_the_device(registered):
    mixed = {"mixed": lambda operation, q: "mixed" if operation.has("mixed") else "eager"}
    registered(**mixed, gpu=only_on_gpus)
    scores = [read_streams(tiny_decoder(attention_backend=name), random_tokens(2, 9)) for name in ("mixed", "eager")]
    assert torch.equal(*scores)
    waiting = tiny_decoder(attention_backend="gpu")
    with pytest.raises(ValueError, match="pass another one"):
        read_streams(waiting, random_tokens(2, 9))


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_attention_names_the_operations_that_it_calls(variant, monkeypatch):
    call, called = Operation.__call__, set()
    monkeypatch.setattr(Operation, "__call__", lambda self, *a, **k: called.add(self) or call(self, *a, **k))
    decoder = tiny_decoder(variant, attention_backend="eager")
    read_streams(decoder, random_tokens(1, 9))
    assert called == {operation for layer in decoder.layers for operation in layer.self_attn.operations()}


@torch.no_grad()
def test_texts_are_read_over_a_cache_without_the_backend(monkeypatch):
    """As docs/extending.md says: on a CPU, `score` and `generate` use no backend, and `score_documents` does."""
    model, text = tiny_decoder(), random_tokens(1, 10)[0]  # whole segments
    called, attend = [], causal_attention._implementations["blocked"]
    monkeypatch.setitem(
        causal_attention._implementations, "blocked", lambda *a, **k: called.append(1) or attend(*a, **k)
    )
    scored = model.score(text).log_probs
    model.generate([text], 3)
    assert not called
    (again,) = model.score_documents([text], 1)
    assert called
    torch.testing.assert_close(scored, again, rtol=0, atol=1e-12)
