"""Time the steps of one rank of a training run, by part: run by `scaling.py`.

python examples/benchmarks/timeline.py RESULT AT UPDATES ARGUMENTS   # of fairseq-train; profiled from update AT on
"""

import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

WAITS = ("cudaEventSynchronize", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")
ON_THE_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
Interval = tuple[float, float]


def busy(intervals: Iterable[Interval]) -> float:
    """Return the time during which at least one of the intervals lasts."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def parts(events: list[dict[str, Any]], seconds: float, updates: int) -> dict[str, float]:
    """Return milliseconds a step by part, from a trace's events and the time that its updates took.

    ``host ms``: the time in which the host does not wait for the device. ``reduction ms``: the time of collectives,
    waits for other ranks included; ``exposed ms``: the part of that time in which nothing else runs. ``idle ms``: the
    time in which the device has nothing to do.
    """
    device: dict[bool, list[Interval]] = {True: [], False: []}  # by whether it is a collective
    waits: list[Interval] = []
    for event in events:
        span = (float(event.get("ts", 0)), float(event.get("ts", 0)) + float(event.get("dur", 0)))
        if event.get("cat") in ON_THE_DEVICE:
            device["nccl" in event["name"]].append(span)
        elif event.get("cat") in ("cuda_runtime", "cuda_driver") and event["name"] in WAITS:
            waits.append(span)
    step, work = seconds * 1e3, busy(device[False]) / 1e3
    together = busy([*device[True], *device[False]]) / 1e3
    measured = {
        "host ms": step - busy(waits) / 1e3,
        "reduction ms": busy(device[True]) / 1e3,
        "exposed ms": together - work,
        "idle ms": step - together,
    }
    return {name: milliseconds / updates for name, milliseconds in measured.items()}


@contextlib.contextmanager
def watched(measured: dict[str, Any], at: int, updates: int) -> Iterator[None]:
    """Time the updates of the fairseq-train in this context; profile *updates* of them from update *at* on.

    ``measured`` gets `parts`, on a GPU, and ``MB reduced``. It also gets the median and largest milliseconds within and
    between the updates before; a batch is loaded between updates.
    """
    import torch
    from fairseq.trainer import Trainer

    original = Trainer.train_step
    marks: list[tuple[float, float]] = []  # begin and end of each update
    profile: list[Any] = []

    def train_step(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        done = trainer.get_num_updates()
        if done == at and not profile and torch.cuda.is_available():
            torch.cuda.synchronize()
            profile.append(torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]))
            profile[0].start()
            profile.append(time.perf_counter())
        began = time.perf_counter()
        result = original(trainer, *args, **kwargs)
        if done < at:
            marks.append((began, time.perf_counter()))
        if trainer.get_num_updates() == at + updates and len(profile) == 2:
            torch.cuda.synchronize()
            seconds = time.perf_counter() - profile[1]
            profile[0].stop()
            profile.append(None)
            measured.update(parts(_events(profile[0]), seconds, updates))
        trained = [p for p in trainer.get_model().parameters() if p.requires_grad]
        measured["MB reduced"] = sum(p.numel() * p.element_size() for p in trained) / 2**20
        return result

    setattr(Trainer, "train_step", train_step)  # noqa: B010
    try:
        yield
    finally:
        setattr(Trainer, "train_step", original)  # noqa: B010
    late = marks[len(marks) // 2 :]
    within = [1e3 * (end - began) for began, end in late]
    between = [1e3 * (after[0] - before[1]) for before, after in itertools.pairwise(late)]
    for name, times in (("within", within), ("between", between)):
        if times:
            measured[f"{name} ms"] = [statistics.median(times), max(times)]
    if torch.cuda.is_available():
        stats = torch.cuda.memory_stats()
        measured["allocations"] = [stats.get("num_device_alloc", 0), stats.get("num_alloc_retries", 0)]


def _events(profile: Any) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text(errors="replace"))["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


def main() -> None:
    result, at, updates, *arguments = sys.argv[1:]
    from fairseq_cli import train

    sys.argv = ["fairseq-train", *arguments]
    measured: dict[str, Any] = {}
    with watched(measured, int(at), int(updates)):
        train.cli_main()
    Path(f"{result}{os.environ.get('RANK', '0')}").write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
