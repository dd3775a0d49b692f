"""Imports go down: from the host's side to the core, and within the core from the model to its kernels."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "lamemo_fairseq"

# From the bottom up. Modules of one line do not import one another.
PACKAGE = [
    "core needs_fairseq refusals",
    "huggingface lm_eval arguments locks",
    "criterions",
    "host",
    "data",
    "evaluation",
    "generation",
    "models tasks",
    "checkpoints",
    "analysis convert_checkpoint score",
]
CORE = [
    "registry names fields released",
    "text",
    "kernels",
    "attention gradients",
    "positions",
    "layers",
    "decoding",
    "memory",
    "aliases",
    "graphs config",
    "diagonal",
    "segments",
    "decoder",
    "folder reader",
    "model",
]


def modules():
    """Every module of the package, by its path from the root: ``("core", "memory", "base")``."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield (parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(modules())


def imports(module, path):
    """The modules of the package that one imports anywhere in it, within functions too."""
    package = module if path.name == "__init__.py" else module[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*package[: len(package) - node.level + 1], *(node.module or "").split("."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == ROOT.name:
            base = tuple(node.module.split(".")[1:])
        else:
            continue
        base = tuple(part for part in base if part)
        for name in (alias.name for alias in node.names):
            yield (*base, name) if (*base, name) in MODULES else base


def test_every_module_is_read():
    assert len(MODULES) > 150
    assert ("core", "memory", "position") in set(imports(("data", "segments"), MODULES["data", "segments"]))
    assert ("core", "kernels", "softmax_kernel") in set(
        imports(("core", "layers", "chunked_loss"), MODULES["core", "layers", "chunked_loss"])
    )


@pytest.mark.parametrize(("inside", "order"), [((), PACKAGE), (("core",), CORE)], ids=["package", "core"])
def test_no_import_goes_up(inside, order):
    height = {name: n for n, names in enumerate(order) for name in names.split()}
    depth = len(inside)
    for module, path in MODULES.items():
        if module[:depth] != inside or len(module) == depth:  # a package's own __init__ offers what is below
            continue
        for target in imports(module, path):
            if target[:depth] != inside or len(target) == depth or target[depth] == module[depth]:
                continue
            mine, its = module[depth], target[depth]
            assert mine in height and its in height, f"{mine} or {its} has no place in the order"
            assert height[its] < height[mine], f"{'.'.join(module)} imports {'.'.join(target)}, which is above it"


def test_no_module_imports_itself_in_the_end():
    """A package's `__init__` counts as a module: who imports from the package needs it whole."""
    graph = {module: set(imports(module, path)) - {module} for module, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_the_core_knows_no_host():
    for module, path in MODULES.items():
        if module[:1] == ("core",):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                for name in names:
                    assert name.split(".")[0] not in ("fairseq", "fairseq_cli", "omegaconf", "hydra"), path
