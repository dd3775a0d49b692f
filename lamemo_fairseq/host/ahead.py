"""A trainer whose device goes ahead of the host.

fairseq waits for the norm of the gradients, and only then updates, logs, loads a batch and runs the model. The device
would have nothing to do meanwhile. Here the device is given the update, and if a CUDA graph is recorded the next
segment's forward pass, before the host waits. The numbers are the same to the last bit. With several ranks, hosts
exchange their losses beside the backward pass and the next segment, and wait for neither. If ranks disagree about the
norm, fairseq ends the run as usual; its crash.pt then holds the updated weights.
"""

from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Optional

import torch
from fairseq import utils
from fairseq.tasks import FairseqTask
from fairseq.trainer import Trainer
from omegaconf import OmegaConf
from torch import Tensor

from . import signals
from .data_parallel import GradientReducer, reducer_for, wrapped
from .lost_ranks import watch_ranks
from .mixed_precision import FP16Optimizer
from .optimizers import adopt, meanwhile
from .ranks import group_between_hosts


class AheadTrainer(Trainer):
    """fairseq's trainer, of which the device goes ahead."""

    cfg: Any
    device: torch.device
    _grad_norm_buf: Optional[Tensor]  # the norms of all ranks

    def __init__(self, cfg: Any, task: Any, model: Any, criterion: Any, quantizer: Any = None):
        self._reducer: Optional[GradientReducer] = None
        self._group: Any = None  # for collectives, in place of fairseq's
        super().__init__(cfg, task, model, criterion, quantizer)
        self._group_of_figures: Any = None
        if self.data_parallel_world_size > 1:
            self._group_of_figures = group_between_hosts()
            watch_ranks(self._group_of_figures, self.cfg.distributed_training.distributed_init_method)
            if self._grad_norm_buf is not None:
                self._grad_norm_buf = self._grad_norm_buf.cpu()
        self._configuration = self._options = self.cfg
        self._updating = False
        self._signal_of_any = False  # whether a rank had received a signal in the last update

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

    def begin_epoch(self, epoch: int) -> None:
        """Begin an epoch, or go on with one."""
        self._options = _attributes(OmegaConf.to_container(self.cfg, resolve=True))
        super().begin_epoch(epoch)

    def train_step(self, samples: Any, raise_oom: bool = False) -> Any:
        """Compute an update."""
        self._updating, self.cfg = True, self._options  # fairseq reads options fifty times, which OmegaConf looks up
        if self._reducer is not None:
            self._reducer.begin_update(len(samples))
        try:
            return super().train_step(samples, raise_oom)
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


@cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _on_the_host(sample: Any) -> Any:
    """Return a copy with all tensors within lists, tuples and dictionaries on the host; their dtypes stay."""
    return utils.apply_to_sample(lambda t: t.cpu(), sample)


def _attributes(section: Any) -> Any:
    """Return a dictionary, and those within it, as objects with its entries as attributes; all else as it is."""
    if not isinstance(section, dict):
        return section
    return SimpleNamespace(**{str(name): _attributes(entry) for name, entry in section.items()})
