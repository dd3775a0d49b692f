"""The device goes ahead of the host: it updates the weights and reads the next segment while the host waits and logs.

fairseq waits for the norm of the gradients, and only then updates, logs, loads a batch and runs the model. The device
would have nothing to do meanwhile. Here it is given the update, and if a CUDA graph is recorded the next segment's
forward pass, before the host waits. The numbers are the same to the last bit. (If ranks turn out to disagree about the
norm, fairseq ends the run as ever; its crash.pt then holds the updated weights.)
"""

from typing import Any, Callable

from fairseq.optim import FP16Optimizer
from fairseq.tasks import FairseqTask
from fairseq.trainer import Trainer
from torch import Tensor

from .figures import meanwhile
from .mixed_precision import begin_step
from .stand_in import stand_in
from .training import seed_of


@stand_in(Trainer, "clip_grad_norm")
def clip_grad_norm(original: Callable[..., Tensor], trainer: Any, clip_norm: float) -> Tensor:
    """The norm of the gradients of ``--fp16`` and ``--bf16``, for which the device does not wait."""
    if not _plain(trainer):
        return original(trainer, clip_norm)

    def go_ahead(norm: Tensor) -> None:
        if begin_step(trainer.optimizer, norm, clip_norm):
            seed = seed_of(trainer, trainer.get_num_updates() + 1)
            trainer.task.begin_next_segment(lambda sample: sample and trainer._prepare_sample(sample)[0], seed)

    with meanwhile(go_ahead):
        return original(trainer, clip_norm)


def _plain(trainer: Any) -> bool:
    """Whether an update is nothing but a step of the optimizer."""
    return (
        hasattr(trainer.task, "begin_next_segment")
        and type(trainer.task).optimizer_step is FairseqTask.optimizer_step
        and type(trainer.optimizer) is FP16Optimizer
        and not trainer.is_fsdp
        and trainer.cfg.distributed_training.ddp_backend != "slowmo"
    )
