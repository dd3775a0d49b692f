"""Go from a table file to the table with one command: `python -m examples.tables TABLE.yaml`. See README.md."""

import importlib.util

if importlib.util.find_spec("omegaconf") is None:  # fairseq brings it
    from lamemo_fairseq import needs_fairseq  # noqa: F401
