"""What kernels need of a Hopper GPU, from compilation alone: for sm_90, in a process without Triton's interpreter."""

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
    options: Optional[Dict[str, int]] = None,
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
    return {**numbers, "SHARED": compiled.metadata.shared}, compiled.asm["ptx"]


def cuobjdump() -> str:
    import triton

    carried = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(carried) if carried.exists() else shutil.which("cuobjdump") or ""


def printed_by(module: str, *arguments: object) -> Dict[str, Usage]:
    """What a test's module prints as a program: usages by kernel, none of them beyond what the GPU has."""
    pytest.importorskip("triton", minversion="3.3")  # before, kernels were described to the compiler otherwise
    if not cuobjdump() or not os.access(cuobjdump(), os.X_OK):
        pytest.skip("no cuobjdump: Triton for this platform does not carry NVIDIA's tools")
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    command: List[str] = [sys.executable, "-m", "tests.core.hosts", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: Dict[str, Usage] = json.loads(done.stdout.splitlines()[-1])
    assert found
    for kernel, usage in found.items():
        assert usage["REG"] <= REGISTERS, (kernel, usage)
        assert usage["LOCAL"] == 0 and usage["STACK"] == 0, (kernel, usage)
        assert usage["SHARED"] <= SHARED_BYTES, (kernel, usage)
    return found
