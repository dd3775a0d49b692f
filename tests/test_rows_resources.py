"""What the layers' kernels cost on a Hopper GPU: registers, spills and shared memory, from compilation alone."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .test_fused_resources import REGISTERS, SHARED_BYTES, cuobjdump


def compile_all(width: int, dtype: str) -> dict:
    """Compile every kernel for sm_90 with all that it can do; run in a process without the interpreter."""
    import tempfile

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lamemo_fairseq.modules import activation_kernel, residual_kernel, shared_kernels

    does = {"DROPPED": 1 << 28, "BIAS": True, "KEEP": True, "SUMMED": True}
    wide = width + -width % 8
    does |= {"D": width, "W": wide} | dict.fromkeys(("WIDTH", "WIDTH_X", "WIDTH_R", "WIDTH_G", "WIDTH_H"), wide)
    activation_tile = shared_kernels.TILE // activation_kernel.BLOCK, activation_kernel.BLOCK, 4
    chosen = {
        residual_kernel.residual_norm_kernel: residual_kernel.tiles(width, shared_kernels.TILE),
        residual_kernel.residual_norm_gradient_kernel: residual_kernel.tiles(width, residual_kernel.BACKWARD_TILE),
        activation_kernel.relu_dropout_kernel: activation_tile,
        activation_kernel.relu_dropout_gradient_kernel: activation_tile,
        shared_kernels.sum_kernel: (None, None, 8),
    }
    single, found = {"p_mean", "p_rstd", "p_partial"}, {}
    for kernel, (rows, block, warps) in chosen.items():
        constants = {**does, "ROWS": rows, "BLOCK": block, "BLOCK_P": 256, "BLOCK_D": 16}
        constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
        signature = {}
        for argument in kernel.arg_names:
            kind = "fp32" if argument == "eps" else "i32"
            if argument in constants:
                kind = "constexpr"
            elif argument.startswith("p_"):
                kind = "*i32" if argument == "p_seed" else "*fp32" if argument in single else f"*{dtype}"
            signature[argument] = kind
        aligned = [n for n in kernel.arg_names if n.startswith(("p_", "s_"))]
        attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [cuobjdump(), "--dump-resource-usage", file.name]
            usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        ptx = compiled.asm["ptx"]
        numbers["16 bytes"] = sum(len(re.findall(rf"{kind}\.global\S*\.v4\.b32", ptx)) for kind in ("ld", "st"))
        where = kernel.fn.__module__.rpartition(".")[2]
        found[f"{where}.{kernel.fn.__name__}"] = {**numbers, "SHARED": compiled.metadata.shared}
    return found


@pytest.mark.parametrize(("width", "dtype"), [(410, "bf16"), (4096, "fp32")])
def test_no_spills(width, dtype):
    pytest.importorskip("triton")
    if not cuobjdump() or not os.access(cuobjdump(), os.X_OK):
        pytest.skip("no cuobjdump: Triton for this platform does not carry NVIDIA's tools")
    root = Path(__file__).parent.parent
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.test_rows_resources", str(width), dtype]
    printed = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr[-3000:]
    for kernel, used in json.loads(printed.stdout.splitlines()[-1]).items():
        assert used["REG"] <= REGISTERS, (kernel, used)
        assert used["LOCAL"] == 0 and used["STACK"] == 0, (kernel, used)
        assert used["SHARED"] <= SHARED_BYTES, (kernel, used)
        assert used["16 bytes"] or "sum_kernel" in kernel, (kernel, used)


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]), sys.argv[2])))
