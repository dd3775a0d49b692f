"""Locks on folders in which two commands at once would overwrite each other's files."""

import fcntl
import logging
import time

logger = logging.getLogger(__name__)


def lock(descriptor: int, folder: object, patience: float = 0.0) -> None:
    """Lock an open file of a folder; on a file system without locks, only warn.

    The lock is this process's, and no forked one's. It ends with the process, or once it closes the file.

    Args:
        patience: the seconds to wait for another process.

    Raises:
        BlockingIOError: another process has the lock.
    """
    until = time.monotonic() + patience
    while True:
        try:
            return fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # which of the two depends on the system
            if time.monotonic() >= until:
                raise BlockingIOError(f"another process is at work in {folder}") from None
        except OSError as error:
            logger.warning(
                "%s: its file system has no locks (%s): start no second command there meanwhile", folder, error.strerror
            )
            return None
        time.sleep(0.1)
