"""What the layers' kernels cost on a Hopper GPU: registers, spills and shared memory, from compilation alone."""

import re

from .resources import usages, used


def compile_all(width: int, dtype: str) -> dict:
    """Compile every kernel for sm_90 with all that it can do; run in a process without the interpreter."""
    from lamemo_fairseq.core.kernels import activation_kernel, residual_kernel, shared_kernels, unit_kernel

    does = {"DROPPED": 1 << 28, "BIAS": True, "KEEP": True, "SUMMED": True, "FACTOR": True, "BACKWARD": True}
    wide = width + -width % 8
    does |= {"D": width, "W": wide} | dict.fromkeys(("WIDTH", "WIDTH_X", "WIDTH_R", "WIDTH_G", "WIDTH_H"), wide)
    activation_tile = shared_kernels.TILE // activation_kernel.BLOCK, activation_kernel.BLOCK, 4
    chosen = {
        residual_kernel.residual_norm_kernel: residual_kernel.tiles(width, shared_kernels.TILE),
        residual_kernel.residual_norm_gradient_kernel: residual_kernel.tiles(width, residual_kernel.BACKWARD_TILE),
        activation_kernel.relu_dropout_kernel: activation_tile,
        activation_kernel.relu_dropout_gradient_kernel: activation_tile,
        shared_kernels.sum_kernel: (None, None, 8),
        unit_kernel.unit_kernel: (unit_kernel._rows(48), shared_kernels.block_of(48), 4),
    }
    single, found = {"p_mean", "p_rstd", "p_partial", "p_factor"}, {}
    for kernel, (rows, block, warps) in chosen.items():
        constants = {
            **does,
            **({"D": 48} if kernel is unit_kernel.unit_kernel else {}),
            "ROWS": rows,
            "BLOCK": block,
            "BLOCK_P": 256,
            "BLOCK_D": 16,
        }
        kinds = {n: f"*{dtype}" for n in kernel.arg_names if n.startswith("p_")}
        kinds |= dict.fromkeys(single, "*fp32") | {"p_seed": "*i32", "eps": "fp32"}
        divisible = [n for n in kernel.arg_names if n.startswith(("p_", "s_"))]
        usage, ptx = used(kernel, constants, kinds, divisible, {"num_warps": warps})
        usage["16 bytes"] = sum(len(re.findall(rf"{kind}\.global\S*\.v4\.b32", ptx)) for kind in ("ld", "st"))
        found[kernel.fn.__name__] = usage
    return found


def test_no_spills_and_wide_loads():
    for found in usages(__name__, (410, "bf16"), (4096, "fp32")):
        for kernel, usage in found.items():
            assert usage["16 bytes"] or kernel == "sum_kernel", (kernel, usage)
