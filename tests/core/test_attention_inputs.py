"""What attention refuses, by every backend: kernels would read beyond tensors of other shapes."""

import pytest
import torch

from lamemo_fairseq.core.attention import Attended, RelativeBias, causal_attention
from lamemo_fairseq.core.memory.lookahead import WINDOWS, lookahead_attention, memory_attention

B, H, D, N, M = 2, 3, 4, 5, 6
K = M + N
WINDOW = WINDOWS["right"](M, N)


def bias(distances):
    return RelativeBias(torch.zeros(H, D), torch.zeros(H, D), torch.zeros(H, distances, D), torch.zeros(H, distances))


def of_causal(**changed):
    arguments = {"q": torch.zeros(B, H, N, D), "k": torch.zeros(B, H, K, D), "v": torch.zeros(B, H, K, D)}
    return {**arguments, "bias": bias(K), **changed}


def of_slots(**changed):
    keys, stored = torch.zeros(B, H, M - WINDOW.first + 1, D), Attended(torch.zeros(B, H, M, D), torch.zeros(B, H, M))
    arguments = {"q": torch.zeros(B, H, M, D), "k": keys, "v": keys, "bias": bias(M)}
    return {**arguments, "window": WINDOW, "stored": stored, **changed}


def of_memory(**changed):
    heads, stored = torch.zeros(B, H, K, D), Attended(torch.zeros(B, H, M, D), torch.zeros(B, H, M))
    arguments = {"q": heads, "k": heads, "v": heads, "biases": (bias(K), bias(M))}
    return {**arguments, "window": WINDOW, "stored": stored, **changed}


HEADS = [
    (of_causal(k=torch.zeros(1, H, K, D)), r"k is \[1, 3, 11, 4\]: pass \[B, H, K, D\], which is \[2, 3, 11, 4\] here"),
    (of_causal(k=torch.zeros(B, 1, K, D)), r"k is \[2, 1, 11, 4\]: pass \[B, H, K, D\], which is \[2, 3, 11, 4\] here"),
    (of_causal(v=torch.zeros(B, H, K + 2, D)), r"v is \[2, 3, 13, 4\]: pass .*, which is \[2, 3, 11, 4\] here"),
    (of_causal(q=torch.zeros(H, N, D)), r"q is \[3, 5, 4\]: pass \[B, H, Q, D\]"),
    (of_causal(k=torch.zeros(H, K, D)), r"k is \[3, 11, 4\]: pass \[B, H, K, D\], which is \[2, 3, K, 4\] here"),
    (
        of_causal(q=torch.zeros(B, H, K + 1, D)),
        r"there are 12 queries and 11 keys: pass at least 12 keys, those of the memory",
    ),
]
BIASES = [
    (of_causal(bias=bias(K + 1)), r"bias\.table is \[3, 12, 4\]: pass \[H, U, D\], which is \[3, 11, 4\] here"),
    (of_causal(bias=bias(K)._replace(score=torch.zeros(1, K))), r"score is \[1, 11\]: pass \[H, U\], which is \[3, 11"),
    (
        of_causal(bias=bias(K)._replace(content=torch.zeros(D))),
        r"content is \[4\]: pass \[H, D\], which is \[3, 4\] here",
    ),
    (
        of_causal(bias=bias(K)._replace(position=torch.zeros(1, D))),
        r"position is \[1, 4\]: pass \[H, D\], which is \[3,",
    ),
]
NUMBERS = [
    (of_causal(span=0), r"span is 0: pass at least 1, or None for all keys"),
    (of_causal(dropout=1.0), r"dropout is 1.0: pass at least 0 and less than 1"),
    (
        of_causal(nearest=-1),
        r"nearest is -1: pass 0, or the distance of the nearest key",
    ),
    (of_causal(nearest=M + 1), r"there are 5 queries and 11 keys: pass at least 12 keys"),
]
AHEAD = [
    (of_slots(k=torch.zeros(B, H, M, D)), r"k is \[2, 3, 6, 4\]: pass \[B, H, K, D\], which is \[2, 3, 5, 4\] here"),
    (of_slots(bias=bias(K)), r"the bias ahead\.table is \[3, 11, 4\]: pass .*, which is \[3, 6, 4\] here"),
    (of_slots(window=WINDOW._replace(first=0)), r"which is \[2, 3, 7, 4\] here"),
    (of_slots(dropout=2.0), r"dropout is 2.0"),
    (
        of_slots(window=WINDOW._replace(lengths=torch.ones(1))),
        r"the window's lengths is \[1\]: pass \[B\], which is \[2",
    ),
    (
        of_slots(stored=Attended(torch.zeros(B, H, M, D), torch.zeros(B, H, 1))),
        r"normalizer is \[2, 3, 1\]: pass \[B, H, m",
    ),
]
MEMORY = [
    (of_memory(k=torch.zeros(B, H, N, D)), r"k is \[2, 3, 5, 4\]: pass \[B, H, K, D\], which is \[2, 3, 11, 4\] here"),
    (
        of_memory(biases=(bias(M), bias(M))),
        r"the causal bias\.table is \[3, 6, 4\]: pass .*, which is \[3, 11, 4\] here",
    ),
    (
        of_memory(biases=(bias(K), bias(K))),
        r"the bias ahead\.table is \[3, 11, 4\]: pass .*, which is \[3, 6, 4\] here",
    ),
    (of_memory(span=-1), r"span is -1"),
    (
        of_memory(window=WINDOW._replace(first=M + 1)),
        r"the window begins at 7, and there are 6 slots: make it for these",
    ),
    (
        of_memory(stored=Attended(torch.zeros(1, H, M, D), torch.zeros(B, H, M))),
        r"stored output is \[1, 3, 6, 4\]: pass",
    ),
]
NOTHING = Attended(torch.zeros(B, H, 0, D), torch.zeros(B, H, 0))
NO_SLOTS = [
    (
        lookahead_attention,
        of_slots(
            **dict.fromkeys("qkv", torch.zeros(B, H, 0, D)), bias=bias(0), window=WINDOWS["right"](0, N), stored=NOTHING
        ),
        r"there are no slots to look ahead: pass one or more, or call causal_attention",
    ),
    (
        memory_attention,
        of_memory(
            **dict.fromkeys("qkv", torch.zeros(B, H, N, D)),
            biases=(bias(N), bias(0)),
            window=WINDOWS["full"](0, N),
            stored=NOTHING,
        ),
        r"there are no slots to look ahead",
    ),
]
NONE = [
    (
        causal_attention,
        of_causal(bias=None),
        r"bias is of type NoneType: pass a RelativeBias, RelativeBias\(\) for none",
    ),
    (lookahead_attention, of_slots(bias=None), r"the bias ahead is of type NoneType: pass a RelativeBias, Relat"),
    (
        lookahead_attention,
        of_slots(window=None),
        r"window is of type NoneType: pass WINDOWS\[NAME\]\(slots, current to",
    ),
    (
        lookahead_attention,
        of_slots(stored=None),
        r"stored is of type NoneType: pass Attended\(output, normalizer\), of",
    ),
    (memory_attention, of_memory(biases=(bias(K), None)), r"the bias ahead is of type NoneType: pass a RelativeBias"),
    (memory_attention, of_memory(biases=(None, bias(M))), r"the causal bias is of type NoneType: pass a RelativeBias"),
    (memory_attention, of_memory(biases=bias(K)), r"biases are no pair: pass the causal RelativeBias and that ahead"),
    (memory_attention, of_memory(biases=None), r"biases are no pair"),
    (memory_attention, of_memory(window=None), r"window is of type NoneType"),
    (memory_attention, of_memory(stored=None), r"stored is of type NoneType"),
]


def in_half(arguments, *names):
    """Those arguments in float16; a bias in it too."""
    halved = {name: arguments[name] for name in names}
    return {
        **arguments,
        **{
            name: type(value)(*(t.half() for t in value)) if isinstance(value, RelativeBias) else value.half()
            for name, value in halved.items()
        },
    }


DTYPES = [
    (
        causal_attention,
        in_half(of_causal(), "q"),
        r"^k is torch.float32, and q is torch.float16: pass all in one dtype, as by t.to\(q\)$",
    ),
    (causal_attention, in_half(of_causal(), "q", "k"), r"^v is torch.float32, and q is torch.float16: pass all"),
    (causal_attention, in_half(of_causal(), "q", "k", "v"), r"^bias\.content is torch.float32, and q is torch.float16"),
    (causal_attention, in_half(of_causal(), "bias"), r"^bias\.content is torch.float16, and q is torch.float32"),
    (lookahead_attention, in_half(of_slots(), "v"), r"^v is torch.float16, and q is torch.float32"),
    (
        lookahead_attention,
        in_half(of_slots(), "bias"),
        r"^the bias ahead\.content is torch.float16, and q is torch.flo",
    ),
    (memory_attention, in_half(of_memory(), "k"), r"^k is torch.float16, and q is torch.float32"),
    (
        memory_attention,
        in_half(of_memory(), "q", "k", "v"),
        r"^the causal bias\.content is torch.float32, and q is tor",
    ),
]
CASES = [
    *NONE,
    *NO_SLOTS,
    *DTYPES,
    *((causal_attention, *case) for case in [*HEADS, *BIASES, *NUMBERS]),
    *((lookahead_attention, *case) for case in AHEAD),
    *((memory_attention, *case) for case in MEMORY),
]


@pytest.mark.parametrize("backend", ["eager", "blocked", "fused"])
@pytest.mark.parametrize(("operation", "arguments", "message"), CASES, ids=[case[2] for case in CASES])
def test_arguments_that_do_not_fit_together(backend, operation, arguments, message):
    """Also where one backend would broadcast them: another would read other numbers."""
    q, *others = arguments.values()
    names = [name for name in arguments if name != "q"]
    with pytest.raises(ValueError, match=message):
        operation(backend, q, **dict(zip(names, others, strict=True)))


@pytest.mark.parametrize("backend", ["eager", "blocked"])
def test_arguments_that_fit_together(backend):
    for operation, arguments in (
        (causal_attention, of_causal()),
        (lookahead_attention, of_slots()),
        (memory_attention, of_memory()),
    ):
        q = arguments.pop("q")
        assert operation(backend, q, **arguments).output.shape == q.shape


def test_autocast_converts_dtypes():
    arguments = in_half(of_causal(), "q")
    with torch.autocast("cpu", torch.float16):
        assert causal_attention("eager", arguments.pop("q"), **arguments).output.dtype == torch.float16
