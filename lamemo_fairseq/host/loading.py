"""End threads that load batches ahead, before the interpreter ends, and before other threads load from the same split.

fairseq does not end these threads when a training stops inside an epoch. Python then ends the threads wherever they
are. A thread that is inside torch then aborts the process (SIGABRT), after a training that had succeeded. After every
validation of ``--max-valid-steps`` one more thread would hold its batches for ever. With workers, a thread would also
hold the files that its batches are shared through, until no more can be opened.

Workers start with every epoch. In a rank that fairseq has spawned they would be spawned too, and import everything
before they load a batch: ten seconds an epoch. Here they are started as in any other process.
"""

import atexit
import contextlib
import multiprocessing
import queue
import time
from typing import Any
from weakref import WeakSet

from fairseq.data.iterators import BufferedIterator

PATIENCE = 10.0  # seconds; a thread that loads for longer is left alone

_loading: "WeakSet[BufferedIterator]" = WeakSet()


def end_at_exit(batches: Any) -> None:
    """End the thread that loads *batches* ahead when the process ends, if there is one.

    Call this again when there is a batch: the hook registered last runs first. When torch starts workers, it registers
    a hook that waits seconds for each of them in vain (before 2.13).
    """
    if isinstance(batches, BufferedIterator):
        _loading.add(batches)
        atexit.unregister(_end_all)
        atexit.register(_end_all)


def end(batches: Any) -> None:
    """End the thread that loads *batches* ahead, if there is one. To read on is then an error; workers stay."""
    if isinstance(batches, BufferedIterator) and batches._consumer is not None:
        _end_thread(batches, time.monotonic() + PATIENCE)
        with contextlib.suppress(queue.Full):
            batches._queue.put_nowait(RuntimeError("another iterator over the same split was begun: read that one"))


def start_workers_as_by_default() -> None:
    """From now on, start processes by the system's default method, also in a process that was itself spawned."""
    if multiprocessing.parent_process() is not None:
        multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)


def _end_all() -> None:
    deadline = time.monotonic() + PATIENCE
    begun = [batches for batches in list(_loading) if batches._consumer is not None]
    for batches in begun:
        _end_thread(batches, deadline)
    for batches in begun:
        workers = getattr(batches._iterable, "_iterator", None)
        if workers is not None and not batches._consumer.is_alive():
            with contextlib.suppress(RuntimeError):
                workers._shutdown_workers()  # with the thread that pins their batches
            # Python 3.12 starts no thread at exit, as torch does to wake that one.
            pins = getattr(workers, "_pin_memory_thread", None)
            if pins is not None and pins.is_alive():
                pins.join(0.5)


def _end_thread(batches: BufferedIterator, deadline: float) -> None:
    thread = batches._consumer
    thread._max_len = 0  # it loads no further batch
    while thread.is_alive() and time.monotonic() < deadline:
        _drop(batches._queue)
        thread.join(0.05)
    _drop(batches._queue)


def _drop(loaded: "queue.Queue[Any]") -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            loaded.get_nowait()
