"""Training runs in processes of their own, which a test may kill, and what they computed to the last bit.

A process is forked from one that has imported everything, so that it starts in a moment.
"""

import importlib
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Set, Tuple

import torch

from .faults import Fault

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.processes_preload"])

Record = Dict[Tuple[int, str], Set[str]]


def train_in_processes(
    arguments: Sequence[object],
    folder: Path,
    ranks: int = 1,
    fault: Optional[Fault] = None,
    dtype: str = "float32",
    patience: float = 0.2,
) -> List[int]:
    """Run ``fairseq-train`` with *arguments*; checkpoints, output and what it computes go to *folder*.

    The rest is as for `run_in_processes`.
    """
    backend = ["--ddp-backend", "legacy_ddp"] if ranks > 1 and "--cpu" in arguments else []
    return run_in_processes(
        "train",
        [*arguments, *backend, "--save-dir", folder / "checkpoints", "--log-interval", 1, "--log-format", "simple"],
        folder,
        ranks,
        fault,
        dtype,
        patience,
    )


def run_in_processes(
    command: str,
    arguments: Sequence[object],
    folder: Path,
    ranks: int = 1,
    fault: Optional[Fault] = None,
    dtype: str = "float32",
    patience: float = 0.2,
) -> List[int]:
    """Run a command of fairseq in one process a rank.

    Args:
        command: its name among the modules of ``fairseq_cli``.
        fault: called in every process before the command, to arrange that something goes wrong.
        patience: seconds in which ranks may end by themselves after another one has failed.

    Returns:
        The exit code of every rank. When one ends otherwise than by 0, the others are killed, as launchers do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    workers = [
        _FORKS.Process(
            target=_run, args=(command, [str(a) for a in arguments], folder, rank, ranks, port, fault, dtype)
        )
        for rank in range(ranks)
    ]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + 240
    while any(w.is_alive() for w in workers):
        if any(w.exitcode not in (None, 0) for w in workers):
            deadline = min(deadline, time.monotonic() + patience)
        if time.monotonic() > deadline:
            for worker in workers:
                worker.kill()
        time.sleep(0.02)
    return [w.exitcode for w in workers]  # type: ignore[misc]


def output_of(folder: Path, rank: Optional[int] = None) -> str:
    """What a rank printed; without one, what all of them did, of whom the first to fail may be any."""
    files = [folder / f"output{rank}"] if rank is not None else sorted(folder.glob("output*"))
    return "".join(file.read_text() for file in files)


def computed(folder: Path) -> Record:
    """Losses and gradient norms of each rank's updates, in hexadecimal; more than one if a resumed run differs."""
    record: Record = {}
    for path in sorted(folder.glob("computed*")):
        for line in path.read_text().splitlines():
            update, what, value = line.split()
            record.setdefault((int(update), f"{path.name} {what}"), set()).add(value)
    return record


def weights(folder: Path, name: str = "checkpoint_last.pt") -> Dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / name, weights_only=False)["model"]


def assert_same_run(one: Path, other: Path) -> None:
    """Every update has the same losses and gradient norms, and the final weights are equal, to the last bit."""
    expected = computed(one)
    assert expected and all(len(values) == 1 for values in expected.values())
    assert computed(other) == expected
    wanted, found = weights(one), weights(other)
    assert wanted.keys() == found.keys()
    for name, weight in wanted.items():
        assert torch.equal(weight, found[name]), name


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _run(
    command: str,
    arguments: List[str],
    folder: Path,
    rank: int,
    ranks: int,
    port: int,
    fault: Optional[Fault],
    dtype: str,
) -> None:
    from .helpers import run_command

    output = os.open(folder / f"output{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    if "--cpu" in arguments:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # parts of fairseq use a GPU where there is one
    torch.set_num_threads(1)
    torch.set_default_dtype(getattr(torch, dtype))
    if dtype == "float64":  # fairseq asks for the norm of gradients in float32, which torch refuses
        norm = torch.norm
        torch.norm = lambda *args, dtype=None, **kwargs: norm(*args, **kwargs)
    _note_what_is_computed(folder / f"computed{rank}")
    if fault is not None:
        fault()
    several = [
        "--distributed-rank", rank, "--device-id", rank, "--distributed-no-spawn",
        "--distributed-backend", "gloo" if "--cpu" in arguments else "nccl",
        "--distributed-init-method", f"tcp://localhost:{port}",
    ]  # fmt: skip
    main = importlib.import_module(f"fairseq_cli.{command}").cli_main
    try:
        run_command(
            main, *arguments, "--distributed-world-size", ranks, *(several if ranks > 1 else []), "--num-workers", 0
        )
    except KeyboardInterrupt as error:  # multiprocessing does not do what Python does with an error
        sys.last_value = error
        sys.excepthook(type(error), error, error.__traceback__)


def _note_what_is_computed(path: Path) -> None:
    from fairseq.trainer import Trainer

    from lamemo_fairseq.tasks.segment_language_modeling import SegmentLanguageModelingTask

    task_step, clip, zero = SegmentLanguageModelingTask.train_step, Trainer.clip_grad_norm, Trainer.zero_grad
    losses: List[str] = []

    def note_loss(self, sample, model, criterion, optimizer, update_num, *args, **kwargs):
        result = task_step(self, sample, model, criterion, optimizer, update_num, *args, **kwargs)
        losses.append(float(result[0].detach()).hex())
        return result

    def note_norm(self, *args):
        norm = clip(self, *args)
        with path.open("a") as file:
            for i, loss in enumerate(losses):
                file.write(f"{self.get_num_updates()} loss{i} {loss}\n")
            file.write(f"{self.get_num_updates()} norm {float(norm).hex()}\n")
        losses.clear()
        return norm

    def forget(self):  # what was computed before the update began is no part of it
        losses.clear()
        zero(self)

    SegmentLanguageModelingTask.train_step = note_loss
    Trainer.clip_grad_norm, Trainer.zero_grad = note_norm, forget
