"""The files that docs/extending.md adds to a checkout, each from its code blocks."""

import re
from pathlib import Path
from typing import Dict

PAGE = (Path(__file__).parents[1] / "docs/extending.md").read_text(encoding="utf-8")


def files_of_page() -> Dict[str, str]:
    """Return the text of every file by its path in a checkout, which is the first line of its blocks."""
    files: Dict[str, str] = {}
    for name, text in re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.S):
        files[name] = files.get(name, "") + text
    assert PAGE.count("```python\n") == len(re.findall(r"```python\n# lamemo_fairseq/\S+\.py\n", PAGE))
    return files
