"""The hosts of the core, which its tests block.

``python -m tests.core.hosts MODULE [arguments]`` runs a module without them.
"""

import runpy
import sys

HOSTS = ("fairseq", "fairseq_cli", "hydra", "omegaconf")


def block() -> None:
    """Let every import of a host fail in this process from here on, as if none were installed.

    Raises:
        RuntimeError: fairseq has been imported already.
    """
    if sys.modules.get("fairseq") is not None:
        raise RuntimeError(
            "tests/core runs without fairseq, which this process has imported: run pytest tests/core in its own"
        )
    for host in HOSTS:
        sys.modules[host] = None  # type: ignore[assignment]


if __name__ == "__main__":
    block()
    module = sys.argv[1]
    del sys.argv[:1]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
