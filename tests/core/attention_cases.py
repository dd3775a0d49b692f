"""Cases of banded attention, for the tests of each backend: sizes, windows and parts of the bias."""

from typing import NamedTuple, Optional

import torch

from lamemo_fairseq.core.attention import Attended, RelativeBias, causal_attention
from lamemo_fairseq.core.memory.lookahead import LookaheadWindow, lookahead_attention

NAMES = ("output", "normalizer", "q", "k", "v", "content", "position", "table", "score")


class Case(NamedTuple):
    queries: int
    keys: int
    size: int
    kind: str = "causal"  # or right, full
    span: Optional[int] = None
    ragged: bool = False
    parts: str = "content position table"
    heads: int = 2
    streams: int = 2
    nearest: int = 0

    def window(self, device="cpu") -> LookaheadWindow:
        lengths = torch.tensor([self.keys, max(self.keys - 3, 0)], device=device) if self.ragged else None
        return LookaheadWindow(self.queries - self.keys + 1, self.kind == "full", lengths)

    @property
    def distances(self) -> int:
        return self.keys if self.kind == "causal" else len(self.window().distances(self.queries))

    def tensors(self, device, seed=0):
        """q, k, v, the parts of the bias, the gradient of the output, and what was stored, in float64."""
        generator = torch.Generator().manual_seed(seed)
        b, h, d = self.streams, self.heads, self.size
        rows = [(b, h, self.queries, d), (b, h, self.keys, d), (b, h, self.keys, d)]
        bias = {"content": (h, d), "position": (h, d), "table": (h, self.distances, d), "score": (h, self.distances)}
        shapes = [*rows, *(s if p in self.parts else None for p, s in bias.items()), rows[0], rows[0], rows[0][:3]]
        return [
            None if s is None else torch.randn(s, generator=generator, dtype=torch.float64).to(device) for s in shapes
        ]

    def call(self, backend, q, k, v, bias, output, normalizer, dropout=0.0):
        if self.kind == "causal":
            return causal_attention(backend, q, k, v, bias, self.span, dropout, nearest=self.nearest)
        stored = Attended(output, normalizer)
        return lookahead_attention(backend, q, k, v, bias, self.window(q.device), stored, dropout)


CASES = [
    Case(1, 1, 1),
    Case(1, 40, 8),
    Case(37, 37, 41),
    Case(17, 50, 16, span=9),
    Case(33, 33, 5, span=2),
    Case(20, 33, 128, heads=1),
    Case(9, 20, 7, parts=""),
    Case(18, 35, 6, parts="content table score"),
    Case(19, 19, 6, parts="table"),
    Case(16, 17, 5, nearest=1),  # the last entries of the table are not used
    Case(1, 1, 4, "right"),
    Case(37, 37, 41, "right"),
    Case(40, 33, 8, "right", ragged=True),
    Case(150, 40, 8, "right", ragged=True),  # several chunks, the last one ragged
    Case(130, 1, 8, "right"),
    Case(36, 20, 8, "full"),
    Case(100, 33, 8, "full", ragged=True),
    Case(36, 36, 8, "right", parts=""),
    Case(18, 35, 6, parts="content position score"),
    Case(150, 40, 8, "right", ragged=True, parts="content table score"),
    Case(130, 200, 4, heads=1),  # blocks to clear in full, in part and not at all
    Case(200, 100, 4, "full", heads=1, ragged=True),
]


def computed(case, backend, dtype, device, wrap=lambda t: t, dropout=0.0):
    """Outputs and gradients by `NAMES`; *wrap* is called with every input."""
    q, k, v, *bias, grad, output, normalizer = case.tensors(device)
    inputs = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (q, k, v, *bias)]
    stored = output.to(dtype), normalizer.to(torch.promote_types(dtype, torch.float32))
    rows, parts = [wrap(t) for t in inputs[:3]], [None if t is None else wrap(t) for t in inputs[3:]]
    attended = case.call(backend, *rows, RelativeBias(*parts), *stored, dropout)
    attended.output.backward(grad.to(dtype))
    return dict(
        zip(NAMES, [attended.output, attended.normalizer, *(t if t is None else t.grad for t in inputs)], strict=True)
    )
