"""What kernels need of a Hopper GPU, from compilation alone: for sm_90, in a process without Triton's interpreter."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import pytest

SHARED_BYTES = 227 * 1024  # of a thread block on sm_90
REGISTERS = 255
Usage = Dict[str, Any]


def used(
    kernel: Any,
    constants: Dict[str, Any],
    kinds: Dict[str, str],
    divisible: Sequence[str],
    options: Optional[Dict[str, Optional[int]]] = None,
) -> Tuple[Usage, str]:
    """Compile a kernel: registers, stack, spills and shared memory, and the PTX.

    Args:
        constants: values of constexpr arguments, others left out.
        kinds: Triton's types of the other arguments (i32 if not named).
        divisible: arguments that are multiples of 16.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in kernel.arg_names}
    given = [n for n in divisible if n in kernel.arg_names and n not in constants]
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in given}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options or {})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [cuobjdump(), "--dump-resource-usage", file.name]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}
    # ptxas 12.8, which Triton 3.6 carries, loses the constant of such an addition if one half alone is read.
    assert "add.s16x2" not in compiled.asm["ptx"], f"{kernel.fn.__name__} adds pairs of 16 bits, as `%` of indices may"
    return {**numbers, "SHARED": compiled.metadata.shared}, compiled.asm["ptx"]


def cuobjdump() -> str:
    import triton

    carried = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(carried) if carried.exists() else shutil.which("cuobjdump") or ""


def usages(module: str, *cases: Sequence[object]) -> List[Dict[str, Usage]]:
    """Usages by kernel, none of them beyond what the GPU has, as `compile_all` of a test's module tells of each case.

    All cases are compiled in one process without Triton's interpreter.
    """
    pytest.importorskip("triton", minversion="3.3")  # before, kernels were described to the compiler otherwise
    if not cuobjdump() or not os.access(cuobjdump(), os.X_OK):
        pytest.skip("no cuobjdump: Triton for this platform does not carry NVIDIA's tools")
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    command = [sys.executable, "-m", "tests.core.hosts", "tests.core.resources", module, json.dumps(cases)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: List[Dict[str, Usage]] = json.loads(done.stdout.splitlines()[-1])
    for case, kernels in zip(cases, found, strict=True):
        assert kernels
        for kernel, usage in kernels.items():
            assert usage["REG"] <= REGISTERS, (case, kernel, usage)
            assert usage["LOCAL"] == 0 and usage["STACK"] == 0, (case, kernel, usage)
            assert usage["SHARED"] <= SHARED_BYTES, (case, kernel, usage)
    return found


if __name__ == "__main__":
    compile_all = importlib.import_module(sys.argv[1]).compile_all
    print(json.dumps([compile_all(*case) for case in json.loads(sys.argv[2])]))
