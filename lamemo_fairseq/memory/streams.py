"""Which memory belongs to which stream.

A trainer runs forwards in any order: validation between two updates, a batch fed twice after an
overflow, a dummy batch on a rank that has none. So nothing here depends on the order of calls: each batch
names its streams and where it stands in them, and gets exactly the memory of that place.
"""

from typing import Any, Dict, Optional, Tuple, Type

from ..data.position import SegmentPosition
from .base import MemoryState


class MissingMemoryError(RuntimeError):
    """A segment was fed whose predecessor was not."""


class StreamMemory:
    """The memory of all streams that a model is reading, in training and in evaluation apart.

    For each split it keeps the memory before the segment read last and the one after it. So the
    same segment may be fed again and again, and is computed from the same memory each time. Segment 0
    starts from an empty memory, whatever came before it.

    Args:
        state: the class of the states, for reading saved ones.
    """

    def __init__(self, state: Type[MemoryState]) -> None:
        self._state = state
        self._readings: Dict[Tuple[str, bool], Tuple[Any, ...]] = {}
        self._states: Dict[Tuple[str, bool], Dict[int, Optional[MemoryState]]] = {}

    def __reduce__(self) -> Tuple[Any, ...]:
        # A copied or stored model (an averaged one, say) has read nothing yet.
        return (StreamMemory, (self._state,))

    def read(self, position: SegmentPosition, training: bool) -> Optional[MemoryState]:
        """The memory before the segment at *position*, None standing for an empty one.

        Raises:
            MissingMemoryError: the segment before it has not been fed.
        """
        key = (position.split, training)
        if position.index == 0:
            self._readings[key] = position.reading
            self._states[key] = {0: None}
        states = self._states.get(key, {})
        if self._readings.get(key) != position.reading or position.index not in states:
            raise MissingMemoryError(
                f"no memory for segment {position.index} of streams {_brief(position.streams)} of '{position.split}' "
                f"(epoch {position.epoch}): segment {position.index - 1} of the same streams has to be fed first"
            )
        for index in [i for i in states if i < position.index]:
            del states[index]
        return states[position.index]

    def write(self, position: SegmentPosition, training: bool, state: MemoryState) -> None:
        """Keep the memory after the segment at *position*, unless its streams end there."""
        if not position.last:
            self._states[position.split, training][position.index + 1] = state

    def saved(self, position: SegmentPosition) -> Optional[Dict[str, Any]]:
        """The training memory after the segment at *position*, for a checkpoint: on the host, in plain containers."""
        key = (position.split, True)
        state = self._states.get(key, {}).get(position.index + 1)
        if state is None or self._readings[key] != position.reading:
            return None
        return state.map(lambda t: t.cpu()).to_dict()

    def restore(self, position: SegmentPosition, saved: Optional[Dict[str, Any]]) -> None:
        """Go on training after the segment at *position*, from saved memory (None: from an empty one)."""
        key = (position.split, True)
        self._readings[key] = position.reading
        self._states[key] = {position.index + 1: None if saved is None else self._state.from_dict(saved)}


def _brief(streams: Tuple[int, ...]) -> str:
    return f"{streams[0]}..{streams[-1]}" if len(streams) > 3 else ", ".join(map(str, streams))
