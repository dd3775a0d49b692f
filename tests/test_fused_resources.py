"""What the kernels cost on a Hopper GPU: registers, spills and shared memory, from compilation alone."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = ("forward_kernel", "delta_kernel", "clear_kernel", "key_kernel", "query_kernel")
SHARED_BYTES = 227 * 1024  # of a thread block on sm_90
REGISTERS = 255


def compile_all(head: int, dtype: str) -> dict:
    """Compile every kernel for sm_90 as LaMemo's look-ahead launches it; run in a process without the interpreter."""
    import tempfile

    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lamemo_fairseq.attention.fused import kernels, tiles

    block = max(16, triton.next_power_of_2(head))
    chosen = tiles.tiles_for(block, {"fp32": torch.float32}.get(dtype, torch.bfloat16))
    tile_of = {"forward_kernel": chosen.forward, "key_kernel": chosen.key, "query_kernel": chosen.query}
    flags = dict.fromkeys(("CONTENT", "POSITION", "STORED"), True)
    flags |= dict.fromkeys(("FIRST", "DROPOUT", "CHUNKED", "ADD"), False)
    single = {"p_held", "p_merged", "p_new", "p_delta", "p_lse", "p_du"}
    found = {}
    for name in KERNELS:
        kernel = getattr(kernels, name)
        tile = tile_of.get(name, tiles.Tile(64 if name == "clear_kernel" else 32, 32, 4, 2))
        constants = {
            "D": head,
            "BLOCK_D": block,
            "BLOCK_Q": tile.queries,
            "BLOCK_K": tile.keys,
            "BLOCK_W": 64,
            **flags,
        }
        constants["PRECISION"] = "ieee" if dtype == "fp32" else "tf32"
        constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
        signature = {}
        for argument in kernel.arg_names:
            kind = "i32"
            if argument in constants:
                kind = "constexpr"
            elif argument in ("p_first", "p_seed"):
                kind = "*i32"
            elif argument.startswith("p_"):
                kind = "*fp32" if argument in single else f"*{dtype}"
            elif argument in ("scale", "dropout", "eps"):
                kind = "fp32"
            signature[argument] = kind
        # Pointers and strides are multiples of 16, but for the rows of position scores, which are of 8.
        aligned = [n for n in kernel.arg_names if n.startswith(("p_", "s_")) and n not in constants and n != "s_pi"]
        attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
        source = ASTSource(kernel, signature, constants, attributes)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [cuobjdump(), "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
            ).stdout
        numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        found[name] = {**numbers, "SHARED": compiled.metadata.shared}
    return found


def cuobjdump() -> str:
    import triton

    carried = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(carried) if carried.exists() else shutil.which("cuobjdump") or ""


@pytest.mark.parametrize(("head", "dtype"), [(48, "bf16"), (64, "bf16"), (128, "bf16"), (64, "fp32")])
def test_no_spills(head, dtype):
    pytest.importorskip("triton")
    if not cuobjdump() or not os.access(cuobjdump(), os.X_OK):
        pytest.skip("no cuobjdump: Triton for this platform does not carry NVIDIA's tools")
    root = Path(__file__).parent.parent
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.test_fused_resources", str(head), dtype]
    printed = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr[-3000:]
    for kernel, used in json.loads(printed.stdout.splitlines()[-1]).items():
        assert used["REG"] <= REGISTERS, (kernel, used)
        assert used["LOCAL"] == 0 and used["STACK"] == 0, (kernel, used)
        assert used["SHARED"] <= SHARED_BYTES, (kernel, used)


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]), sys.argv[2])))
