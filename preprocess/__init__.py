"""From text to fairseq's binary format: `python -m preprocess --help`, and README.md beside this file."""

from lamemo_fairseq import needs_fairseq  # noqa: F401
