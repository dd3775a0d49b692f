"""Read from a data folder how its text became tokens: `python -m preprocess` records it in ``preprocess.json``."""

import json
import os
from importlib.util import find_spec
from typing import Any, Dict, Optional

from ..core.text.encoding import MODEL, TextEncoding

RECORD = "preprocess.json"

# Within the package where it is installed, beside it in a checkout.
_INSTALLED = "lamemo_fairseq.preprocess"
PREPROCESS = f"python -m {_INSTALLED if find_spec(_INSTALLED) else 'preprocess'}"

_WHOLE_TEXT = {"bytes": "bytes", "text8": "characters", "letters": "characters"}


def read_text_encoding(folder: str) -> Optional[TextEncoding]:
    """Return the record of a folder, None if it has no record, as with data of fairseq-preprocess.

    Raises:
        ValueError: the record is damaged.
    """
    path = os.path.join(folder, RECORD)
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
        return _read(record, folder)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}): make the data again with {PREPROCESS}, or "
            "delete this file, and name tokenizer and pieces on the command line"
        ) from error


def _read(record: Dict[str, Any], folder: str) -> TextEncoding:
    settings = record["made_from"]["settings"]["tokenizer"]
    name = settings["name"]
    if name in _WHOLE_TEXT:
        return TextEncoding("none", _WHOLE_TEXT[name], normalized=name == "text8")
    if name != "lines":
        raise ValueError(f"the tokenizer {name!r} is unknown")
    pieces = settings["bpe"] == "sentencepiece"
    return TextEncoding(
        tokenizer=settings["tokenizer"],
        pieces=settings["bpe"],
        pattern=settings["pattern"],
        source_lang=settings["source_lang"],
        model=os.path.join(folder, MODEL) if pieces else None,
        model_sha256=record["files"][MODEL]["sha256"] if pieces else "",
        paragraphs=settings.get("paragraphs", False),
    )
