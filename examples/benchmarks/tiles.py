"""Time the fused kernels by tile size, and products whose widths break alignment, on this GPU.

python examples/benchmarks/tiles.py
"""

import sys
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lamemo_fairseq.core.attention import Attended, RelativeBias
from lamemo_fairseq.core.attention.fused import tiles
from lamemo_fairseq.core.attention.fused.tiles import Tile
from lamemo_fairseq.core.memory.lookahead import LookaheadWindow, memory_attention

# streams, heads, size of a head, current tokens, slots
SHAPES = {"enwik8": (20, 8, 64, 512, 512), "wt103": (64, 10, 41, 150, 150)}
CANDIDATES = {
    "forward": [Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(64, 32, 4, 3), Tile(64, 128, 8, 2)],
    "key": [Tile(64, 64, 8, 2), Tile(32, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 128, 8, 2), Tile(64, 64, 8, 3)],
    "query": [Tile(64, 32, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(32, 64, 4, 2)],
    "position": [Tile(64, 64, 4, 2), Tile(64, 128, 4, 2), Tile(128, 64, 4, 2), Tile(128, 64, 8, 2)],
    "table": [Tile(64, 64, 4, 3), Tile(64, 128, 4, 3), Tile(64, 128, 8, 3), Tile(128, 64, 4, 2)],
}


def prepare(streams: int, heads: int, size: int, current: int, slots: int, pad: int = 0):
    total = slots + current
    packed = torch.randn(streams, total, 3, heads, size + pad, device="cuda", dtype=torch.bfloat16)[..., :size]
    q, k, v = (t.transpose(1, 2).detach().requires_grad_() for t in packed.unbind(2))
    window = LookaheadWindow(slots - min(slots, current) + 1, False)

    def bias(distances: int) -> RelativeBias:
        shapes = (heads, size), (heads, size), (heads, distances, size)
        return RelativeBias(*(torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in shapes))

    stored = Attended(
        torch.randn(streams, heads, slots, size, device="cuda", dtype=torch.bfloat16),
        torch.randn(streams, heads, slots, device="cuda") + 3,
    )
    biases = bias(total), bias(len(window.distances(slots)))

    def attend(backend):
        return memory_attention(backend, q, k, v, biases, window, stored)

    attend.inputs = (q, k, v, *(t for bias in biases for t in bias if t is not None))
    return attend


def times(attend, backend) -> tuple[float, float]:
    """Return milliseconds of a forward and a backward pass, from graphs: launches would take longer."""
    grad = torch.randn_like(attend(backend).output)
    inputs = [t for t in attend.inputs if t.requires_grad]

    def both() -> None:
        torch.autograd.grad(attend(backend).output, inputs, grad)

    forward, total = (
        triton.testing.do_bench_cudagraph(run, rep=20, return_mode="median") for run in (lambda: attend(backend), both)
    )
    return forward, total - forward


def main() -> None:
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
    for name, shape in SHAPES.items():
        attend = prepare(*shape)
        print(f"{name} eager: forward {times(attend, 'eager')[0]:.3f} ms, backward {times(attend, 'eager')[1]:.3f} ms")
        block = next(size for size in tiles.HALF if shape[2] <= size)
        for kernel, candidates in CANDIDATES.items():
            default = tiles.HALF[block]
            for tile in candidates:
                tiles.HALF[block] = default._replace(**{kernel: tile})
                try:
                    forward, backward = times(attend, "fused")
                    print(
                        f"{name} {kernel} {tuple(tile)}: forward {forward:.3f} ms, backward {backward:.3f} ms",
                        flush=True,
                    )
                except Exception as error:
                    print(f"{name} {kernel} {tuple(tile)}: {type(error).__name__} {str(error)[:80]}")
            tiles.HALF[block] = default
    forward, backward = times(prepare(*SHAPES["wt103"], pad=7), "fused")
    print(f"wt103 with heads 48 apart: forward {forward:.3f} ms, backward {backward:.3f} ms")
    for count, ins, outs in ((19200, 410, 2100), (19200, 2100, 410), (19200, 410, 1230)):
        for i, o, stride in ((ins, outs, ins), (ins, outs, -(-ins // 8) * 8), (-(-ins // 8) * 8, -(-outs // 8) * 8, 0)):
            x = torch.randn(count, max(stride, i), device="cuda", dtype=torch.bfloat16)[:, :i]
            w = torch.randn(o, max(stride, i), device="cuda", dtype=torch.bfloat16)[:, :i]
            spent = triton.testing.do_bench(lambda x=x, w=w: torch.mm(x, w.t()), warmup=5, rep=20, return_mode="median")
            print(
                f"product {count} x {i} x {o}, rows {x.stride(0)} apart: {2 * count * i * o / spent / 1e9:.0f} TFLOP/s"
            )


if __name__ == "__main__":
    main()
