"""Tests that need GPUs.

Apart from the other helpers, which are imported before processes are forked: none can use a GPU once its parent has
asked for one.
"""

import ast
from pathlib import Path

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = pytest.mark.gpu(1)  # skipped without one; tests that use DEVICE are marked by conftest.py
gpus = pytest.mark.gpu(2)


def users(path):
    """Names of the functions and classes of a file that use a GPU where there is one, as the text of the file has it.

    Those that name `gpu` or `gpus` are left out: their decorators mark them, or some of their cases.
    """
    tree = ast.parse(path.read_text())
    found = {"DEVICE"}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level and node.module:
            other = path.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(".py")
            if other.exists() and other != Path(__file__):
                found |= {alias.asname or alias.name for alias in node.names if alias.name in users(other)}
    named = {node.name: _named(node) for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    while new := {name for name, names in named.items() if names & found and not names & {"gpu", "gpus"}} - found:
        found |= new
    return found


def _named(function):
    """The names in a function, arguments too, and DEVICE for what it puts on a GPU by itself."""
    names, local = set(), set()
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.arg):  # such as a fixture
            names.add(node.arg)
        elif isinstance(node, ast.FunctionDef) and node is not function:
            local.add(node.name)
        elif (isinstance(node, ast.Attribute) and node.attr == "DEVICE") or _moves(node):
            names.add("DEVICE")
    return names - local


def _moves(node):
    """Return whether a call is one like ``x.cuda()``, ``x.to("cuda")`` or ``f(device="cuda")``."""
    if not isinstance(node, ast.Call):
        return False
    method = getattr(node.func, "attr", None)
    places = [keyword.value for keyword in node.keywords if keyword.arg == "device"] + node.args * (method == "to")
    return method == "cuda" or any(str(getattr(place, "value", "")).startswith("cuda") for place in places)


def check_marks(items):
    """See that ``-m gpu`` selects some of the tests, and all of those that use a GPU."""
    paths = {item.path for item in items}
    if len(paths) == 1:
        pytest.skip("checks the marks of the tests that it runs with")
    using = {path: users(path) for path in paths}
    marked = [item for item in items if item.get_closest_marker("gpu")]
    assert marked or len(paths) < len(list(next(iter(paths)).parent.glob("test_*.py")))
    names = {(item.path, getattr(item, "originalname", item.name)) for item in items if item not in marked}
    assert not {(path.name, name) for path, name in names if name in using[path]}
