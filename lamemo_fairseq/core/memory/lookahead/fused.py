"""Look-ahead attention by the fused kernels: `eager.py` describes the functions."""

from functools import partial

from ...attention.fused import attend
from . import banded

lookahead_attention = partial(banded.lookahead_attention, attend)
memory_attention = partial(banded.memory_attention, attend)
