"""Downloads that go on where they stopped, and keep nothing but the right file."""

import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from .files import Identity

TIMEOUT = 60  # seconds without a byte
ATTEMPTS = 5  # in a row that bring nothing, for each address
_AGENT = {"User-Agent": "lamemo-fairseq"}  # some servers turn Python's own name away
_TROUBLE = (urllib.error.URLError, http.client.HTTPException, OSError)


class DownloadError(Exception):
    """No address gave the file."""


class _WrongFile(Exception):
    """An address gave another file."""


def download(addresses: Sequence[str], path: Path, sha256: str, size: int | None = None, wait: float = 2.0) -> None:
    """Fetch a file from the first address that has it.

    What has come so far is kept beside *path* with ``.part`` behind its name, also if the process dies; the next call
    asks for the rest only. The file gets its own name when its checksum is right, and is deleted when it is wrong.

    Args:
        size: in bytes, to tell another file before it is fetched. None if it is not known.
        wait: seconds before the second attempt; each one after it waits twice as long.

    Raises:
        DownloadError: saying what each address answered.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    answers = []
    for address in addresses:
        try:
            _fetch(address, part, sha256, size, wait)
            os.replace(part, path)
            return
        except (_WrongFile, *_TROUBLE) as error:
            answers.append(f"{address}: {error}")
    kept = _length(part)
    again = f"{kept:,} bytes are kept and the same command goes on from there" if kept else "run it again later"
    raise DownloadError(
        f"could not download {path.name}:\n  " + "\n  ".join(answers) + f"\n{again}, or fetch the file yourself and "
        "name it with --source"
    )


def _fetch(address: str, part: Path, sha256: str, size: int | None, wait: float) -> None:
    """All of the file into *part*, over as many connections as it takes."""
    failures, resumed = 0, _length(part) > 0
    while True:
        before = _length(part)
        trouble: Exception = http.client.HTTPException("the connection was cut")
        try:
            whole = _receive(address, part, size)
        except urllib.error.HTTPError as error:
            error.close()
            # 416: nothing is left to send, so the part is the file, or longer than it.
            whole, trouble = error.code == 416 and before > 0, error
            if not whole and error.code < 500:
                raise
        except _TROUBLE as error:
            whole, trouble = False, error
        if whole:
            found = Identity.of(part).sha256
            if found == sha256:
                return
            part.unlink()
            if not resumed:
                raise _WrongFile(f"the file there is another: its sha256 is {found}, not {sha256}")
            resumed = False  # the beginning may have come from elsewhere: once more, from the start
            continue
        failures = 1 if _length(part) > before else failures + 1
        if failures >= ATTEMPTS:
            raise trouble
        pause = wait * 2 ** (failures - 1)
        tqdm.write(f"{address}: {trouble}; trying again in {pause:.0f} seconds", file=sys.stderr)
        time.sleep(pause)


def _receive(address: str, part: Path, size: int | None) -> bool:
    """One connection's worth, behind what there is. Returns whether the file is whole."""
    start = _length(part)
    request = urllib.request.Request(address, headers=_AGENT | ({"Range": f"bytes={start}-"} if start else {}))
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        if answer.status != 206:  # this server sends whole files only
            start = 0
        length = answer.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        if size is not None and total not in (None, size):
            raise _WrongFile(f"the file there has {total:,} bytes, not {size:,}")
        bar = tqdm(desc=part.stem, total=total or size, initial=start, unit="B", unit_scale=True, mininterval=1)
        with bar, open(part, "ab" if start else "wb") as file:
            while block := answer.read(1 << 16):
                file.write(block)
                bar.update(len(block))
            return total is None or file.tell() == total


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
