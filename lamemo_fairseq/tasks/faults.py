"""Faults of a training step: the device runs out of memory, or a loss is not finite."""

import logging
import re
from typing import Any, Callable, Dict, Optional, Tuple

import torch
from fairseq import utils
from torch import Tensor, nn

from ..core.kernels.copies import copy_to_host
from ..core.kernels.module_tree import tree_of
from ..core.memory import DivergenceError, StreamMemory
from ..core.memory.position import SegmentPosition

logger = logging.getLogger(__name__)

_REMEDY = (
    "Go on from an earlier checkpoint, named with --restore-file, at a lower --lr, with --clip-norm such as 0.5, or "
    "with --bf16 in place of --fp16"
)
_OF_FAIRSEQ = re.compile(
    "gradients are Nan/Inf|Fatal error: gradients are inconsistent|(AMP: )?Minimum loss scale reached"
)
StepResult = Tuple[Tensor, Any, Dict[str, Any]]


class LossWatch:
    """Finds a loss that is not finite without making the host wait for the device.

    `note` begins to copy a loss to the host. `check` reads the copy after the next loss, or before a checkpoint is
    saved. When the trainer stops at bad gradients, it runs the same batch once more; that is the next loss.
    """

    def __init__(self) -> None:
        self._update = 0
        self._noted: Optional[Tuple[Callable[[], Tensor], SegmentPosition, int, StreamMemory]] = None

    def note(self, loss: Tensor, position: SegmentPosition, update: int, streams: StreamMemory) -> None:
        """Remember the *loss* of a segment, and the update in which it arose (counted from 1)."""
        self._update = update
        self._noted = (copy_to_host(loss.detach()), position, update, streams)

    def when(self) -> str:
        """Return the update noted last, to begin a message with; nothing without an update."""
        return f"after update {self._update}: " if self._update else ""

    def check(self) -> None:
        """Check the loss noted last.

        Raises:
            DivergenceError: the loss is not finite; the message has the update, the segment, and the streams whose
                memory is not finite either.
        """
        if self._noted is None:
            return
        loss, position, update, streams = self._noted
        self._noted = None
        if not loss().isfinite().all():
            broken = streams.diverged_streams(position, training=True)
            where = position.named_streams(broken or None)
            memory = ", nor is their memory" if broken else ""
            raise DivergenceError(
                f"NaN or infinity in update {update}, epoch {position.epoch}: the loss of segment {position.index} of "
                f"{where} of '{position.split}' is not finite{memory}. {_REMEDY}"
            )

    def explained(self, error: FloatingPointError) -> FloatingPointError:
        """Return the error to end the run with, where fairseq says that gradients are not fine; any other as it is.

        fairseq has run the update once more, to name a module, or tried to: the segment noted last is of that update.
        On several ranks it takes gradients that are no numbers for different ones.
        """
        text = str(error)
        if _OF_FAIRSEQ.match(text) is None:
            return error
        if self._noted is None or not re.search(r"Nan/Inf|= +-?(nan|inf)", text):
            return DivergenceError(" ".join(re.sub("-{9,}", "", text).split()))
        _, position, update, _ = self._noted
        try:
            self.check()  # where the second run did not come to it
        except DivergenceError as found:
            return found
        return DivergenceError(
            f"NaN or infinity in update {update}, epoch {position.epoch}: the gradients after segment {position.index} "
            f"are not finite, although the loss is. {_REMEDY}"
        )


def retry_out_of_memory(
    train_step: Callable[[Callable[..., Any]], StepResult],
    criterion: Callable[..., Any],
    model: nn.Module,
    advance: Callable[[], Any],
    alone: bool,
) -> StepResult:
    """Run a training step, and run it once more, with the same random numbers, if the device's memory does not suffice.

    fairseq drops the batch instead. The trainer still drops the batch if the second try fails as well. It also does if
    the first has left gradients that cannot be separated from those of earlier batches.

    Args:
        train_step: forward and backward, given the criterion.
        criterion: computes the loss of a batch.
        model: its parameters receive the gradients.
        advance: reads the segment without gradients, so that the memory moves on although the batch is dropped.
        alone: whether this is the only rank; other ranks would wait for a second backward's gradients.

    Returns:
        The result of the step.
    """
    random_state = utils.get_rng_state()
    untouched = alone and all(p.grad is None for p in tree_of(model).parameters)

    def again() -> None:
        if untouched:
            for parameter in tree_of(model).parameters:
                parameter.grad = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        utils.set_rng_state(random_state)

    result, error, has_loss = _attempt(train_step, criterion)
    if error is not None and (untouched or not has_loss):
        logger.warning("%s: trying the batch once more", error)
        again()
        result, error, has_loss = _attempt(train_step, criterion)
    if error is None:
        return result
    if not has_loss:
        again()
        advance()
    raise error


def _attempt(
    train_step: Callable[[Callable[..., Any]], StepResult], criterion: Callable[..., Any]
) -> Tuple[Any, Optional[RuntimeError], bool]:
    """Return the result of a step, or the error if memory ran out, and whether the forward pass had ended."""
    has_loss = False

    def forward(*args: Any) -> Any:
        nonlocal has_loss
        computed = criterion(*args)
        has_loss = True
        return computed

    try:
        return train_step(forward), None, has_loss
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        # The error's frames would keep the tensors alive that fill the memory.
        return None, error.with_traceback(None), has_loss
