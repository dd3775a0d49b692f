"""The memories of streams, by position.

A trainer runs forwards in any order. It validates between two updates, feeds a batch twice after an overflow, and feeds
a dummy batch on a rank without a batch. So nothing here depends on the order of calls. Each batch names its streams and
its position in them, and gets exactly the memory of that position.
"""

from typing import Dict, List, Mapping, NamedTuple, Optional, Tuple, Type, Union, cast

from .groups import SavedGroups, advance, load_groups
from .position import Reading, SegmentPosition
from .state import MemoryState, SavedField


class MissingMemoryError(RuntimeError):
    """A segment was fed, but the segment before it was not."""


class DivergenceError(FloatingPointError):
    """A loss or a memory is not a finite number."""


class _Asked(NamedTuple):
    """The memory before a segment that has not been read yet."""

    position: SegmentPosition
    after: Optional[MemoryState]  # of the segment before
    state: Optional[MemoryState]


class StreamMemory:
    """The memory of all streams that a model is reading, in training and in evaluation apart.

    For each split two memories are stored: before the segment read last, and after it. So the
    same segment may be fed again and again, and is computed from the same memory each time. Segment 0
    starts from an empty memory, whatever came before it.

    Args:
        state: the class of the states, for reading saved ones.
        options: the options that a saved memory depends on, by name.
    """

    def __init__(self, state: Type[MemoryState], options: Optional[Mapping[str, object]] = None) -> None:
        self.options: Dict[str, object] = dict(options or {})
        self._state = state
        self._readings: Dict[Tuple[str, bool], Reading] = {}
        self._states: Dict[Tuple[str, bool], Dict[int, Optional[MemoryState]]] = {}
        self._asked: Dict[Tuple[str, bool], _Asked] = {}

    def __reduce__(self) -> Tuple[object, ...]:
        # A copied or stored model (an averaged one, say) has read nothing yet.
        return (StreamMemory, (self._state, self.options))

    def read(self, position: SegmentPosition, training: bool) -> Optional[MemoryState]:
        """Return the memory before the segment at *position*, None standing for an empty one.

        Raises:
            MissingMemoryError: the segment before it has not been fed.
        """
        key = (position.split, training)
        if position.index == 0:
            self._readings[key] = position.reading
            self._states[key] = {0: None}
        states = self._of_reading(position, training)
        if position.index not in states:
            raise MissingMemoryError(
                f"no memory for segment {position.index} of {position.named_streams()} of '{position.split}' "
                f"(epoch {position.epoch}): segment {position.index - 1} of the same streams has to be fed first"
            )
        for index in [i for i in states if i < position.index]:
            del states[index]
        state = self.before(position, training)
        if state is not None:
            states[position.index] = state
        self._asked.pop(key, None)
        return state

    def write(self, position: SegmentPosition, training: bool, state: MemoryState) -> None:
        """Store the memory after the segment at *position*, unless its streams end there."""
        if not position.last:
            self._states[position.split, training][position.index + 1] = state

    def diverged_streams(self, position: SegmentPosition, training: bool) -> List[int]:
        """Return the streams whose memory after the segment at *position*, or before it, is not finite."""
        states = self._of_reading(position, training)
        for state in (states.get(position.index), states.get(position.index + 1)):
            finite = None if state is None else state.finite()
            if finite is not None and not finite.all():
                return position.streams_but(finite)
        return []

    def saved(self, position: SegmentPosition) -> Optional[MemoryState]:
        """Return the training memory after the segment at *position*, None if there is none."""
        return self._of_reading(position, training=True).get(position.index + 1)

    def has_read(self, position: SegmentPosition) -> bool:
        """Return whether training has read the segment at *position*, or its streams end there."""
        return position.last or any(index > position.index for index in self._of_reading(position, training=True))

    def before(self, position: SegmentPosition, training: bool = True) -> Optional[MemoryState]:
        """Return the memory before the segment at *position*, None if it is empty or missing.

        Unlike `read`, it allows the segment before to be read again, and `saved` returns what it would have. `read`
        then returns the same tensors.
        """
        states = self._of_reading(position, training)
        if position.index not in states:
            return None
        key, after = (position.split, training), states[position.index]
        asked = self._asked.get(key)
        if asked is None or asked.position != position or asked.after is not after:
            state = advance(after, len(position.streams), position.cleared, position.ended)
            asked = self._asked[key] = _Asked(position, after, state)
        return asked.state

    def _of_reading(self, position: SegmentPosition, training: bool) -> Dict[int, Optional[MemoryState]]:
        key = (position.split, training)
        return self._states[key] if self._readings.get(key) == position.reading else {}

    def restore(
        self, position: SegmentPosition, saved: Union[Mapping[str, SavedField], SavedGroups], streams: slice
    ) -> None:
        """Go on training after the segment at *position*, from these *streams* of a saved memory."""
        key = (position.split, True)
        state: MemoryState
        if "groups" in saved:
            state = load_groups(cast(SavedGroups, saved), self._state, range(streams.start, streams.stop))
        else:
            state = self._state.from_dict(saved).map(lambda t: t[streams].clone())
        self._readings[key] = position.reading
        self._states[key] = {position.index + 1: state}
