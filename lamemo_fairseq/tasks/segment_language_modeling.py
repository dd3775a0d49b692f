"""Language modelling on consecutive segments of long streams."""

import contextlib
import logging
import os
from functools import partial
from typing import Any, Callable, ClassVar, Dict, Iterator, List, Optional, Tuple

import torch
from fairseq import utils
from fairseq.data import Dictionary
from fairseq.logging import metrics
from fairseq.tasks import register_task

from ..core.memory import DivergenceError
from ..criterions.averages import log_loss_per_token
from ..criterions.memory_losses import PREFIX, WithMemoryLosses
from ..data.binarized import check_split, load_lines, paths_of
from ..data.documents import DocumentDataset, DocumentOptions
from ..data.folders import data_folders, shared_dictionary, tell_of_others, tell_of_parts
from ..data.iterator import SegmentBatchIterator
from ..data.segments import SegmentDataset, streams_of_a_rank, without_padding
from ..data.streams import ENOUGH_SEGMENTS, TokenSequence
from ..data.text import check_input
from ..data.text_encoding import PREPROCESS
from ..evaluation import use_for_eval_lm
from ..generation import PromptDataset
from ..host.configuration import check_criterion, check_model
from ..host.interruption import note_saved
from ..host.own import TASK
from ..host.quiet import leave_out_warnings, without_records
from ..host.ranks import launched_ranks, prepare_ranks, several_ranks
from ..host.start import check_task
from ..host.training import prepare_training
from .config import SegmentLanguageModelingConfig
from .faults import LossWatch, retry_out_of_memory
from .prompts import PromptTask
from .state import TaskState

logger = logging.getLogger(__name__)


@register_task(TASK, dataclass=SegmentLanguageModelingConfig)
class SegmentLanguageModelingTask(PromptTask):
    """Feeds B contiguous streams a rank, N tokens a step.

    ``--batch-size`` is B. A split is cut into B times ranks streams; every token of it is predicted once an epoch. Each
    batch names its streams, and its position in them.
    """

    NAME: ClassVar[str] = TASK

    def __init__(self, cfg: SegmentLanguageModelingConfig, dictionary: Dictionary, **kwargs: Any):
        super().__init__(cfg, **kwargs)
        self.state = TaskState()
        if cfg.tokens_per_sample is not None and cfg.tokens_per_sample <= 0:
            raise ValueError(f"--tokens-per-sample is {cfg.tokens_per_sample}, it must be positive")
        self.dictionary = dictionary
        self.segment_length: Optional[int] = cfg.tokens_per_sample
        self.losses = LossWatch()
        self.scored: Optional[torch.cuda.Event] = None  # event: the device has computed the last batch's loss
        self._decoder: Any = None
        self._iterators: Dict[Any, SegmentBatchIterator] = {}
        self._batches: Optional[SegmentBatchIterator] = None  # batches that a model is trained on
        self._trains = False  # whether splits and batches that are asked for are to be trained on
        self._to_train_on: Dict[str, SegmentDataset] = {}  # apart from splits of the same name to validate on
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

    @property
    def source_dictionary(self) -> Dictionary:
        return self.dictionary

    @property
    def target_dictionary(self) -> Dictionary:
        return self.dictionary

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

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> SegmentDataset:
        """Load a split; in `training_batches`, one to train on. It leaves one of the same name to validate on alone.

        Raises:
            FileNotFoundError: there is no such split.
            ValueError: the split holds no tokens, or is damaged.
        """
        paths = utils.split_paths(self.cfg.data)
        folder = paths[(epoch - 1) % len(paths)]
        path = os.path.join(folder, split)
        loaded = self._to_train_on if self._trains else self.datasets
        former, options = loaded.get(split), DocumentOptions.of(self.cfg)
        if not combine or split != self.cfg.train_subset:  # not to train on
            tell_of_others(paths, split)
        if not combine:
            tell_of_parts(folder, split, self.cfg.train_subset)
        for later in paths if former is None and split == self.cfg.train_subset else ():
            for part in check_split(later, split, self.cfg.dataset_impl, combine):
                if options is not None:
                    options.check(part)
        lines = load_lines(folder, split, self.dictionary, self.cfg.dataset_impl, combine)
        tokens = TokenSequence(lines, len(self.dictionary), path)
        if self.segment_length is None:
            raise ValueError("the segment length is not known: pass --tokens-per-sample")
        rolls = self.cfg.roll and split == self.cfg.train_subset
        if former is not None:  # data in several folders is loaded anew every epoch
            gone = former, vars(former).get("in_order")
            self._iterators = {key: batches for key, batches in self._iterators.items() if key[1] not in gone}
        sizes = {"segment_length": self.segment_length, "eos": self.dictionary.eos()}
        seed = self.cfg.seed if rolls else None
        if options is None:
            loaded[split] = SegmentDataset(tokens, split, **sizes, roll_seed=seed)
        else:
            documents = options.find(paths_of(folder, split, combine), tokens, self.dictionary)
            loaded[split] = DocumentDataset(documents, options, tokens, split, **sizes, roll_seed=seed)
        logger.info("%s: %s tokens in %s lines", path, f"{len(tokens):,}", f"{len(lines):,}")
        return loaded[split]

    def dataset(self, split: str) -> Any:
        """Return a split. One to train on may be of another folder than one to validate on, or have more parts."""
        return self._to_train_on[split] if self._trains and split in self._to_train_on else super().dataset(split)

    @contextlib.contextmanager
    def training_batches(self) -> Iterator[None]:
        """Let splits and batches that are asked for in this context be for training; all others are for evaluation."""
        self._trains = True
        try:
            yield
        finally:
            self._trains = False

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

    def get_batch_iterator(
        self,
        dataset: Any,
        max_tokens: Optional[int] = None,
        max_sentences: Optional[int] = None,
        num_shards: int = 1,
        shard_id: int = 0,
        as_streams: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return fairseq's iterator; for a split of streams, batches of consecutive segments.

        ``max_sentences`` is the number of streams a rank. Without it there are as many streams as ``max_tokens`` holds
        segments. In evaluation there are no more than leave each stream its context. Options about sizes, shuffling and
        remainders do not apply to streams. Batches to train on are asked for in `training_batches`. For
        fairseq-generate, the lines of the split as prompts.
        """
        if isinstance(dataset, SegmentDataset) and (as_streams or not getattr(self._decoder, "for_inference", False)):
            rank = self._shard(num_shards, shard_id)
            return self._stream_batches(dataset, max_tokens, max_sentences, *rank, **kwargs)
        if isinstance(dataset, SegmentDataset):
            # Of the commands that prepare a model for inference, fairseq-generate alone comes here: it wants prompts.
            prompts = PromptDataset(dataset.tokens.lines, self.dictionary, with_end=True)
            prompts.take_shard(*self._shard(num_shards, shard_id), name=f"the split '{dataset.split}'")
            dataset, num_shards, shard_id = prompts, 1, 0
        if max_tokens is not None:  # a text is read in pieces, so that a long one is a batch of its own
            max_tokens = max([max_tokens, *map(int, dataset.sizes)])
        kwargs["required_batch_size_multiple"] = 1  # with another value fairseq drops texts at the end
        sizes = {"max_tokens": max_tokens, "max_sentences": max_sentences}
        with without_records("fairseq.tasks.fairseq_task"):  # four lines a prompt in fairseq-interactive
            return super().get_batch_iterator(dataset, **sizes, num_shards=num_shards, shard_id=shard_id, **kwargs)

    def _stream_batches(
        self,
        dataset: SegmentDataset,
        max_tokens: Optional[int],
        max_sentences: Optional[int],
        num_shards: int,
        shard_id: int,
        num_workers: int = 0,
        epoch: int = 1,
        data_buffer_size: int = 0,
        seed: int = 1,
        **unused: Any,
    ) -> SegmentBatchIterator:
        """Return the batches of a split's streams; in evaluation, the former batches if they would be the same."""
        training = self._trains
        if not training and dataset.roll_seed is not None:
            dataset = dataset.in_order
        streams = streams_of_a_rank(dataset, max_tokens, max_sentences, 0 if training else num_shards)
        key = (training, dataset, streams, num_shards, shard_id, num_workers, data_buffer_size)
        if training or key not in self._iterators:
            self._announce(dataset, streams, num_shards)
            self._iterators[key] = SegmentBatchIterator(
                dataset,
                streams,
                num_shards=num_shards,
                shard_id=shard_id,
                memory=self._decoder.streams if training and self._decoder is not None else None,
                update_freq=self._update_freq(epoch) if training else 1,
                seed=seed,
                num_workers=num_workers,
                epoch=epoch,
                buffer_size=data_buffer_size,
                reuse_dataloader=True,
                # The end of an epoch ends its threads too. The garbage collector would take their queues away first,
                # and each thread would be waited for in vain for five seconds.
                persistent_workers=not training,
            )
            if training:
                self._batches = self._iterators[key]
        return self._iterators[key]

    def _announce(self, dataset: SegmentDataset, streams: int, ranks: int) -> None:
        """Log how a split is cut.

        Raises:
            ValueError: a stream would hold too little.
        """
        layout = dataset.layout(streams * ranks)
        # In training, validation has an option of its own.
        option = "--batch-size" if self._trains or self._batches is None else "--batch-size-valid"
        layout.check(f"the split '{dataset.split}'", self._trains, option)
        logger.info("%s: %s", dataset.split, layout.summary())
        if not self._trains and self._decoder is not None and self._decoder.memory.remembers:
            layout.warn_of_empty_memories(dataset.split, ENOUGH_SEGMENTS // 4, ranks, option)

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

    def _update_freq(self, epoch: int) -> int:
        every = self.cfg.update_freq
        return every[min(epoch, len(every)) - 1]

    def max_positions(self) -> Optional[Tuple[int, ...]]:
        return None  # streams have no length limit
