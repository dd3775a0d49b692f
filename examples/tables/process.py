"""Run commands in processes of their own, which end when the runner does."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Sequence

_ALIVE: Dict[int, "subprocess.Popen[bytes]"] = {}
_LOCK = threading.Lock()
# Set when the runner is asked to stop: nothing more is started.
STOPPED = threading.Event()


class Ended(NamedTuple):
    """The result of a command that ended."""

    code: int
    memory_gib: float  # the peak of its resident memory on the host


def run(
    argv: Sequence[str],
    log: Path,
    environment: Dict[str, str],
    keep_open: Sequence[int] = (),
    watch: Callable[[], None] = lambda: None,
) -> Ended:
    """Run a command to its end, and add its output to *log*.

    Args:
        environment: variables besides those of the runner.
        keep_open: file descriptors that the command inherits.
        watch: called every two seconds.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output, _LOCK:
        if STOPPED.is_set():
            return Ended(-signal.SIGTERM, 0.0)
        process = subprocess.Popen(
            list(argv),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            pass_fds=tuple(keep_open),
        )
        _ALIVE[process.pid] = process
    seen, peak = time.monotonic(), 0.0
    while True:
        peak = peak_gib(process.pid) or peak
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        time.sleep(0.05)
        if time.monotonic() - seen > 2:
            seen = time.monotonic()
            watch()
    process.returncode = os.waitstatus_to_exitcode(status)
    with _LOCK:
        del _ALIVE[process.pid]
    # The kernel's peak includes the memory that this process used when it started the command.
    largest = in_gib(usage.ru_maxrss)
    return Ended(process.returncode, round(min(peak or largest, largest), 3))


def in_gib(maxrss: int) -> float:
    """Return ``ru_maxrss`` in GiB: it is in KiB, on macOS in bytes."""
    return round(maxrss / (2**30 if sys.platform == "darwin" else 2**20), 3)


def peak_gib(pid: int) -> float:
    """Return the peak so far of a process's resident memory in GiB, where /proc tells it; else 0."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM:")), 0.0)


def stop() -> List[int]:
    """End all running commands, and start no other."""
    with _LOCK:
        STOPPED.set()
        for process in _ALIVE.values():
            process.send_signal(signal.SIGTERM)
        return list(_ALIVE)
