"""Write files that are whole or missing, and identify files."""

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import IO, NamedTuple

BLOCK = 1 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def no_room(error: BaseException) -> bool:
    """Return whether a file could not be written for lack of disk space."""
    return isinstance(error, OSError) and error.errno in _NO_ROOM


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a new binary file that replaces *path* once it is complete and on disk.

    If the process dies, *path* is unchanged; the bytes written are left under a name that ends in ``.part``.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block


class Identity(NamedTuple):
    """The properties that tell one file from another."""

    name: str
    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path, name: str | None = None) -> "Identity":
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            for block in blocks(file):
                digest.update(block)
            return cls(name or path.name, file.tell(), digest.hexdigest())

    def is_at(self, path: Path) -> bool:
        """Tell whether *path* is this file; the size is compared first, since that costs nothing."""
        return path.is_file() and path.stat().st_size == self.size and self.of(path).sha256 == self.sha256


class Span(NamedTuple):
    """A range of bytes of a file."""

    path: Path
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def divided(self, ends: Iterable[int]) -> "list[Span]":
        """Divide this span at those of the *ends*, in bytes of the file, that lie within it."""
        bounds = [self.start, *(end for end in ends if self.start < end < self.stop), self.stop]
        return [Span(self.path, start, stop) for start, stop in pairwise(bounds)]

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return file.read(self.size)


def no_text(split: str, span: Span) -> ValueError:
    """Return the error on a split whose text is empty or blank."""
    has = f"{span.size:,} bytes without a word" if span.size else "0 bytes"
    return ValueError(f"there is no text for {split} in {span.path}: it has {has}, name another text with --source")
