"""Time the steps of one rank of a training run, by part: run by `scaling.py`.

python examples/benchmarks/timeline.py RESULT AT UPDATES ARGUMENTS   # of fairseq-train; profiled from update AT on

The first of the profiled updates does not count: when a profile begins, the device runs out of work.
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
RUNTIME = ("cuda_runtime", "cuda_driver")
ON_THE_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
MARK = "spin_kernel"  # of `torch.cuda._sleep`, launched between updates
Interval = tuple[float, float]


def busy(intervals: Iterable[Interval]) -> float:
    """Return the time during which at least one of the intervals lasts."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def parts(events: list[dict[str, Any]], updates: int) -> dict[str, float]:
    """Return milliseconds a step, of a trace's events between two marks that are *updates* updates apart.

    ``host ms``: the time in which the host does not wait for the device. ``reduction ms``: the time of collectives,
    waits for other ranks included; ``exposed ms``: the part of that time in which nothing else runs. ``idle ms``: the
    time in which the device has nothing to do.
    """
    marks = [event for event in events if event.get("cat") == "kernel" and MARK in event["name"]]
    launches = {mark["args"]["correlation"] for mark in marks}
    launched = [
        event for event in events if event.get("cat") in RUNTIME and event["args"].get("correlation") in launches
    ]
    on_device, on_host = _between(marks), _between(launched)
    device: dict[bool, list[Interval]] = {True: [], False: []}  # by whether it is a collective
    waits: list[Interval] = []
    for event in events:
        if event.get("cat") in ON_THE_DEVICE and event not in marks:
            device["nccl" in event["name"]].append(_within(event, on_device))
        elif event.get("cat") in RUNTIME and event["name"] in WAITS:
            waits.append(_within(event, on_host))
    work, together = busy(device[False]), busy([*device[True], *device[False]])
    measured = {
        "host ms": busy([on_host]) - busy(waits),
        "reduction ms": busy(device[True]),
        "exposed ms": together - work,
        "idle ms": busy([on_device]) - together,
    }
    return {name: microseconds / 1e3 / updates for name, microseconds in measured.items()}


def _between(events: list[dict[str, Any]]) -> Interval:
    begins = sorted(float(event["ts"]) for event in events)
    return begins[0], begins[-1]


def _within(event: dict[str, Any], window: Interval) -> Interval:
    begin, end = float(event["ts"]), float(event["ts"]) + float(event.get("dur", 0))
    begin = min(max(begin, window[0]), window[1])
    return begin, max(begin, min(end, window[1]))


@contextlib.contextmanager
def watched(measured: dict[str, Any], at: int, updates: int) -> Iterator[None]:
    """Time the updates of the fairseq-train in this context; profile *updates*, two or more, from update *at* on.

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
            profile.append(torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]))
            profile[0].start()
        began = time.perf_counter()
        result = original(trainer, *args, **kwargs)
        if done < at:
            marks.append((began, time.perf_counter()))
        done = trainer.get_num_updates()
        if profile and done in (at + 1, at + updates):
            torch.cuda._sleep(1)
        if profile and done == at + updates:
            torch.cuda.synchronize()
            profile[0].stop()
            measured.update(parts(_events(profile.pop()), updates - 1))
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
