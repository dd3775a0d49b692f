"""Batches of consecutive segments, in order, each rank reading its own streams."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

from fairseq.data.iterators import EpochBatchIterator

from ..core.memory.groups import SavedGroups, join_batches, save_groups
from ..core.memory.position import SegmentPosition
from ..core.memory.state import SavedField
from ..core.memory.streams import StreamMemory
from ..host.loading import end, end_at_exit, start_workers_as_by_default
from ..host.ranks import gather_objects, gather_streams
from ..host.signals import heed_only_the_parent
from .documents import DocumentDataset
from .segments import ROLL, TEXT, Segment, SegmentDataset, SegmentKey

logger = logging.getLogger(__name__)

# What a checkpoint that is older than the option was trained with; `host.restoring` adds the memory's own options.
_BEFORE: Dict[str, object] = {"--documents": "none"}


class SegmentBatches(Sequence):
    """The batches of one epoch for one rank: batch k holds segment k of each of its streams."""

    def __init__(self, epoch: int, num_streams: int, streams: range, indices: range):
        self.epoch = epoch
        self.num_streams = num_streams
        self.streams = streams
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, slice):
            return SegmentBatches(self.epoch, self.num_streams, self.streams, self.indices[item])
        index = self.indices[item]
        return [SegmentKey(self.epoch, self.num_streams, index, stream) for stream in self.streams]


class Peekable(Iterator):
    """An iterator whose next item can be looked at. An error in reading it is raised when the item is asked for."""

    def __init__(self, items: Iterator):
        end_at_exit(items)
        self._items = items
        self._begun = False
        self._peeked: List[Tuple[Any, Any]] = []
        self._error: Optional[Exception] = None

    def __next__(self) -> Any:
        if self._error is not None:
            raise self._error
        if not self._peeked:
            return self._next()
        item, prepared = self._peeked.pop()
        return item if prepared is None else prepared

    def peek(self, prepare: Callable[[Any], Any]) -> Tuple[Any, Any]:
        """Return the next item and ``prepare(item)``, which will be consumed; None and None if there is none.

        An item that cannot be prepared is consumed as it is, and None stands for the second.
        """
        if not self._peeked and self._error is None:
            try:
                item = self._next()
            except Exception as error:  # StopIteration is one of them
                self._error = error
                return None, None
            prepared = None
            with suppress(Exception):  # whoever consumes the item prepares it, and meets the error
                prepared = prepare(item)
            self._peeked.append((item, prepared))
        return self._peeked[0] if self._peeked else (None, None)

    def _next(self) -> Any:
        item = next(self._items)
        if not self._begun:
            end_at_exit(self._items)
        self._begun = True
        return item

    def take(self, count: int) -> None:
        """Drop all but the first *count* of the items that are left, where the iterator can."""
        if hasattr(self._items, "take"):
            self._items.take(max(0, count - len(self._peeked)))


class SegmentBatchIterator(EpochBatchIterator):
    """fairseq's iterator over a split of streams.

    It never shuffles, and shards streams where fairseq shards batches. Its saved state says how the streams were cut,
    and has their memory.

    Args:
        dataset: the split.
        batch_size: streams a rank.
        num_shards, shard_id: the number of ranks, and the index of this rank.
        memory: the memory of the model that trains on it, None for evaluation.
        update_freq: segments an update.
        kwargs: as for fairseq's iterator.
    """

    def __init__(
        self,
        dataset: SegmentDataset,
        batch_size: int,
        num_shards: int = 1,
        shard_id: int = 0,
        memory: Optional[StreamMemory] = None,
        update_freq: int = 1,
        **kwargs: Any,
    ):
        self.layout = dataset.layout(batch_size * num_shards)
        self.streams = range(shard_id * batch_size, (shard_id + 1) * batch_size)
        self.memory = memory
        self.update_freq = update_freq
        self._gathered: Optional[Tuple[SegmentPosition, Union[Dict[str, SavedField], SavedGroups]]] = None
        self._loaded_ahead: Any = None
        start_workers_as_by_default()
        super().__init__(
            dataset=dataset,
            collate_fn=partial(_collate, dataset),
            batch_sampler=(),
            num_shards=num_shards,
            shard_id=shard_id,
            disable_shuffling=True,
            **kwargs,
        )

    def __len__(self) -> int:
        return self.layout.num_segments

    @property
    def frozen_batches(self) -> SegmentBatches:
        return self.ordered_batches(self.epoch)

    def ordered_batches(self, epoch: int, fix_batches_to_gpus: bool = False, shuffle: bool = False) -> SegmentBatches:
        return SegmentBatches(epoch, self.layout.num_streams, self.streams, range(self.layout.num_segments))

    @property
    def first_batch(self) -> Dict[str, Any]:
        keys: List[SegmentKey] = self.frozen_batches[0]
        return self.collate_fn([self.dataset[key] for key in keys])

    def peek(self, prepare: Callable[[Dict[str, Any]], Dict[str, Any]]) -> Tuple[Any, Any]:
        """Return the next batch as it was loaded, and prepared, without consuming it; None at the end of an epoch."""
        batches = self._cur_epoch_itr
        return batches._itr.peek(prepare) if batches is not None and batches.has_next() else (None, None)

    def _get_iterator_for_epoch(self, *args: Any, **kwargs: Any) -> Any:
        end(self._loaded_ahead)
        batches = super()._get_iterator_for_epoch(*args, **kwargs)
        if batches is not None:
            self._loaded_ahead = batches._itr
            batches._itr = Peekable(batches._itr)
        return batches

    def unread(self, count: int) -> None:
        """Count the last *count* batches as unread, for a run that is saved without having trained on them."""
        self._cur_epoch_itr.n -= count

    def gather_memory(self) -> None:
        """Bring the memory of every rank to the first one, which alone saves. Every rank has to call it."""
        position = self._last_position()
        if position is None or self.memory is None:
            return
        state = self.memory.saved(position)
        if state is None:
            raise RuntimeError(
                f"there is no memory after segment {position.index} of {position.named_streams()} to save"
            )
        saved: Union[Dict[str, SavedField], SavedGroups]
        if isinstance(self.dataset, DocumentDataset):  # memories of the ranks have different shapes
            saved = join_batches(gather_objects(save_groups(state, len(self.streams))))
        else:
            gathered = iter(gather_streams(state.tensors(), self.num_shards))
            saved = state.map(lambda _: next(gathered)).to_dict()
        self._gathered = (position, saved) if self.shard_id == 0 else None

    def state_dict(self) -> Dict[str, Any]:
        """Return the state for a checkpoint: the position in the epoch, the cut of the data, the memory of all streams.

        With several ranks, `gather_memory` has to be called before.
        """
        saved = super().state_dict()
        saved["layout"] = self._layout_options()
        position = self._last_position()
        if position is not None and self.memory is not None:
            if self._gathered is None and self.num_shards == 1:
                self.gather_memory()
            if self._gathered is None or self._gathered[0] != position:
                raise RuntimeError("the memory of the other ranks was not gathered before saving")
            saved["memory"] = self._gathered[1]
            self._gathered = None
        return saved

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Go on where a checkpoint stopped.

        Raises:
            ValueError: the checkpoint stopped inside an epoch, and this run cuts the data otherwise, or the memory is
                missing.
        """
        done = state_dict.get("iterations_in_epoch", 0)
        if done > 0:
            self._check_layout(state_dict.get("layout"), done)
            if self.memory is not None:
                if state_dict.get("memory") is None:
                    raise ValueError(
                        "the checkpoint stopped inside an epoch but does not hold the memory that the streams had: "
                        "pass --reset-dataloader to begin the data anew"
                    )
                streams = slice(self.streams.start, self.streams.stop)
                self.memory.restore(self._position(state_dict["epoch"], done - 1), state_dict["memory"], streams)
        super().load_state_dict(state_dict)

    def tell_of_another_text(self, state_dict: Dict[str, Any], path: str) -> None:
        """Warn if the checkpoint *path*, with this saved state, was trained on another text.

        Inside an epoch another text has been refused.
        """
        then, now = (state_dict.get("layout") or {}).get(TEXT), self.dataset.tokens.fingerprint
        if then not in (None, now):
            logger.warning("%s: the text of the split '%s' is %s, there it was %s", path, self.dataset.split, now, then)

    def _layout_options(self) -> Dict[str, Any]:
        """Return the values that the position in an epoch and the memory depend on, by the names of the options."""
        return {
            "--batch-size times ranks": self.layout.num_streams,
            "--tokens-per-sample": self.layout.segment_length,
            "the number of tokens of the split": self.layout.num_tokens,
            **self.dataset.options(),
            **({} if self.memory is None else self.memory.options),
        }

    def _check_layout(self, saved: Optional[Dict[str, Any]], done: int) -> None:
        current = self._layout_options()
        # Checkpoints of before say nothing of the text.
        saved = {**_BEFORE, TEXT: current[TEXT], **saved} if saved else {}
        other = [
            f"{name.partition(' with its')[0]} is {_shown(name, value)}, there it was "
            f"{_shown(name, saved.get(name, 'not recorded'))}"
            for name, value in current.items()
            if name not in saved or saved[name] != value
        ]
        if not other and done % self.update_freq:
            other = [f"--update-freq is {self.update_freq}, which does not divide the {done} segments already read"]
        if other:
            raise ValueError(
                f"the checkpoint stopped inside an epoch, and this run would not go on with the same streams: "
                f"{'; '.join(other)}. Resume with the former values, or pass --reset-dataloader to begin the data anew"
            )

    def _last_position(self) -> Optional[SegmentPosition]:
        """Return the segment read last, None at the beginning or end of an epoch."""
        done = 0 if self.end_of_epoch() else self.iterations_in_epoch
        return self._position(self.epoch, done - 1) if done > 0 else None

    def _position(self, epoch: int, index: int) -> SegmentPosition:
        return SegmentPosition(
            split=self.dataset.split,
            epoch=epoch,
            num_streams=self.layout.num_streams,
            segment_length=self.layout.segment_length,
            streams=tuple(self.streams),
            index=index,
        )


def _collate(dataset: SegmentDataset, segments: List[Segment]) -> Dict[str, Any]:
    heed_only_the_parent()  # in a process that loads batches
    return dataset.collater(segments)


def _shown(name: str, value: Any) -> str:
    """Return an option's value for a message. A rotation of the streams is recorded as its seed, or None."""
    if name == ROLL and isinstance(value, int):
        return f"on with --seed {value}"
    if isinstance(value, bool):
        return "given" if value else "not given"
    return "off" if value is None else str(value)
