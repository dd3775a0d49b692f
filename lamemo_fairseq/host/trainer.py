"""The trainer of this package's task: fairseq's, extended for models with state.

It also lets the device go ahead of the host. fairseq waits for the norm of the gradients, and only then updates, logs,
loads a batch and runs the model. The device would have nothing to do meanwhile. Here the device is given the update,
and if a CUDA graph is recorded the next segment's forward pass, before the host waits. The numbers are the same to the
last bit. With several ranks, hosts exchange their losses beside the backward pass and the next segment, and wait for
neither. If ranks disagree about the norm, fairseq ends the run as usual; its crash.pt then holds the updated weights.
"""

import logging
import os
import time
from contextlib import contextmanager, suppress
from functools import cache
from signal import SIGTERM
from typing import Any, Callable, Dict, Iterator, List, NoReturn, Optional

import torch
import torch.distributed as dist
from fairseq import checkpoint_utils, utils
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.tasks import FairseqTask
from fairseq.trainer import Trainer
from omegaconf import OmegaConf
from torch import Tensor

from . import interruption, save_dir, schedules, signals
from .averages import Averages
from .checkpoints import keep_due_checkpoint, spare_former, write_checkpoint
from .data_parallel import GradientReducer, reducer_for, wrapped
from .dataclass_defaults import attributes
from .lost_ranks import watch_ranks
from .mixed_precision import FP16Optimizer
from .optimizers import adopt, meanwhile
from .quiet import without_records
from .ranks import group_between_hosts, is_first_rank
from .restoring import restoring
from .training_state import check_named_checkpoint, restore_training_state, tell_of_restored, training_state

logger = logging.getLogger(__name__)


class SegmentTrainer(Trainer):
    """Trains a model of this package.

    Raises:
        BlockingIOError: another process trains in ``--save-dir``.
        FileNotFoundError: the checkpoint named by an option is missing.
    """

    cfg: Any
    device: torch.device
    _grad_norm_buf: Optional[Tensor]  # the norms of all ranks

    def __init__(self, cfg: Any, task: Any, model: Any, criterion: Any, quantizer: Any = None):
        self._reducer: Optional[GradientReducer] = None
        self._begun_at = time.monotonic()
        self._group: Any = None  # for collectives, in place of fairseq's
        with without_records("fairseq.trainer"):  # fairseq counts all absent biases as one that is shared
            super().__init__(cfg, task, model, criterion, quantizer)
        self._group_of_figures: Any = None
        if self.data_parallel_world_size > 1:
            self._group_of_figures = group_between_hosts()
            watch_ranks(self._group_of_figures, self.cfg.distributed_training.distributed_init_method)
            if self._grad_norm_buf is not None:
                self._grad_norm_buf = self._grad_norm_buf.cpu()
        self._configuration = self._options = self.cfg
        self.begun = False
        self._batches: Any = None  # of the epoch
        self._updating = False
        self._finish_loading: Optional[Callable[[], None]] = None
        self._signal_of_any = False
        self._due, self._written = -1, -1  # the updates after which fairseq asked for a checkpoint, and wrote one
        check_named_checkpoint(self.cfg.checkpoint, self.checkpoint_suffix)
        folder = self.cfg.checkpoint.save_dir
        if is_first_rank() and not self.cfg.checkpoint.no_save and PathManager.supports_rename(folder):
            # Before a checkpoint is looked for, which another run may be writing.
            save_dir.claim(folder, self.checkpoint_suffix)

    @property
    def model(self) -> Any:
        """The model, wrapped for several ranks."""
        if getattr(self, "_wrapped_model", None) is None and self.use_distributed_wrapper:
            options, group = self.cfg.distributed_training, self.data_parallel_process_group
            self._reducer = reducer_for(options, self._model.to(self.device), group)
            if self._reducer is not None:
                self._wrapped_model = wrapped(options, self._model, self._reducer, group)
        return super().model

    @property
    def data_parallel_process_group(self) -> Any:
        """The ranks as a process group."""
        return super().data_parallel_process_group if self._group is None else self._group

    @contextmanager
    def _beside_the_gradients(self, after: Optional[torch.cuda.Event] = None, known: bool = False) -> Iterator[None]:
        """Let ranks exchange values on their hosts: a kernel would wait until the next segment's have ended.

        Args:
            after: copies to the host wait for this.
            known: whether the numbers are on the host, or need only *after*; if not, copies wait for all work before.
        """
        if self._group_of_figures is None:
            yield
            return
        device, self.device, self._group = self.device, torch.device("cpu"), self._group_of_figures
        try:
            if device.type != "cuda":
                yield
                return
            stream = _beside(device)
            if after is not None:
                stream.wait_event(after)
            if not known:
                stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                yield
        finally:
            self.device, self._group = device, None

    def _build_optimizer(self) -> None:
        super()._build_optimizer()
        adopt(self._optimizer)

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
        self._options = attributes(OmegaConf.to_container(self.cfg, resolve=True))
        super().begin_epoch(epoch)

    def train_step(self, samples: Any, raise_oom: bool = False) -> Any:
        """Compute an update, unless a scheduler wants the run to end."""
        if self.asked_to_end() is not None and self._batches.iterations_in_epoch > len(samples):
            self._batches.unread(len(samples))
            self.save_and_end()
        self._updating, self.cfg = True, self._options  # fairseq reads options fifty times, which OmegaConf looks up
        if self._reducer is not None:
            self._reducer.begin_update(len(samples))
        try:
            return super().train_step(samples, raise_oom)
        except FloatingPointError as error:
            told = self.task.losses.explained(error)
            if told is error:
                raise
            raise told from None
        finally:
            self._updating, self.cfg = False, self._configuration

    def _seed_after(self, updates: int) -> int:
        """Return the seed of the update that comes after this many updates."""
        return self.cfg.common.seed + updates

    def _set_seed(self) -> None:
        """Seed only the training device. torch.manual_seed also records a stack trace for every absent backend."""
        if self.device.type not in ("cpu", "cuda"):
            return super()._set_seed()
        seed = self._seed_after(self.get_num_updates())
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def clip_grad_norm(self, clip_norm: float) -> Tensor:
        """Return the norm of the gradients. With ``--fp16`` and ``--bf16`` the device does not wait for it."""
        if not self._goes_ahead():
            return super().clip_grad_norm(clip_norm)

        def go_ahead(norm: Tensor) -> None:
            if self.optimizer.begin_step(norm, clip_norm):
                seed = self._seed_after(self.get_num_updates() + 1)
                self.task.begin_next_segment(lambda sample: sample and self._prepare_sample(sample)[0], seed)

        with meanwhile(go_ahead):
            return super().clip_grad_norm(clip_norm)

    def _goes_ahead(self) -> bool:
        """Return whether an update is nothing but a step of the optimizer."""
        return (
            type(self.task).optimizer_step is FairseqTask.optimizer_step
            and type(self.optimizer) is FP16Optimizer
            and not self.is_fsdp
            and self.cfg.distributed_training.ddp_backend != "slowmo"
        )

    def _aggregate_logging_outputs(
        self, logging_outputs: List[Dict[str, Any]], *extra_stats_to_sum: Any, ignore: bool = False
    ) -> Any:
        """Return sums over all ranks, on the host. fairseq divides gradients by one of them, if it is not zero."""
        if self._updating and self._reducer is not None:
            self._reducer.begin_rest()  # before the host waits for other ranks, which may wait for these gradients
        # The losses of an update are known before its backward pass.
        scored = self.task.scored if self._updating else None
        known = scored is not None and not any(torch.is_tensor(stat) for stat in extra_stats_to_sum)
        with self._beside_the_gradients(scored, known):
            logging_outputs, stats = _on_the_host((logging_outputs, extra_stats_to_sum))
            # The ranks end after the same update, whichever of them received a signal.
            ours = signals.received() or 0
            outputs, sums = super()._aggregate_logging_outputs(logging_outputs, *stats, ours, ignore=ignore)
            if self._updating:
                self._signal_of_any = float(sums[-1]) > 0
            return outputs, sums[:-1]

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

    def _check_grad_norms(self, grad_norm: Tensor) -> None:
        """Compare the norms of all ranks, without waiting for the next segment."""
        with self._beside_the_gradients(known=not grad_norm.is_cuda):
            super()._check_grad_norms(grad_norm)

    def _reduce_and_log_stats(self, logging_outputs: Any, sample_size: Any, grad_norm: Optional[Tensor] = None) -> Any:
        """Log the criterion's results; with a norm, those of an update whose backward pass the host has awaited."""
        if self.device.type == "cuda" and grad_norm is not None:
            # The optimizer runs on the current stream. These values are older, so another stream copies them.
            with torch.cuda.stream(_beside(self.device)):
                logging_outputs, sample_size = _on_the_host((logging_outputs, sample_size))
        return super()._reduce_and_log_stats(logging_outputs, sample_size, grad_norm)

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
                tell_of_restored(self, filename, extra_state["train_iterator"], self._batches.dataset)
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


@cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _on_the_host(sample: Any) -> Any:
    """Return a copy with all tensors within lists, tuples and dictionaries on the host; their dtypes stay."""
    return utils.apply_to_sample(lambda t: t.cpu(), sample)
