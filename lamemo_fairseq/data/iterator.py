"""Batches of consecutive segments, in order, each rank reading its own streams."""

import logging
from collections.abc import Sequence
from typing import Any, Dict, List, Optional

from fairseq.data.iterators import EpochBatchIterator

from ..memory.streams import StreamMemory
from .position import SegmentPosition
from .segments import SegmentDataset, SegmentKey

logger = logging.getLogger(__name__)


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


class SegmentBatchIterator(EpochBatchIterator):
    """fairseq's iterator over a split of streams.

    It never shuffles, and shards streams where fairseq shards batches. What it saves says how the streams were cut, and
    carries the memory they had.

    Args:
        dataset: the split.
        batch_size: streams a rank.
        num_shards, shard_id: number of ranks, and this one.
        memory: the memory of the model that trains on it, None for evaluation.
        kwargs: as for fairseq's iterator.
    """

    def __init__(
        self,
        dataset: SegmentDataset,
        batch_size: int,
        num_shards: int = 1,
        shard_id: int = 0,
        memory: Optional[StreamMemory] = None,
        **kwargs: Any,
    ):
        self.layout = dataset.layout(batch_size * num_shards)
        self.streams = range(shard_id * batch_size, (shard_id + 1) * batch_size)
        self.memory = memory
        super().__init__(
            dataset=dataset,
            collate_fn=dataset.collater,
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

    def state_dict(self) -> Dict[str, Any]:
        saved = super().state_dict()
        saved["streams"] = {"count": self.layout.num_streams, "segment_length": self.layout.segment_length}
        done = saved["iterations_in_epoch"]
        if done > 0 and self.memory is not None:
            saved["memory"] = self.memory.saved(self._position(saved["epoch"], done - 1))
            saved["memory_streams"] = list(self.streams)
        return saved

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        done = state_dict.get("iterations_in_epoch", 0)
        if done > 0:
            self._check_layout(state_dict.get("streams"))
            if self.memory is not None:
                position = self._position(state_dict["epoch"], done - 1)
                self.memory.restore(position, self._saved_memory(state_dict))
        super().load_state_dict(state_dict)

    def _check_layout(self, saved: Optional[Dict[str, int]]) -> None:
        current = {"count": self.layout.num_streams, "segment_length": self.layout.segment_length}
        if saved == current:
            return
        before = (
            f"{saved['count']} streams in segments of {saved['segment_length']}" if saved else "another kind of batches"
        )
        raise ValueError(
            f"the checkpoint stopped inside an epoch that it read as {before}, and this run reads "
            f"{current['count']} streams in segments of {current['segment_length']}: resume with the same --batch-size "
            "times ranks and --tokens-per-sample, or pass --reset-dataloader to begin the data anew"
        )

    def _saved_memory(self, state_dict: Dict[str, Any]) -> Optional[Dict[str, Any]]:
        if state_dict.get("memory") is not None and state_dict["memory_streams"] == list(self.streams):
            return state_dict["memory"]
        logger.warning(
            "the checkpoint does not hold the memory of streams %d..%d: they go on from an empty memory",
            self.streams[0],
            self.streams[-1],
        )
        return None

    def _position(self, epoch: int, index: int) -> SegmentPosition:
        return SegmentPosition(
            split=self.dataset.split,
            epoch=epoch,
            num_streams=self.layout.num_streams,
            segment_length=self.layout.segment_length,
            streams=tuple(self.streams),
            index=index,
        )
