"""Text files and prompts: UTF-8, with or without a byte order mark, or refused."""

import contextlib
import os
import sys
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from ..core.names import nearest_path
from ..core.text.encoding import MARK

_REMEDY = "save it as UTF-8 (iconv -f latin1 -t utf-8, or -f utf-16)"


def read_text(path: str) -> str:
    """Return the text of a file without its byte order mark.

    Raises:
        ValueError: the file is not UTF-8, or holds NUL bytes as UTF-16 and binary files do.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read()
    try:
        text = content.decode("utf-8")
        wrong = content.find(b"\0")
    except UnicodeDecodeError as error:
        text, wrong = "", error.start
    if wrong >= 0:
        line = content.count(b"\n", 0, wrong) + 1
        raise ValueError(
            f"{path} is not text in UTF-8: line {line:,} has {content[wrong : wrong + 1]!r} (at byte {wrong:,} of the "
            f"file): {_REMEDY}"
        )
    return text.removeprefix(MARK)


def clean_prompt(line: str) -> str:
    """Return a line of a prompt without a byte order mark at its beginning.

    Raises:
        ValueError: the line is not UTF-8, or holds NUL characters.
    """
    line = line.lstrip(MARK)
    if "\0" in line or any("\ud800" <= character <= "\udfff" for character in line):
        raise ValueError(f"the prompt {line[:80]!r} is not text in UTF-8: {_REMEDY}")
    return line


def check_input(cfg: Any) -> None:
    """Check that the prompts of ``--input`` can be read; ``-`` stands for the standard input.

    Undecodable bytes of the standard input are kept until `clean_prompt` names the prompt that has them.

    Args:
        cfg: options of the task, with the option as ``input``. Outside of a command there is no such option.

    Raises:
        ValueError, OSError: the prompts cannot be read.
    """
    try:
        path = str(cfg.input)
    except OmegaConfBaseException:
        return
    if path == "-":
        stdin: Any = sys.stdin
        # A notebook has another stdin, and a stream that is closed or has been read from stays as it is.
        with contextlib.suppress(AttributeError, ValueError):
            stdin.reconfigure(errors="surrogateescape", newline=None)  # None: any line end, as in files
    elif path.startswith("${"):
        return
    elif not os.path.exists(path) or os.path.isdir(path):
        remedy = nearest_path(path) or "; without the option, prompts come from stdin"
        raise FileNotFoundError(f"--input {path}: there is no such file{remedy}")
    elif os.path.isfile(path):  # a pipe can be read only once
        read_text(path)
