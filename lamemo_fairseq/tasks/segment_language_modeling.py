"""Language modelling on consecutive segments of long streams."""

import logging
from functools import partial
from typing import Any, Callable, ClassVar, Dict, List, Optional, Tuple

import torch
from fairseq.data import Dictionary
from fairseq.logging import metrics
from fairseq.tasks import register_task

from ..core.memory import DivergenceError
from ..criterions.averages import log_loss_per_token
from ..criterions.memory_losses import PREFIX, WithMemoryLosses
from ..data.folders import data_folders, shared_dictionary
from ..data.segments import without_padding
from ..data.text import check_input
from ..data.text_encoding import PREPROCESS
from ..evaluation import use_for_eval_lm
from ..host.configuration import check_criterion, check_model
from ..host.interruption import note_saved
from ..host.option_checks import check_task
from ..host.own import TASK
from ..host.quiet import leave_out_warnings
from ..host.ranks import launched_ranks, prepare_ranks, several_ranks
from ..host.training import prepare_training
from .config import SegmentLanguageModelingConfig
from .faults import LossWatch, retry_out_of_memory
from .splits import SplitTask
from .state import TaskState

logger = logging.getLogger(__name__)


@register_task(TASK, dataclass=SegmentLanguageModelingConfig)
class SegmentLanguageModelingTask(SplitTask):
    """Feeds B contiguous streams a rank, N tokens a step.

    ``--batch-size`` is B. A split is cut into B times ranks streams; every token of it is predicted once an epoch. Each
    batch names its streams, and its position in them.
    """

    NAME: ClassVar[str] = TASK

    def __init__(self, cfg: SegmentLanguageModelingConfig, dictionary: Dictionary, **kwargs: Any):
        super().__init__(cfg, dictionary, **kwargs)
        self.state = TaskState()
        self.losses = LossWatch()
        self.scored: Optional[torch.cuda.Event] = None  # event: the device has computed the last batch's loss
        self._from_checkpoint = bool(kwargs.get("from_checkpoint", False))

    @classmethod
    def setup_task(cls, cfg: SegmentLanguageModelingConfig, **kwargs: Any) -> "SegmentLanguageModelingTask":
        """Load the dictionary of the data.

        Raises:
            OSError: a folder, the dictionary or the file of ``--input`` is missing.
            ValueError: a file cannot be read, folders have different dictionaries, or torchrun's processes do not know
                of each other.
        """
        check_task(cfg, kwargs.get("from_checkpoint", False))
        leave_out_warnings()
        prepare_training()
        prepare_ranks()
        if launched_ranks() > 1 and not several_ranks():
            raise ValueError(
                f"torchrun has started {launched_ranks()} processes, but fairseq takes each for a job of "
                "its own: pass --distributed-world-size with the number of ranks (for a YAML on CPUs see "
                "docs/several_machines.md)"
            )
        if not cfg.data:
            raise ValueError(f"no data: pass the folder that {PREPROCESS} or fairseq-preprocess wrote")
        dictionary = shared_dictionary(data_folders(cfg.data))
        check_input(cfg)
        logger.info("dictionary: %d types", len(dictionary))
        return cls(cfg, dictionary, **kwargs)

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        check_model(cfg, self.NAME)
        model = super().build_model(cfg, from_checkpoint)
        self._decoder = model.decoder
        if self.segment_length is None:
            self.segment_length = self._decoder.segment_length
        return model

    def build_criterion(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        if self._from_checkpoint:
            check_criterion(cfg)
        if getattr(cfg, "ignore_prefix_size", 0):
            raise ValueError("--ignore-prefix-size drops the first tokens of every segment from the loss: leave it out")
        return super().build_criterion(cfg, from_checkpoint)

    def begin_epoch(self, epoch: int, model: Any) -> None:
        """Begin an epoch of training, or go on with one.

        Raises:
            RuntimeError: fairseq's own trainer trains. Its checkpoints would lack the memory.
        """
        if self._batches is None:
            raise RuntimeError(
                "fairseq's own Trainer saves no memory of the streams: train with fairseq-train, which chooses "
                "lamemo_fairseq.host.trainer.SegmentTrainer for this task, or use that class"
            )
        super().begin_epoch(epoch, model)

    def train_step(
        self,
        sample: Dict[str, Any],
        model: Any,
        criterion: Any,
        optimizer: Any,
        update_num: int,
        ignore_grad: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run forward and backward on a batch, once more if the device runs out of memory.

        Raises:
            DivergenceError: the loss of the batch before was not a finite number.
        """
        sample = without_padding(sample)
        inputs = sample["net_input"]

        def forward_and_backward(forward: Any) -> Any:
            return super(SegmentLanguageModelingTask, self).train_step(
                sample, model, forward, optimizer, update_num, ignore_grad, **kwargs
            )

        if self._decoder.memory.has_losses:
            criterion = WithMemoryLosses(criterion)

        def score(*args: Any) -> Any:
            scored = criterion(*args)
            self.scored = torch.cuda.current_stream().record_event() if inputs["src_tokens"].is_cuda else None
            return scored

        advance = partial(self._decoder.move_on, **inputs)
        result = retry_out_of_memory(forward_and_backward, score, model, advance, alone=not several_ranks())
        self._decoder.tell_without_gradient()
        self.losses.check()
        self.losses.note(result[0], inputs["position"], update_num + 1, self._decoder.streams)
        result[2]["nsentences"] = sample["nsentences"]  # criterions count streams that have ended too
        return result

    def begin_next_segment(self, prepare: Callable[[Dict[str, Any]], Dict[str, Any]], seed: int) -> None:
        """Let the device read the next training segment, if a CUDA graph can, before the trainer asks for it.

        Args:
            prepare: brings a batch to the device.
            seed: of the next update.
        """
        if self._decoder is None or self._decoder.graphs is None or self._batches is None:
            return
        loaded, sample = self._batches.peek(prepare)
        if sample:
            inputs, target = sample["net_input"], (sample["target"], loaded["target"])
            self._decoder.begin_segment(inputs["src_tokens"], *target, inputs["position"], seed)

    def valid_step(self, sample: Dict[str, Any], model: Any, criterion: Any, **kwargs: Any) -> Any:
        """Return the loss of a batch.

        Raises:
            DivergenceError: the loss is not a finite number.
        """
        sample = without_padding(sample)
        try:
            result = super().valid_step(sample, model, criterion, **kwargs)
        except DivergenceError as error:
            raise DivergenceError(f"{self.losses.when()}{error}") from error
        result[2]["nsentences"] = sample["nsentences"]
        if not torch.isfinite(result[0]).all():
            position = sample["net_input"]["position"]
            raise DivergenceError(
                f"{self.losses.when()}NaN or infinity in the loss of segment {position.index} of "
                f"{position.named_streams()} of '{position.split}'"
            )
        return result

    def reduce_metrics(self, logging_outputs: List[Dict[str, Any]], criterion: Any) -> None:
        """Log the criterion's losses, and the memory's losses per token, in nats or in the units of their papers."""
        log_loss_per_token(logging_outputs, criterion)
        super().reduce_metrics(logging_outputs, criterion)
        tokens = sum(logged.get("ntokens", 0) for logged in logging_outputs)
        for name in {name for logged in logging_outputs for name in logged if name.startswith(PREFIX)}:
            total = sum(logged.get(name, 0) for logged in logging_outputs)
            metrics.log_scalar(name, total / tokens, tokens, round=5)

    def post_save(self, path: str, updates: int) -> None:
        """Record that a checkpoint has been written, with all its copies."""
        note_saved(updates)

    def eval_lm_dataloader(
        self,
        dataset: Any,
        max_tokens: Optional[int] = 36000,
        batch_size: Optional[int] = None,
        context_window: int = 0,
        num_shards: int = 1,
        shard_id: int = 0,
        num_workers: int = 1,
        data_buffer_size: int = 10,
        **kwargs: Any,
    ) -> Any:
        """Return batches for fairseq-eval-lm."""
        if context_window > 0:
            raise ValueError(
                "--context-window does not apply to a model with memory, whose memory is the context: leave it out, "
                "and choose the memory length with --model-overrides \"{'mem_len': M}\""
            )
        trained, documents = self.trained_documents, str(self.cfg.documents)
        if trained != "none" and documents == "none":
            logger.warning(
                "the checkpoint was trained with --documents %s, but without that option the split is read as one text",
                trained,
            )
        use_for_eval_lm(dataset)
        return self.get_batch_iterator(
            dataset,
            max_tokens=max_tokens,
            max_sentences=batch_size,
            num_shards=num_shards,
            shard_id=shard_id,
            num_workers=num_workers,
            data_buffer_size=data_buffer_size,
            as_streams=True,
        ).next_epoch_itr(shuffle=False)

    def max_positions(self) -> Optional[Tuple[int, ...]]:
        return None  # streams have no length limit
