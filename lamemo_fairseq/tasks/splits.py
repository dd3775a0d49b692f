"""The task's side of splits: loading them, and batches of their streams."""

import contextlib
import logging
import os
from typing import Any, Dict, Iterator, List, Optional

from fairseq import utils
from fairseq.data import Dictionary

from ..data.binarized import check_split, load_lines, paths_of
from ..data.documents import DocumentDataset, DocumentOptions
from ..data.folders import tell_of_others, tell_of_parts
from ..data.iterator import SegmentBatchIterator
from ..data.segments import SegmentDataset, streams_of_a_rank
from ..data.streams import ENOUGH_SEGMENTS, TokenSequence
from ..generation import PromptDataset
from ..host.quiet import without_records
from .config import SegmentLanguageModelingConfig
from .prompts import PromptTask

logger = logging.getLogger(__name__)


class SplitTask(PromptTask):
    """Splits as B contiguous streams a rank, in batches of consecutive segments."""

    def __init__(self, cfg: SegmentLanguageModelingConfig, dictionary: Dictionary, **kwargs: Any):
        super().__init__(cfg, **kwargs)
        if cfg.tokens_per_sample is not None and cfg.tokens_per_sample <= 0:
            raise ValueError(f"--tokens-per-sample is {cfg.tokens_per_sample}, it must be positive")
        self.dictionary = dictionary
        self.segment_length: Optional[int] = cfg.tokens_per_sample
        self._decoder: Any = None
        self._iterators: Dict[Any, SegmentBatchIterator] = {}
        self._batches: Optional[SegmentBatchIterator] = None  # batches that a model is trained on
        self._trains = False  # whether splits and batches that are asked for are to be trained on
        self._to_train_on: Dict[str, SegmentDataset] = {}  # apart from splits of the same name to validate on

    @property
    def source_dictionary(self) -> Dictionary:
        return self.dictionary

    @property
    def target_dictionary(self) -> Dictionary:
        return self.dictionary

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> SegmentDataset:
        """Load a split; in `training_batches`, one to train on. It leaves one of the same name to validate on alone.

        Raises:
            FileNotFoundError: there is no such split.
            ValueError: the split holds no tokens, or is damaged.
        """
        paths = utils.split_paths(self.cfg.data)
        folder = paths[(epoch - 1) % len(paths)]
        if not combine or split != self.cfg.train_subset:  # not to train on
            tell_of_others(paths, split)
        if not combine:
            tell_of_parts(folder, split, self.cfg.train_subset)
        loaded = self._to_train_on if self._trains else self.datasets
        former = loaded.get(split)
        if former is None and split == self.cfg.train_subset:
            self._check_folders(paths, split, combine)
        dataset = self._load(folder, split, combine)
        if former is not None:  # data in several folders is loaded anew every epoch
            gone = former, vars(former).get("in_order")
            self._iterators = {key: batches for key, batches in self._iterators.items() if key[1] not in gone}
        loaded[split] = dataset
        tokens = dataset.tokens
        logger.info("%s: %s tokens in %s lines", tokens.name, f"{len(tokens):,}", f"{len(tokens.lines):,}")
        return dataset

    def _check_folders(self, paths: List[str], split: str, combine: bool) -> None:
        """Check a split to train on in all folders, as an epoch that finds one damaged may be days away."""
        options = DocumentOptions.of(self.cfg)
        for folder in paths:
            for part in check_split(folder, split, self.cfg.dataset_impl, combine):
                if options is not None:
                    options.check(part)

    def _load(self, folder: str, split: str, combine: bool) -> SegmentDataset:
        lines = load_lines(folder, split, self.dictionary, self.cfg.dataset_impl, combine)
        tokens = TokenSequence(lines, len(self.dictionary), os.path.join(folder, split))
        if self.segment_length is None:
            raise ValueError("the segment length is not known: pass --tokens-per-sample")
        sizes = {"segment_length": self.segment_length, "eos": self.dictionary.eos()}
        seed = self.cfg.seed if self.cfg.roll and split == self.cfg.train_subset else None
        options = DocumentOptions.of(self.cfg)
        if options is None:
            return SegmentDataset(tokens, split, **sizes, roll_seed=seed)
        documents = options.find(paths_of(folder, split, combine), tokens, self.dictionary)
        return DocumentDataset(documents, options, tokens, split, **sizes, roll_seed=seed)

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

    def _update_freq(self, epoch: int) -> int:
        every = self.cfg.update_freq
        return every[min(epoch, len(every)) - 1]
