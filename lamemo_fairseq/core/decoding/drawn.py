"""The buffer of words that steps have drawn.

Shapes: B sequences, n words so far.
"""

from typing import NamedTuple

from torch import Tensor


class Drawn(NamedTuple):
    """Words on the device until the host collects them."""

    words: Tensor  # [B, n at most] int64
    log_probs: Tensor  # [B, n at most], float32 or wider
    position: Tensor  # [B] int64, n
