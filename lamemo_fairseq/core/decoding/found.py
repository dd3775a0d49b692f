"""Where steps leave the words that they draw.

Shapes: B rows, n words so far.
"""

from typing import NamedTuple

from torch import Tensor


class Found(NamedTuple):
    """What steps leave on the device until it is collected."""

    words: Tensor  # [B, n at most] int64
    log_probs: Tensor  # [B, n at most], float32 or wider
    position: Tensor  # [B] int64, n
