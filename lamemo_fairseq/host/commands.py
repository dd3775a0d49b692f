"""The modules of fairseq's commands, imported or run as scripts."""

import sys
from types import ModuleType
from typing import Iterator


def training_commands() -> Iterator[ModuleType]:
    """Yield the module of fairseq-train: imported, or run as a script, or both."""
    for name in ("fairseq_cli.train", "__main__"):
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "validate_and_save"):
            yield module
