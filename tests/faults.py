"""What goes wrong in a process of `processes.py`, or what it tells: each is arranged before the command begins."""

import ctypes
import functools
import importlib
import os
import shutil
import signal
import threading
import time
from typing import Callable, Sequence

import torch

Fault = Callable[[], None]


def fault(arrange: Callable[..., None]) -> Callable[..., Fault]:
    """Decorator: calling the function with options gives a fault, which can be sent to another process."""

    @functools.wraps(arrange)
    def with_options(*args, **kwargs) -> Fault:
        return functools.partial(_arrange, arrange.__module__, arrange.__name__, args, kwargs)

    return with_options


def _arrange(module: str, name: str, args: tuple, kwargs: dict) -> None:
    getattr(importlib.import_module(module), name).__wrapped__(*args, **kwargs)


@fault
def killed_after_seconds(seconds: float) -> None:
    """From outside, wherever the run is by then."""
    threading.Timer(seconds, die).start()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@fault
def killed_after_update(update: int) -> None:
    """Between an update and what follows it: validation, saving, the next one."""
    from fairseq.trainer import Trainer

    step = Trainer.train_step

    def dying(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        if self.get_num_updates() == update:
            die()
        return result

    Trainer.train_step = dying


@fault
def killed_inside_update(update: int) -> None:
    """After the backward pass, before the weights change."""
    from fairseq.trainer import Trainer

    clip = Trainer.clip_grad_norm

    def dying(self, *args):
        if self.get_num_updates() + 1 == update:
            die()
        return clip(self, *args)

    Trainer.clip_grad_norm = dying


@fault
def killed_in_validation(batch: int) -> None:
    """At the n-th batch of validation of the run."""
    from fairseq.trainer import Trainer

    step, count = Trainer.valid_step, [0]

    def dying(self, *args, **kwargs):
        count[0] += 1
        if count[0] == batch:
            die()
        return step(self, *args, **kwargs)

    Trainer.valid_step = dying


@fault
def killed_after_saving(times: int) -> None:
    from fairseq import checkpoint_utils

    save, count = checkpoint_utils.save_checkpoint, [0]

    def dying(*args):
        result = save(*args)
        count[0] += 1
        if count[0] == times:
            die()
        return result

    checkpoint_utils.save_checkpoint = dying


@fault
def killed_while_writing(times: int) -> None:
    """With half of a checkpoint written."""
    write, count = torch.save, [0]

    def dying(obj, path, *args, **kwargs):
        write(obj, path, *args, **kwargs)
        count[0] += 1
        if count[0] == times:
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    torch.save = dying


@fault
def killed_while_copying(times: int) -> None:
    """With half of a checkpoint copied, such as from the best to the last one."""
    copy, count = shutil.copyfile, [0]

    def dying(source, target, **kwargs):
        copy(source, target, **kwargs)
        count[0] += 1
        if count[0] == times:
            os.truncate(target, os.path.getsize(target) // 2)
            die()
        return target

    shutil.copyfile = dying


@fault
def killed_while_another_waits(update: int, grace: float) -> None:
    """The second rank is killed, and survived by a process of its own; the first one waits in C, as for its device."""
    import torch.distributed as dist
    from fairseq.trainer import Trainer

    from lamemo_fairseq.host import lost_ranks

    lost_ranks.GRACE = grace
    step = Trainer.train_step

    def dying(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        if self.get_num_updates() == update:
            if dist.get_rank() == 0:
                wait_forever()
            if os.fork() == 0:
                time.sleep(20)
                os._exit(0)
            die()
        return result

    Trainer.train_step = dying


def wait_forever() -> None:
    """Wait in C, where no signal is handled, until the process ends."""
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


@fault
def waiting_for_the_host() -> None:
    """The device is given no update and no segment before the host has waited for the norm of the gradients."""
    from lamemo_fairseq.host.trainer import SegmentTrainer

    SegmentTrainer._goes_ahead = lambda trainer: False


@fault
def telling_what_went_ahead() -> None:
    """Each update, and each segment, that the device was given early and that was then asked for."""
    from lamemo_fairseq.core.graphs import _Begun
    from lamemo_fairseq.host.mixed_precision import FP16Optimizer

    finish, take = FP16Optimizer._finish, _Begun.serves

    def telling_updates(*args):
        print("an update went ahead", flush=True)
        finish(*args)

    def telling_segments(*args):
        taken = take(*args)
        print("a segment went ahead" if taken else "a segment went in vain", flush=True)
        return taken

    FP16Optimizer._finish, _Begun.serves = telling_updates, telling_segments


@fault
def told_to_end(number: int, update: int, ranks: Sequence[int] = (0,), slow: float = 0.0) -> None:
    """A scheduler's signal within an update, twice, to some of the ranks. Then saving takes seconds, and is awaited."""
    import torch.distributed as dist
    from fairseq.trainer import Trainer

    from lamemo_fairseq.host import lost_ranks

    lost_ranks.GRACE = slow / 4
    clip, save = Trainer.clip_grad_norm, torch.save

    def told(self, *args):
        rank = dist.get_rank() if dist.is_initialized() else 0
        if self.get_num_updates() + 1 == update and rank in ranks:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        return clip(self, *args)

    def slowly(*args, **kwargs):
        time.sleep(slow)
        return save(*args, **kwargs)

    Trainer.clip_grad_norm, torch.save = told, slowly
