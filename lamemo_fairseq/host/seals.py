"""Checksums of the files that torch writes.

Such a file is a zip archive. Its last bytes, the archive's comment, are a checksum of all before, which readers of zip
files skip. So every tool reads it, and a file that was cut short or changed is recognised.
"""

import hashlib
import os
import zipfile
from pathlib import Path
from typing import Optional, Tuple

_END = b"PK\x05\x06"  # begins the last record of a zip file, 22 bytes if there is no comment
_END_LENGTH = 22
_PREFIX = b"lamemo-fairseq sha256 "
_SEAL_LENGTH = len(_PREFIX) + 64


def seal(path: Path) -> None:
    """Add the checksum of its contents to a file that torch wrote."""
    with path.open("r+b") as file:
        file.seek(-_END_LENGTH, os.SEEK_END)
        end = file.read()
        if not (end.startswith(_END) and end.endswith(b"\0\0")):
            raise ValueError(f"{path} is not a file that torch.save wrote")
        file.seek(-2, os.SEEK_END)
        file.write(_SEAL_LENGTH.to_bytes(2, "little"))
        file.write(_PREFIX)
    digest = _digest(path, path.stat().st_size)
    with path.open("ab") as file:
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())


def is_sealed(path: Path) -> bool:
    """Return whether a file ends with a seal of `seal`, whatever is before it."""
    return path.is_file() and _ends(path)[1].startswith(_PREFIX)


def _ends(path: Path) -> Tuple[bytes, bytes]:
    """Return the first bytes of a file, and as many of its last bytes as a seal has."""
    with path.open("rb") as file:
        head = file.read(4)
        file.seek(-min(path.stat().st_size, _SEAL_LENGTH), os.SEEK_END)
        return head, file.read()


def damage_of(path: Path) -> Optional[str]:
    """Return the damage of a file, None if it is whole. Without a seal, torch's own checksums of each part tell."""
    size = path.stat().st_size
    head, tail = _ends(path)
    if size > _SEAL_LENGTH and tail.startswith(_PREFIX):
        return None if _digest(path, size - 64) == tail[-64:] else "its checksum does not match"
    if size < _END_LENGTH:
        return f"it has {size} bytes"
    if head == b"PK\x03\x04":
        if not (tail[-_END_LENGTH:].startswith(_END) and tail.endswith(b"\0\0")):
            return "its end is missing"
        try:
            member = zipfile.ZipFile(path).testzip()
        except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
            return str(error)
        if member is not None:
            return f"the checksum of its part {member} does not match"
    return None


def _digest(path: Path, length: int) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while length > 0 and (block := file.read(min(length, 1 << 22))):
            digest.update(block)
            length -= len(block)
    return digest.hexdigest().encode()
