"""Programmatic dependent launch: a kernel begins while the one before it ends.

Such a kernel calls `wait_for_inputs` before it reads what a kernel of the same step wrote, and before it writes
anything. What it reads earlier, such as weights, was complete before the step began.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from functools import cache
from typing import Dict, Union

import torch
import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # Triton before 3.3
    gdc_launch_dependents = gdc_wait = None

MODE = 2  # when the next kernel may begin: 1 as programs end, 2 when all have their inputs, 3 when all have begun
MOST_ROWS = 16  # with more rows kernels fill the device, and those that wait are in the way


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Wait for the end of the kernel before; without a dependent launch (PDL 0) it has ended."""
    if PDL == 3:
        gdc_launch_dependents()
    if PDL > 0:
        gdc_wait()
    if PDL == 2:
        gdc_launch_dependents()


def launch_options(rows: int, device: torch.device) -> Dict[str, Union[int, bool]]:
    """Return the constants and options of a launch for *rows* sequences.

    EARLY: whether to load what the kernel before did not make before its inputs.
    PDL: whether, and how, the kernel begins while the one before ends.
    """
    if rows > MOST_ROWS:
        return {"EARLY": False, "PDL": 0}
    if MODE == 0 or not _supported(device):
        return {"EARLY": True, "PDL": 0}
    return {"EARLY": True, "PDL": MODE, "launch_pdl": True}


@cache
def _supported(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None or gdc_wait is None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9
