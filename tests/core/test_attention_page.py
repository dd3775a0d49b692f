"""The code in docs/attention.md runs, and what it computes is attention with memory."""

import re
from pathlib import Path

import torch

from lamemo_fairseq.core.memory.lookahead import lookahead_attention

PAGE = (Path(__file__).parents[2] / "docs/attention.md").read_text(encoding="utf-8")


def test_the_page_runs():
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 2
    exec(blocks[0], names)
    queries = range(names["N"])
    causal, bias = names["attended"], names["bias"]
    with torch.no_grad():
        for i in queries:
            seen = names["M"] + i + 1
            table = bias.table[:, names["K"] - seen :]
            q = names["q"][:, :, i]
            scores = torch.einsum("bhd,bhkd->bhk", q + bias.content, names["k"][:, :, :seen])
            scores = (scores + torch.einsum("bhd,hkd->bhk", q + bias.position, table)) / names["D"] ** 0.5
            expected = torch.einsum("bhk,bhkd->bhd", scores.softmax(-1), names["v"][:, :, :seen])
            torch.testing.assert_close(causal.output[:, :, i], expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(causal.normalizer[:, :, i], scores.logsumexp(-1), rtol=0, atol=1e-5)
    assert all(part.grad is not None for part in bias if part is not None)

    exec(blocks[1], names)
    window, slots = names["window"], names["M"]
    keys = slice(window.first, slots + 1)
    alone = lookahead_attention(
        "eager",
        *(names["q"][:, :, :slots], names["k"][:, :, keys], names["v"][:, :, keys]),
        *(names["ahead"], window, names["stored"]),
    )
    torch.testing.assert_close(names["attended"].output[:, :, :slots], alone.output, rtol=0, atol=1e-6)
    assert names["attended"].output.shape == (names["B"], names["H"], names["K"], names["D"])
