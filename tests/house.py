"""The state of the code in numbers: python tests/house.py [ROOT OF A CHECKOUT ...]

Each number has a goal. Two checkouts side by side show what a change did.
"""

import ast
import re
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Tuple

LONG_FUNCTION, LONG_FILE = 60, 400
QUESTIONS = ("What", "Whether", "How", "Which", "Where")
EVERYDAY = ("found", "held", "kept", "rows", "parts", "step", "place", "figures")


class House(NamedTuple):
    """What was counted in the package of one checkout."""

    lines: int
    any_in_core: float  # uses of Any a thousand lines
    any_in_package: float
    replaced: int  # functions of fairseq
    functions: List[int]  # lines of each, outside kernels
    long_functions: List[str]
    long_files: List[str]
    questions: Tuple[int, int]  # docstrings that begin with one of QUESTIONS, of all
    everyday: Dict[str, int]  # assignments to each of EVERYDAY


def house(root: Path) -> House:
    """Count in the package below *root*."""
    package = root / "lamemo_fairseq"
    core = package / "core"
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))}
    in_core = {path: text for path, text in texts.items() if core in path.parents or not core.is_dir()}
    functions = {
        f"{path.relative_to(root)}:{node.lineno} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for path, text in texts.items()
        if "kernel" not in path.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    starts = [start for text in texts.values() for start in _docstring_starts(text)]
    assigned = Counter(name for text in texts.values() for name in _assigned(text))
    return House(
        lines=_lines(texts.values()),
        any_in_core=_any(in_core.values()),
        any_in_package=_any(texts.values()),
        replaced=sum(len(re.findall(r"^@stand_in\(|^\s+stand_in\(", text, re.M)) for text in texts.values()),
        functions=list(functions.values()),
        long_functions=[name for name, lines in functions.items() if lines > LONG_FUNCTION],
        long_files=[str(path.relative_to(root)) for path, text in texts.items() if text.count("\n") > LONG_FILE],
        questions=(sum(start in QUESTIONS for start in starts), len(starts)),
        everyday={name: assigned[name] for name in EVERYDAY},
    )


def _lines(texts) -> int:
    return sum(text.count("\n") for text in texts)


def _any(texts) -> float:
    return 1000 * sum(len(re.findall(r"\bAny\b", text)) for text in texts) / _lines(texts)


def _docstring_starts(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring.split()[0]


def _assigned(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def main(roots: List[Path]) -> None:
    houses = [house(root) for root in roots]
    table = {
        "lines of the package": [h.lines for h in houses],
        "Any a thousand lines of the core (goal 6)": [f"{h.any_in_core:.1f}" for h in houses],
        "Any a thousand lines of the package": [f"{h.any_in_package:.1f}" for h in houses],
        "functions of fairseq replaced (goal 8)": [h.replaced for h in houses],
        "lines of a function, median": [int(statistics.median(h.functions)) for h in houses],
        f"functions over {LONG_FUNCTION} lines outside kernels (goal 0)": [len(h.long_functions) for h in houses],
        f"files over {LONG_FILE} lines (goal 0)": [len(h.long_files) for h in houses],
        f"docstrings that begin with {', '.join(QUESTIONS)} (goal 5%)": [
            f"{h.questions[0]} of {h.questions[1]}" for h in houses
        ],
        **{f"assignments to '{name}'": [h.everyday[name] for h in houses] for name in EVERYDAY},
    }
    for name, values in table.items():
        print(f"{name:<75}", *(f"{value!s:>12}" for value in values))
    for name in houses[-1].long_functions + houses[-1].long_files:
        print("too long:", name)


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]] or [Path(__file__).parent.parent])
