"""The trainer of this package's task: the memory of streams in checkpoints, exact resumes, ends that are saved."""

import logging
import os
import time
from contextlib import suppress
from signal import SIGTERM
from typing import Any, Callable, Dict, List, NoReturn, Optional

import torch
import torch.distributed as dist
from fairseq import checkpoint_utils, utils
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager

from . import interruption, save_dir, schedules, signals
from .ahead import AheadTrainer
from .averages import Averages
from .checkpoints import keep_due_checkpoint, spare_former, write_checkpoint
from .quiet import without_records
from .ranks import is_first_rank
from .restoring import restoring
from .training_state import check_named_checkpoint, restore_training_state, tell_of_former_best, training_state

logger = logging.getLogger(__name__)


class SegmentTrainer(AheadTrainer):
    """Trains a model of this package.

    Raises:
        BlockingIOError: another process trains in ``--save-dir``.
        FileNotFoundError: the checkpoint named by an option is missing.
    """

    def __init__(self, cfg: Any, task: Any, model: Any, criterion: Any, quantizer: Any = None):
        self._begun_at = time.monotonic()
        with without_records("fairseq.trainer"):  # fairseq counts all absent biases as one that is shared
            super().__init__(cfg, task, model, criterion, quantizer)
        self.begun = False
        self._batches: Any = None  # of the epoch
        self._finish_loading: Optional[Callable[[], None]] = None
        self._due, self._written = -1, -1  # the updates after which fairseq asked for a checkpoint, and wrote one
        check_named_checkpoint(self.cfg.checkpoint, self.checkpoint_suffix)
        folder = self.cfg.checkpoint.save_dir
        if is_first_rank() and not self.cfg.checkpoint.no_save and PathManager.supports_rename(folder):
            # Before a checkpoint is looked for, which another run may be writing.
            save_dir.claim(folder, self.checkpoint_suffix)

    def _build_ema(self) -> None:
        if self.cfg.ema.store_ema:
            self._ema = Averages(self._model, self.cfg.ema, self.device)

    def get_train_iterator(self, *args: Any, **kwargs: Any) -> Any:
        """Return the batches of an epoch. fairseq asks for the batches to train on as for those to validate on."""
        with self.task.training_batches():
            self._batches = super().get_train_iterator(*args, **kwargs)
        return self._batches

    def begin_epoch(self, epoch: int) -> None:
        """Begin an epoch, or go on with one."""
        schedules.begin_epoch(self)
        super().begin_epoch(epoch)

    def train_step(self, samples: Any, raise_oom: bool = False) -> Any:
        """Compute an update, unless a scheduler wants the run to end."""
        if self.asked_to_end() is not None and self._batches.iterations_in_epoch > len(samples):
            self._batches.unread(len(samples))
            self.save_and_end()
        try:
            logged = super().train_step(samples, raise_oom)
            self._read_left_out(samples)
            return logged
        except Exception as error:
            # fairseq runs the update once more, with hooks, to name a module: that may fail and hide the first error.
            first: Optional[BaseException] = error
            while not (first is None or isinstance(first, FloatingPointError)):
                first = first.__context__
            told = error if first is None else self.task.losses.explained(first)
            if told is error:
                raise
            raise told from None

    def _read_left_out(self, samples: List[Dict[str, Any]]) -> None:
        """Read the batches of an update that fairseq left without reading them, as memory ran out in one before."""
        decoder = self.get_model().decoder
        for sample in samples:
            if sample and not decoder.streams.has_read(sample["net_input"]["position"]):
                decoder.move_on(**self._prepare_sample(sample)[0]["net_input"])

    def asked_to_end(self) -> Optional[int]:
        """Return a scheduler's signal that this rank, or another one in the last update, has received."""
        if self._group_of_figures is None:
            return signals.received()
        return (signals.received() or SIGTERM) if self._signal_of_any else None

    def save_and_end(self, loss: Optional[float] = None) -> NoReturn:
        """Save the training between two updates, as a scheduler wants it to end. Every rank has to call this.

        Args:
            loss: that of a validation which belongs to the checkpoint, if there was one.

        Raises:
            signals.Terminated: it has been saved.
        """
        self.save_unless_saved(loss)
        if self._group_of_figures is not None:  # the first rank saves, and would be ended if others had ended
            with suppress(RuntimeError):  # a rank has failed, and says why
                dist.barrier(self._group_of_figures)
        raise signals.Terminated(self.asked_to_end() or SIGTERM)

    def save_unless_saved(self, loss: Optional[float]) -> None:
        """Save the training between two updates, unless fairseq has saved it. Every rank has to call this.

        Args:
            loss: that of a validation which belongs to the checkpoint, if there was one.
        """
        if self._due != self.get_num_updates():
            path = checkpoint_utils.save_checkpoint(self._configuration.checkpoint, self, self._batches, loss)
            if path is not None:
                self.task.post_save(path, self.get_num_updates())

    def consolidate_optimizer(self) -> None:
        """Bring the memory of every rank's streams to the first one, which alone saves.

        fairseq calls this on every rank before it saves, and in an update that fails, when ranks may not meet.
        """
        if not self._updating:
            self._due = self.get_num_updates()
            self.task.losses.check()
            self._batches.gather_memory()
        super().consolidate_optimizer()

    def state_dict(self) -> Dict[str, Any]:
        """Return the contents of a checkpoint, with the configuration, also during an update that has failed."""
        options, self.cfg = self.cfg, self._configuration
        try:
            state: Dict[str, Any] = super().state_dict()
        finally:
            self.cfg = options
        return state

    def save_checkpoint(self, filename: str, extra_state: Dict[str, Any]) -> Optional[str]:
        """Save all state of the training; without *extra_state*, the rest of a training that has crashed."""
        if not self.should_save_checkpoint_on_current_rank:
            return None
        path = os.path.abspath(filename)
        if not extra_state and self.cfg.checkpoint.no_save:
            logger.info("%s is not written: --no-save", path)
            return None
        logger.info("Saving checkpoint to %s", path)
        state = utils.move_to_cpu(self.state_dict())
        if extra_state:
            state["extra_state"].update({**extra_state, type(self.task).__name__: training_state(self)})
        if not write_checkpoint(state, filename, self.cfg.checkpoint):
            return None
        if extra_state:
            self._written = self.get_num_updates()
            keep_due_checkpoint(self.cfg.checkpoint, path, self._due_path())
        logger.info("Finished saving checkpoint to %s", path)
        return path

    def _due_path(self) -> Optional[str]:
        """Return the path for ``--save-interval-updates`` that fairseq leaves out at the end of an epoch."""
        updates, every = self.get_num_updates(), self.cfg.checkpoint.save_interval_updates
        if not (self._batches.end_of_epoch() and every > 0 and updates % every == 0):
            return None
        return os.path.join(
            self.cfg.checkpoint.save_dir, f"checkpoint_{self._batches.epoch}_{updates}{self.checkpoint_suffix}.pt"
        )

    def end_epoch(self) -> None:
        """Report a checkpoint that was due at the end of the epoch, but had no file to be copied from."""
        due = self._due_path() if self.should_save_checkpoint_on_current_rank else None
        if due is not None and self._written != self._due == self.get_num_updates():
            logger.warning(
                "%s is not written: epoch %d ends with this update, and --no-epoch-checkpoints and "
                "--no-last-checkpoints leave nothing to copy it from",
                due,
                self._batches.epoch,
            )

    def load_checkpoint(
        self,
        filename: str,
        reset_optimizer: bool = False,
        reset_lr_scheduler: bool = False,
        optimizer_overrides: Any = None,
        reset_meters: bool = False,
    ) -> Any:
        """Load a checkpoint if the file exists.

        State that fairseq does not restore waits until `lr_step` has been called.

        Raises:
            CheckpointError: the run cannot go on from it.
            DamagedCheckpointError: the checkpoint differs from the one that was saved.
        """
        # The first rank sends the checkpoint to the others, which since torch 2.6 refuse fairseq's mark for a tensor in
        # it.
        marks = [distributed_utils._TensorPlaceholder]
        with restoring(self, reset_optimizer, reset_lr_scheduler), torch.serialization.safe_globals(marks):
            extra_state = super().load_checkpoint(
                filename, reset_optimizer, reset_lr_scheduler, optimizer_overrides, reset_meters
            )
        self._begun_at = time.monotonic()
        if reset_optimizer:
            self._previous_training_time = 0  # --stop-time-hours counts the hours of this run

        def finish() -> None:
            interruption.begin(self)
            spare_former(self, self._batches.next_epoch_idx)
            if extra_state and not reset_optimizer:
                tell_of_former_best(self, filename)
                if len(utils.split_paths(self.cfg.task.data)) == 1:  # else each epoch has a text of its own
                    self._batches.tell_of_another_text(extra_state["train_iterator"], filename)
                self._restore(extra_state, reset_lr_scheduler, reset_meters)

        self._finish_loading = finish
        return extra_state

    def _local_cumulative_training_time(self) -> float:
        """Return the seconds of training for ``--stop-time-hours``. fairseq's clock jumps when somebody sets it."""
        return time.monotonic() - self._begun_at + float(self._previous_training_time)

    def lr_step(self, epoch: int, val_loss: Any = None) -> Any:
        """Step the schedule at the end of an epoch, and as the last thing that fairseq does to load a checkpoint."""
        put_back = schedules.remember(self)
        rate = super().lr_step(epoch, val_loss)
        finish, self._finish_loading = self._finish_loading, None
        if finish is None:
            if self.begun and rate <= self.cfg.optimization.stop_min_lr:  # the run ends, as of before this step
                put_back()
                self.save_unless_saved(val_loss)
            return rate
        finish()
        return self.get_lr()

    def _restore(self, extra_state: Dict[str, Any], reset_lr_scheduler: bool, reset_meters: bool) -> None:
        """Restore the state that fairseq does not restore, from a checkpoint that has it."""
        state = extra_state.get(type(self.task).__name__)
        if not state:
            return
        if reset_meters:
            state = {name: value for name, value in state.items() if name != "patience"}
        restore_training_state(self, state)
        if "schedule" in state and not reset_lr_scheduler:
            position = extra_state["train_iterator"]
            ended = position["iterations_in_epoch"] == 0
            schedules.restore_schedule(
                self,
                state["schedule"],
                ended=ended,
                epoch=position["epoch"] - ended,
                loss=extra_state.get("val_loss"),
                again=self.cfg.checkpoint.reset_dataloader,
            )
