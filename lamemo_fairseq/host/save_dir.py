"""The lock on ``--save-dir``: two trainings would overwrite each other's checkpoints there.

The first rank has it. The kernel ends it with the process, also after SIGKILL, and forked processes do not have it:
those that load data may live on for some seconds.
"""

import contextlib
import logging
import os
import socket
from typing import Optional

from ..locks import lock

logger = logging.getLogger(__name__)

PATIENCE = 10.0  # seconds, for a run that is just ending, as where a scheduler starts it again
LOCK = ".lock"

_descriptor: Optional[int] = None  # of the lock that this process has


def claim(folder: str, suffix: str = "") -> None:
    """Lock a folder, in place of a former one, until `release` or the end of this process.

    Args:
        suffix: ``--checkpoint-suffix``; trainings with different ones have different files.

    Raises:
        BlockingIOError: another process trains there.
    """
    global _descriptor
    release()
    path = os.path.join(os.path.abspath(folder), LOCK + suffix)
    try:
        os.makedirs(folder, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:  # as for another user's file; whether checkpoints can be written is fairseq's to find out
        logger.warning(
            "--save-dir %s cannot be locked (%s): start no second run there meanwhile", folder, error.strerror
        )
        return
    try:
        _lock(descriptor, folder, path)
    except BaseException:
        os.close(descriptor)
        raise
    _descriptor = descriptor
    with contextlib.suppress(OSError):  # as on a full disk: the words are for a message only
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)


def _lock(descriptor: int, folder: str, path: str) -> None:
    try:
        return lock(descriptor, folder)
    except BlockingIOError:
        other = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
        logger.info("--save-dir %s: waiting up to %.0f seconds for the end of %s", folder, PATIENCE, other)
    try:
        lock(descriptor, folder, PATIENCE)
    except BlockingIOError:
        raise BlockingIOError(
            f"--save-dir {folder}: {other} is training there. Wait for it or end it, or pass another --save-dir (if "
            f"that machine is gone, remove {path})"
        ) from None


def release() -> None:
    """Let other processes train in the folder that was locked last."""
    global _descriptor
    if _descriptor is not None:
        os.close(_descriptor)
        _descriptor = None
