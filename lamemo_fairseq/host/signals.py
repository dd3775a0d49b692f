"""The signals by which a scheduler ends a run: SIGTERM, some seconds before SIGKILL, or SIGUSR1.

A training heeds them between two updates, where it can be saved. A scheduler may send them to every process of a job,
and more than once: to the processes that load batches, and to one that has spawned the ranks.
"""

import multiprocessing
import os
import signal
import threading
from typing import Any, Callable, Dict, Optional

from torch.utils.data import get_worker_info

NUMBERS = (signal.SIGTERM, signal.SIGUSR1)

_received: Optional[int] = None  # by a training that has not yet heeded it
_former: Dict[int, Any] = {}  # handlers in place of which those of a training are


class Terminated(KeyboardInterrupt):
    """A scheduler asks the run to end.

    Args:
        number: the signal.
    """

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def begin_to_heed(can_save: Callable[[], bool]) -> None:
    """Note signals from now on, and raise `Terminated` at once if there is nothing to save. Threads heed none.

    Args:
        can_save: returns whether the training would be saved.
    """
    global _received

    def note(number: int, frame: Any) -> None:
        global _received
        if not can_save():
            raise Terminated(number)
        _received = number

    if _former or threading.current_thread() is not threading.main_thread():
        return
    _received = None
    for number in NUMBERS:
        _former[number] = signal.signal(number, note)


def end_heeding() -> None:
    """Put the handlers back that were there before."""
    while _former:
        number, handler = _former.popitem()
        signal.signal(number, handler)


def received() -> Optional[int]:
    """Return the signal that the training in this process has received, if any."""
    return _received


def heed_only_the_parent() -> None:
    """In a process that loads batches, ignore the signals unless the training itself ends this process.

    torch would end the training, in the middle of an update, when such a process is missing.
    """
    if get_worker_info() is None or not hasattr(signal, "sigwaitinfo"):
        return
    if signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS):
        threading.Thread(target=_wait_for_the_parent, daemon=True).start()


def _wait_for_the_parent() -> None:
    while signal.sigwaitinfo(NUMBERS).si_pid != os.getppid():
        pass
    os._exit(0)


def pass_on_to_ranks() -> None:
    """Let this process, if it spawns ranks, pass the signals on to them and end when they have ended."""
    if threading.current_thread() is threading.main_thread() and multiprocessing.parent_process() is None:
        for number in NUMBERS:
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, _pass_on)


def _pass_on(number: int, frame: Any) -> None:
    ranks = multiprocessing.active_children()
    if not ranks:  # it has spawned none, and trains by itself
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    for rank in ranks:
        if rank.pid is not None:
            os.kill(rank.pid, number)
    for rank in ranks:
        rank.join()
    raise SystemExit(128 + number)
