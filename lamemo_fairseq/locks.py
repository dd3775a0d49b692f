"""Locks on folders in which two commands at once would overwrite each other's files."""

import fcntl
import logging
import time
from typing import Callable

logger = logging.getLogger(__name__)


def lock(
    descriptor: int, folder: object, patience: float = 0.0, take: Callable[[int, int], None] = fcntl.lockf
) -> None:
    """Lock an open file of a folder; on a file system without locks, only warn.

    Args:
        patience: the seconds to wait for another process.
        take: ``fcntl.lockf`` or ``fcntl.flock``. The first one's lock ends with this process, or once it closes any
            descriptor of the file. The second one's ends once all processes that inherit the descriptor have closed it.

    Raises:
        BlockingIOError: another process has the lock.
    """
    until = time.monotonic() + patience
    while True:
        try:
            return take(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # which of the two depends on the system
            if time.monotonic() >= until:
                raise BlockingIOError(f"another process is at work in {folder}") from None
        except OSError as error:
            logger.warning(
                "%s: its file system has no locks (%s): start no second command there meanwhile", folder, error.strerror
            )
            return None
        time.sleep(0.1)
