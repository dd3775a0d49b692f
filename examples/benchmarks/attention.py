"""Compare attention alone: useful TFLOP/s of every implementation that can compute relative attention with memory.

    python examples/benchmarks/attention.py                              # enwik8's and WikiText-103's shapes, on a GPU
    python examples/benchmarks/attention.py --shape 2,2,8,16,16 --device cpu

One count serves all: each pair of a query and a key that it sees has the products of content, position and value. Each
product has 2 D operations, and twice as many backward. Recomputed scores and hidden pairs do not count. An
implementation is first compared with plain operations in float64. Plain attention without positions is measured to
compare speeds alone.

Shapes: B streams, H heads, D size of a head, N current tokens, M memory slots, K = M + N keys.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.benchmarks.devices import check_device
from lamemo_fairseq.arguments import ArgumentParser
from lamemo_fairseq.core.attention import Attended, RelativeBias, causal_attention
from lamemo_fairseq.core.attention.eager import relative_shift
from lamemo_fairseq.core.memory.lookahead import WINDOWS, memory_attention

SHAPES = ["20,8,64,512,512", "64,10,41,150,150"]
REPETITIONS = 20  # on a CPU


class Shape(NamedTuple):
    streams: int
    heads: int
    size: int
    tokens: int
    slots: int

    @property
    def keys(self) -> int:
        return self.slots + self.tokens

    def causal_pairs(self) -> int:
        return self.tokens * self.slots + self.tokens * (self.tokens + 1) // 2

    def ahead_pairs(self) -> int:
        """Return the number of pairs of a slot and a key of its window."""
        first = WINDOWS["right"](self.slots, self.tokens).first
        return sum(max(0, self.slots + 1 - max(first, slot + 1)) for slot in range(self.slots))


class Inputs(NamedTuple):
    """Tensors with gradients, and the slots' former read-outs."""

    q: Tensor  # [B, H, K, D], slots first
    k: Tensor
    v: Tensor
    causal: RelativeBias
    ahead: RelativeBias
    stored: Attended

    @classmethod
    def draw(cls, shape: Shape, device: str, dtype: torch.dtype) -> "Inputs":
        generator = torch.Generator(device).manual_seed(1)

        def leaf(*sizes: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(*sizes, generator=generator, device=device, dtype=torch.float32) * scale
            return drawn.to(dtype).requires_grad_()

        b, h, d = shape.streams, shape.heads, shape.size
        packed = torch.randn(b, shape.keys, 3, h, d, generator=generator, device=device).to(dtype)
        q, k, v = (t.transpose(1, 2).detach().requires_grad_() for t in packed.unbind(2))  # strided like projections
        distances = len(WINDOWS["right"](shape.slots, shape.tokens).distances(shape.slots))
        causal = RelativeBias(leaf(h, d, scale=0.1), leaf(h, d, scale=0.1), leaf(h, shape.keys, d))
        ahead = RelativeBias(leaf(h, d, scale=0.1), leaf(h, d, scale=0.1), leaf(h, distances, d))
        output = leaf(b, h, shape.slots, d).detach()
        normalizer = torch.randn(b, h, shape.slots, generator=generator, device=device).to(
            torch.promote_types(dtype, torch.float32)
        )
        return cls(q, k, v, causal, ahead, Attended(output, normalizer))

    def to(self, dtype: torch.dtype) -> "Inputs":
        def leaf(t: Tensor) -> Tensor:
            return t.detach().to(dtype).requires_grad_()

        def bias(of: RelativeBias) -> RelativeBias:
            return RelativeBias(*(None if part is None else leaf(part) for part in of))

        stored = Attended(
            self.stored.output.to(dtype), self.stored.normalizer.to(torch.promote_types(dtype, torch.float32))
        )
        return Inputs(leaf(self.q), leaf(self.k), leaf(self.v), bias(self.causal), bias(self.ahead), stored)

    def leaves(self) -> List[Tensor]:
        return [
            self.q,
            self.k,
            self.v,
            *(part for bias in (self.causal, self.ahead) for part in bias if part is not None),
        ]


class Implementation(NamedTuple):
    """An implementation of attention, the operations that it computes, and its exact twin."""

    attend: Callable[[Inputs, Shape], Tensor]
    pairs: Callable[[Shape], int]
    products: int = 3  # content, position, value
    exact: Callable[[Inputs, Shape], Tensor] | None = None  # with the same result; None: it computes less
    on_cpu: bool = True


def current(x: Inputs, shape: Shape) -> Tensor:
    return x.q[:, :, shape.slots :]


def causal(backend: str) -> Callable[[Inputs, Shape], Tensor]:
    def attend(x: Inputs, shape: Shape) -> Tensor:
        return causal_attention(backend, current(x, shape), x.k, x.v, x.causal, need_normalizer=False).output

    return attend


def with_lookahead(backend: str) -> Callable[[Inputs, Shape], Tensor]:
    def attend(x: Inputs, shape: Shape) -> Tensor:
        window = WINDOWS["right"](shape.slots, shape.tokens)
        return memory_attention(backend, x.q, x.k, x.v, (x.causal, x.ahead), window, x.stored).output

    return attend


def by_distance(q: Tensor, bias: RelativeBias) -> Tensor:
    """Return the position scores ``[B, H, N, K]``, with a column for each distance."""
    assert bias.position is not None and bias.table is not None
    scores: Tensor = (q + bias.position[:, None]) @ bias.table.transpose(-1, -2) * q.size(-1) ** -0.5
    return scores


def flex() -> Callable[[Inputs, Shape], Tensor]:
    """Return FlexAttention over captured position scores: its function of a single pair cannot multiply matrices."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled, masks = torch.compile(flex_attention), {}

    def attend(x: Inputs, shape: Shape) -> Tensor:
        if shape not in masks:
            masks[shape] = create_block_mask(
                lambda b, h, i, j: j <= i + shape.slots, None, None, shape.tokens, shape.keys, x.q.device
            )
        q = current(x, shape)
        positions = by_distance(q, x.causal)

        def with_position(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + positions[b, h, i, (shape.tokens - 1 - i + j).clamp(max=shape.keys - 1)]

        return compiled(q + x.causal.content[:, None], x.k, x.v, score_mod=with_position, block_mask=masks[shape])

    return attend


def written_out(x: Inputs, shape: Shape) -> Tensor:
    """Attend by PyTorch's attention, with a bias for every pair."""
    q = current(x, shape)
    positions = relative_shift(by_distance(q, x.causal), shape.tokens - 1, shape.keys)
    hidden = torch.ones(shape.tokens, shape.keys, dtype=torch.bool, device=q.device).triu(shape.slots + 1)
    bias = positions.masked_fill(hidden, float("-inf"))
    return F.scaled_dot_product_attention(q + x.causal.content[:, None], x.k, x.v, attn_mask=bias)


def square(x: Inputs, shape: Shape) -> Tensor:
    keys = slice(shape.slots, None)
    return F.scaled_dot_product_attention(current(x, shape), x.k[:, :, keys], x.v[:, :, keys], is_causal=True)


def rectangle(x: Inputs, shape: Shape) -> Tensor:
    return F.scaled_dot_product_attention(current(x, shape), x.k, x.v)


def implementations() -> Dict[str, Callable[[], Implementation]]:
    exact, exact_ahead = causal("eager"), with_lookahead("eager")

    def both(shape: Shape) -> int:
        return shape.causal_pairs() + shape.ahead_pairs()

    return {
        "fused": lambda: Implementation(causal("fused"), Shape.causal_pairs, exact=exact, on_cpu=False),
        "fused, with look-ahead": lambda: Implementation(
            with_lookahead("fused"), both, exact=exact_ahead, on_cpu=False
        ),
        "plain operations": lambda: Implementation(exact, Shape.causal_pairs, exact=exact),
        "plain operations, with look-ahead": lambda: Implementation(exact_ahead, both, exact=exact_ahead),
        "FlexAttention, position scores captured": lambda: Implementation(
            flex(), Shape.causal_pairs, exact=exact, on_cpu=False
        ),
        "PyTorch's, bias written out": lambda: Implementation(written_out, Shape.causal_pairs, exact=exact),
        "PyTorch's, causal N x N, no positions": lambda: Implementation(
            square, lambda s: s.tokens * (s.tokens + 1) // 2, products=2
        ),
        "PyTorch's, all of N x (M + N), no positions": lambda: Implementation(
            rectangle, lambda s: s.tokens * s.keys, products=2
        ),
    }


def error(
    attend: Callable[[Inputs, Shape], Tensor], exact: Callable[[Inputs, Shape], Tensor], x: Inputs, s: Shape
) -> float:
    """Return the largest relative error of the output and of any gradient, against *exact* in float64."""
    measured, expected = [], []
    for function, inputs, results in ((attend, x, measured), (exact, x.to(torch.float64), expected)):
        output = function(inputs, s)
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        grads = torch.autograd.grad(output, inputs.leaves(), grad.to(output), allow_unused=True)
        results += [output.detach(), *(g for g in grads if g is not None)]
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(measured, expected, strict=True))


def milliseconds(run: Callable[[], object], device: str) -> float:
    if device != "cpu":
        import triton

        # It is timed from a graph, as training runs it: launching a backward pass from Python takes longer than its
        # kernels.
        return float(triton.testing.do_bench_cudagraph(run, rep=200, return_mode="median"))
    spent = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        run()
        spent.append(1e3 * (time.perf_counter() - start))
    return statistics.median(spent)


def measure(implementation: Implementation, x: Inputs, shape: Shape, device: str) -> Dict[str, float]:
    """Return the error, and milliseconds and useful TFLOP/s of a forward pass, without and with its backward pass."""
    figures: Dict[str, float] = {}
    if implementation.exact is not None:
        figures["error"] = error(implementation.attend, implementation.exact, x, shape)
    grad = torch.randn_like(implementation.attend(x, shape))
    leaves = x.leaves()

    def forward() -> None:
        with torch.no_grad():
            implementation.attend(x, shape)

    def both() -> None:
        torch.autograd.grad(implementation.attend(x, shape), leaves, grad, allow_unused=True)

    pairs = implementation.pairs(shape) * shape.streams * shape.heads
    work = 2 * shape.size * implementation.products * pairs
    for name, run, times in (("forward", forward, 1), ("forward and backward", both, 3)):
        spent = milliseconds(run, device)
        figures[f"{name}, ms"] = spent
        figures[f"{name}, TFLOP/s"] = times * work / spent / 1e9
    return figures


COLUMNS = ["error", "forward, ms", "forward, TFLOP/s", "forward and backward, ms", "forward and backward, TFLOP/s"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="B,H,D,N,M; may be given several times")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--dtype", default=None, choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--result", type=Path, help="write the results to this JSON file")
    args = parser.parse_args(arguments)
    dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "float16"))
    check_device(args.device)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{device}, torch {torch.__version__}, {dtype}", flush=True)
    results = {}
    for text in args.shape or SHAPES:
        shape = Shape(*map(int, text.split(",")))
        x = Inputs.draw(shape, args.device, dtype)
        print(f"\nB, H, D, N, M = {text}\n\n| | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}", flush=True)
        for name, make in implementations().items():
            implementation = make()
            if args.device == "cpu" and not implementation.on_cpu:
                print(f"| {name} | on a GPU |", flush=True)
                continue
            try:
                figures = measure(implementation, x, shape, args.device)
            except (RuntimeError, ValueError, torch.cuda.OutOfMemoryError) as reason:
                print(f"| {name} | {type(reason).__name__}: {str(reason).splitlines()[0][:80]} |", flush=True)
                continue
            results[f"{text} {name}"] = figures
            shown = [f"{figures[c]:.1e}" if c == "error" else f"{figures[c]:.3g}" for c in COLUMNS if c in figures]
            print(f"| {name} | {' | '.join(['', *shown] if 'error' not in figures else shown)} |", flush=True)
    if args.result:
        args.result.write_text(
            json.dumps({"device": device, "torch": torch.__version__, "dtype": str(dtype), **results})
        )


if __name__ == "__main__":
    main()
