"""Imported before anything else by the packages that need fairseq: the error says what is missing, and what is not."""

import importlib.util

if importlib.util.find_spec("fairseq") is None:
    raise ModuleNotFoundError(
        "fairseq is not installed: on Python 3.10 to 3.13 install lamemo-fairseq[fairseq]; "
        "lamemo_fairseq.core needs torch alone and works without",
        name="fairseq",
    )
