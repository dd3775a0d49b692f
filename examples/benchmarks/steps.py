"""Divide a GPU's time in whole training steps of fairseq-train by part.

python examples/benchmarks/steps.py examples/novels/bytes/table.yaml infinity_former
"""

import argparse
import contextlib
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.tables.arguments import ArgumentParser

BEFORE, PROFILED = 40, 8  # updates: the memory is full and graphs are recorded by then

PARTS = {
    "attention": r"^(forward|key|query|row|position|table|class_sum|store)_kernel|flash|fmha",
    "retrieval": r"^(group|best_group|candidate|retrieval)_kernel",
    "products": r"gemm|cutlass|nvjet|cublas|splitK|^product_kernel",
    "loss": r"softmax|nll",
    "norms, dropout": r"norm|dropout|^sum_kernel|GammaBeta|masked_scale|RowwiseMoments",
    "copies": r"copy|Copy|Memcpy|memcpy|Memset|CatArray|cat_|Fill|^append_kernel",
    "optimizer": r"adam|addcdiv|addcmul|sqrt|multi_tensor",
}


@contextlib.contextmanager
def profiled(updates: int, report: dict[str, Any], at: int) -> Iterator[None]:
    """Profile *updates* updates of the fairseq-train that runs in this context, from update *at* on, into *report*.

    ``report`` gets milliseconds a step by part, ``all kernels``, and ``top``, the kernels that take longest.
    """
    import torch
    from fairseq.trainer import Trainer

    original, profiles = Trainer.train_step, [None]

    def train_step(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if trainer.get_num_updates() == at and profiles == [None]:
            torch.cuda.synchronize()
            profiles[0] = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            profiles[0].start()
        result = original(trainer, *args, **kwargs)
        if trainer.get_num_updates() == at + updates and profiles[0] is not None and not report:
            torch.cuda.synchronize()
            profiles[0].stop()
            report.update(breakdown(profiles[0], updates))
        return result

    setattr(Trainer, "train_step", train_step)  # noqa: B010
    try:
        yield
    finally:
        setattr(Trainer, "train_step", original)  # noqa: B010


def breakdown(profile: Any, updates: int) -> dict[str, Any]:
    """Return the GPU's milliseconds a step by part, from a profile."""
    by_part: dict[str, float] = {}
    kernels: dict[str, float] = {}
    for event in profile.key_averages():
        milliseconds = event.self_device_time_total / 1e3 / updates
        part = next((p for p, pattern in PARTS.items() if re.search(pattern, event.key)), "elementwise and rest")
        by_part[part] = by_part.get(part, 0) + milliseconds
        kernels[event.key[:70]] = kernels.get(event.key[:70], 0) + milliseconds
    top = sorted(kernels.items(), key=lambda x: -x[1])[:14]
    return {**by_part, "all kernels": sum(kernels.values()), "top": top}


def profile(table: Any, row: str) -> dict[str, Any]:
    """Train a row of a loaded table for a few updates on one GPU; return milliseconds a step by part."""
    from fairseq_cli import train as fairseq_train

    from examples.tables import commands
    from examples.tables import table as tables

    report: dict[str, Any] = {}
    changes = {"max-update": BEFORE + PROFILED, "no-save": True, "disable-validation": True}
    changes["distributed-world-size"] = 1  # on more, the updates would run in processes that are not profiled
    with tempfile.TemporaryDirectory() as folder, profiled(PROFILED, report, at=BEFORE):
        sys.argv = ["fairseq-train", *commands.train(table, tables.Run(row, 1), folder, changes)]
        fairseq_train.cli_main()
    return report


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="table file, whose data are binarized")
    parser.add_argument("row")
    args = parser.parse_args()
    import torch

    from examples.tables import table as tables

    try:
        table = tables.load(args.table)
        tables.find(table, args.row)
    except tables.TableError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        parser.error("this needs a GPU")
    for name, value in profile(table, args.row).items():
        lines = value if isinstance(value, list) else [value]
        for line in lines:
            what, milliseconds = line if isinstance(line, tuple) else (name, line)
            print(f"{milliseconds:8.3f} ms  {what}")


if __name__ == "__main__":
    main()
