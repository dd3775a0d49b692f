"""The roundings inside the released code, which its figures carry although they were made in float64.

The released attention passes masked scores through float32, computes the logsumexps in float32, and the
mixing weight from them. Eager attention does none of that to a float64 model. In float32 even the order
of a sum shows, so the steps below keep the released memory layout ``[Q, K, B, H]``. Everything else
about the attention, its windows, shifts, biases and rows, is the eager code as it stands.
"""

import math
import zlib

import torch

from lamemo_fairseq.attention import eager

# What `float32_fingerprint` gives where the figures were made: PyTorch 2.13 on an AMD processor with AVX-512.
FIGURES_FINGERPRINT = 4113427384


def float32_fingerprint() -> int:
    """Tells machines apart whose exp and log differ in the last bit of a float32.

    Both are right within a bit, but vendors' vector libraries round them differently, and 1e-9 is finer than a float32.
    """
    x = (torch.arange(4000) * 7919 % 4001).float() / 400 - 5
    results = (x.exp(), x.view(40, 100).logsumexp(1), torch.logaddexp(x, x.flip(0)))
    return zlib.crc32(torch.cat(results).numpy().tobytes())


def round_as_released(monkeypatch, masks_in_float32: bool = True):
    """Replace the four places of the eager attention where the released code rounds, until the test ends.

    *masks_in_float32* is False for its learned and absolute positions, whose masked scores are not rounded.
    """
    production = eager.lookahead_attention
    looking_ahead = False

    def lookahead_attention(*args, **kwargs):
        nonlocal looking_ahead
        looking_ahead = True
        try:
            return production(*args, **kwargs)
        finally:
            looking_ahead = False

    def mask(scores, hidden):
        if not masks_in_float32:
            return scores.masked_fill(hidden, -math.inf)
        if looking_ahead:
            return scores.float().masked_fill(hidden, -math.inf).type_as(scores)
        if not hidden.any():
            return scores
        released = scores.permute(2, 3, 0, 1).contiguous().float().masked_fill(hidden[:, :, None, None], -math.inf)
        return released.type_as(scores).permute(2, 3, 0, 1)

    monkeypatch.setattr(eager, "lookahead_attention", lookahead_attention)
    monkeypatch.setattr(eager, "_mask", mask)
    monkeypatch.setattr(eager, "_softmax", lambda scores: (scores.softmax(-1), _normalizer(scores)))
    monkeypatch.setattr(eager, "merge", _merge)


def _normalizer(scores):
    return scores.permute(2, 3, 0, 1).float().logsumexp(1).permute(1, 2, 0)


def _merge(stored, new):
    added, kept = (n.permute(2, 0, 1).contiguous() for n in (new.normalizer, stored.normalizer))
    normalizer = torch.logaddexp(kept, added.detach()).permute(1, 2, 0)
    top = torch.stack([added.double(), kept.double()]).max(0)[0]
    kept, added = (kept - top).float().exp(), (added - top).float().exp()
    alpha = (kept / (kept + added + eager.INTERPOLATION_EPS)).permute(1, 2, 0).unsqueeze(-1)
    return eager.Attended(stored.output * alpha + new.output * (1 - alpha), normalizer)
