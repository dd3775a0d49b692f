"""Download files, go on where a download stopped, and accept nothing but the right file."""

import email.utils
import http.client
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .files import Identity, no_room

TIMEOUT = 60  # seconds without a byte
ATTEMPTS = 5  # attempts in a row that bring nothing, for each address
LONGEST_PAUSE = 120  # seconds that a server may ask for
_AGENT = {"User-Agent": "lamemo-fairseq"}  # some servers turn Python's own name away
_TROUBLE = (urllib.error.URLError, http.client.HTTPException, OSError, ValueError)
_AGAIN = (408, 429)  # answers that may differ later, besides 5xx


class DownloadError(Exception):
    """No address gave the file."""


class _WrongFile(Exception):
    """An address gave another file."""


def download(
    addresses: Sequence[str],
    path: Path,
    sha256: str | None,
    size: int | None = None,
    wait: float = 2.0,
    at_most: int | None = None,
    quiet: bool = False,
) -> None:
    """Fetch a file from the first address that has it.

    The bytes received so far are stored beside *path* with ``.part`` behind its name, also if the process dies. The
    next call asks for the rest only. The file gets its own name when its checksum is right, and is deleted when it is
    wrong.

    Args:
        sha256: None if the checksum is not known. Then a download does not go on from bytes that another process left.
        size: in bytes, to recognise another file before it is fetched, and a cut one. None if the size is not known.
        wait: seconds before the second attempt; each later one waits twice as long, or as long as the server asks.
        at_most: largest possible size of the file in bytes, where *size* is not known.
        quiet: whether to leave out the progress bar.

    Raises:
        DownloadError: no address gave the file; the message says what each answered.
        OSError: there is no room on the disk.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    if sha256 is None:
        part.unlink(missing_ok=True)
    answers = []
    for address in addresses:
        try:
            _fetch(address, part, sha256, size, wait, at_most if size is None else size, quiet)
            os.replace(part, path)
            return
        except (_WrongFile, *_TROUBLE) as error:
            if no_room(error):
                raise
            if _length(part) == 0:
                part.unlink(missing_ok=True)
            answers.append(f"{address}: {error}")
    length = _length(part)
    again = f"{length:,} bytes are kept and the same command goes on from there" if length else "run it again later"
    raise DownloadError(
        f"could not download {path.name}:\n  " + "\n  ".join(answers) + f"\n{again}, or fetch the file yourself and "
        "name it with --source"
    )


def _fetch(
    address: str, part: Path, sha256: str | None, size: int | None, wait: float, at_most: int | None, quiet: bool
) -> None:
    """Fetch all of the file into *part*, over as many connections as needed."""
    failures, mixed, again = 0, False, False
    while True:
        before = _length(part)
        mixed |= before > 0  # the bytes may have come from elsewhere, or from a file that changed meanwhile
        trouble: Exception = http.client.HTTPException("the connection was cut")
        asked = 0.0
        try:
            whole = _receive(address, part, size, at_most, quiet)
        except urllib.error.HTTPError as error:
            error.close()
            # 416: nothing is left to send, so the part is the file, or longer than it.
            whole, trouble = error.code == 416 and before > 0, error
            if not whole and error.code < 500 and error.code not in _AGAIN:
                raise
            asked = _pause_asked_for(error.headers.get("Retry-After"))
        except _TROUBLE as error:
            if no_room(error):
                raise
            whole, trouble = False, error
        if whole:
            if sha256 is None or (digest := Identity.of(part).sha256) == sha256:
                return
            part.unlink()
            if not mixed or again:
                raise _WrongFile(f"the file there is another: its sha256 is {digest}, not {sha256}")
            mixed, again = False, True  # once more, from the start
            continue
        failures = 1 if _length(part) > before else failures + 1
        if failures >= ATTEMPTS:
            raise trouble
        pause = max(wait * 2 ** (failures - 1), asked)
        tqdm.write(f"{address}: {trouble}; trying again in {pause:.0f} seconds", file=sys.stderr)
        time.sleep(pause)


def _receive(address: str, part: Path, size: int | None, at_most: int | None, quiet: bool) -> bool:
    """Append the bytes of one connection to *part*. Return whether the file is whole, as far as can be told."""
    start = _length(part)
    request = urllib.request.Request(address, headers=_AGENT | ({"Range": f"bytes={start}-"} if start else {}))
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        start = _first_byte(answer, start)
        length = _announced(answer)
        total = None if length is None else start + length
        if size is not None and total not in (None, size):
            raise _WrongFile(f"the file there has {total:,} bytes, not {size:,}")
        bar = tqdm(
            desc=part.stem,
            total=total or size,
            initial=start,
            unit="B",
            unit_scale=True,
            mininterval=1,
            disable=quiet,
        )
        with bar, open(part, "ab" if start else "wb") as file:
            while block := answer.read1(1 << 16):
                if at_most is not None and file.tell() + len(block) > at_most:
                    file.truncate(start)
                    raise _WrongFile(f"the file there has more than {at_most:,} bytes, and is another")
                file.write(block)
                bar.update(len(block))
            expected = size if total is None else total
            return expected is None or file.tell() == expected


def _first_byte(answer: Any, asked: int) -> int:
    """Return the position of the first byte sent: *asked*, or 0 from a server that sends whole files only."""
    if answer.status != 206:
        return 0
    sent = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    if sent is None or int(sent[1]) == asked:
        return asked
    if int(sent[1]) == 0:
        return 0
    raise http.client.HTTPException(f"the server sent the file from byte {int(sent[1]):,}, not from {asked:,}")


def _announced(answer: Any) -> int | None:
    """Return the number of bytes to come, None if the server does not say."""
    if isinstance(answer, http.client.HTTPResponse):
        return answer.length
    length = answer.headers.get("Content-Length", "")  # of a local file
    return int(length) if length.isdecimal() else None


def _pause_asked_for(header: str | None) -> float:
    """Return the seconds that a server asks to be left alone, within bounds; the server may give seconds or a date."""
    try:
        seconds = float(header or 0)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(str(header)).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), LONGEST_PAUSE) if seconds == seconds else 0.0


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
