"""Threads that load batches ahead are ended before the interpreter.

fairseq leaves them to themselves when a training stops inside an epoch. Python then takes them down wherever they are,
and one that is inside torch takes the process with it: SIGABRT, after a training that had succeeded.
"""

import atexit
import contextlib
import queue
import time
from typing import Any
from weakref import WeakSet

from fairseq.data.iterators import BufferedIterator

PATIENCE = 10.0  # seconds; what loads for longer is left alone

_loading: "WeakSet[BufferedIterator]" = WeakSet()


def end_at_exit(batches: Any) -> None:
    """End what loads *batches* when the process ends, if they are loaded ahead."""
    if isinstance(batches, BufferedIterator):
        _loading.add(batches)


# After torch's own and multiprocessing's have been registered, so before them.
@atexit.register
def _end_all() -> None:
    deadline = time.monotonic() + PATIENCE
    for batches in list(_loading):
        _end(batches, deadline)


def _end(batches: BufferedIterator, deadline: float) -> None:
    thread = batches._consumer
    if thread is None:
        return
    thread._max_len = 0  # no batch after the one that it is loading
    while thread.is_alive() and time.monotonic() < deadline:
        with contextlib.suppress(queue.Empty):
            while True:
                batches._queue.get_nowait()
        thread.join(0.05)
    workers = getattr(batches._iterable, "_iterator", None)
    if workers is not None and not thread.is_alive():
        workers._shutdown_workers()  # with the thread that pins what they load
