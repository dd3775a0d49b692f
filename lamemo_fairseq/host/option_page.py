"""Render the page of options: this package's with their defaults, and fairseq's that do not apply to streams.

``python -m lamemo_fairseq.host.option_page > docs/options.md`` writes the page.
"""

from typing import Tuple

from ..core.names import option_name
from . import absent_options
from .option_defaults import render_defaults
from .option_rules import COMMANDS, EVALUATION, HYDRA, IGNORED, NOTED, REFUSED, TRAINING
from .option_table import all_rules


def render() -> str:
    """Return the table in Markdown."""
    sections = [_HEAD, render_defaults(), _REST]
    for effect, heading in _HEADINGS.items():
        sections.append(f"### {heading}\n\n| option | command | reason, and what to do |\n|---|---|---|")
        for rule in all_rules():
            if rule.effect == effect:
                options = ", ".join(f"`{option_name(option)}`" for option in rule.options)
                sections.append(f"| {options} | {_named(rule.commands)} | {rule.reason} |")
        sections.append("")
    return "\n".join([*sections, absent_options.render(), _TAIL])


def _named(commands: Tuple[str, ...]) -> str:
    for name, those in {"all": COMMANDS, "training": TRAINING, "evaluation": EVALUATION}.items():
        if set(commands) == set(those):
            return name
    return ", ".join(f"`{command}`" for command in commands if command != HYDRA)


_HEADINGS = {
    REFUSED: "Refused",
    IGNORED: "Ignored with a warning",
    NOTED: "Used with a warning",
}

_HEAD = """# Options

This page has two parts: the options of this package with their defaults, and the options of fairseq that do not simply
work with them. All other options are fairseq's own, and do what `fairseq-train --help` says. `preprocess`, `score`,
`analysis`, `convert_checkpoint` and `examples.tables` list theirs with `--help`.

`python -m lamemo_fairseq.host.option_page > docs/options.md` writes this page, and a test compares it with the code.
"""

_REST = """## Options of fairseq that do not apply to streams

fairseq's commands list the options of all its models. With `--task segment_language_modeling` an option works, is
refused in one line that says what to do, or is ignored with a warning. The tables below have those that do not simply
work; `tests/test_options.py` asks for every option of every command. `training` is `fairseq-train` and
`fairseq-hydra-train`, `evaluation` the other four commands. A refused option may be given with its default value. In a
YAML an option counts as given if it differs from its default.
"""

_TAIL = """### Out of reach

- Without `--user-dir`, or with a folder that is not there, none of this code is loaded. fairseq then lists the tasks
  that it knows (`invalid choice: 'segment_language_modeling'`), or names the folder.
- hydra reads its overrides before it loads the package. An option of the model or the task that a YAML does not hold
  needs a `+`, as in `+model.mem_len=300`; hydra's message ends with that advice. fairseq's own options, such as
  `common.cpu=true`, never do. hydra does not know `task=NAME` and `model=NAME`: write `task._name=NAME`.
"""

if __name__ == "__main__":
    print(render(), end="")
