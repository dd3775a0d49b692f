"""Memories of streams that begin at different times, read in groups of streams whose states have the same shapes.

A memory fills up while a stream is read. If single streams begin anew, their states have other shapes than the states
of the other streams. Streams whose states have the same shapes form a group. Each group is read as a batch of its own,
so that every memory is exact without any code for groups.

Shapes: B streams, N tokens of a segment, d model width.
"""

from dataclasses import dataclass
from typing import (
    Callable,
    Collection,
    Dict,
    Iterable,
    List,
    NamedTuple,
    Optional,
    Protocol,
    Sequence,
    Tuple,
    Type,
    TypedDict,
)

import torch
from torch import Tensor

from .base import Passage
from .state import MemoryState, SavedField


class ReadSegment(Protocol):
    """A function that reads one segment of streams whose states have the same shapes."""

    def __call__(self, tokens: Tensor, state: Optional[MemoryState], lengths: Optional[Tensor] = None) -> Passage: ...


class Group(NamedTuple):
    """Streams whose states have the same shapes."""

    streams: Tuple[int, ...]  # entries of the batch, in order
    state: Optional[MemoryState]  # of these streams; None if their memories are empty


@dataclass(frozen=True)
class GroupedState(MemoryState):
    """The state of a batch whose streams have states of different shapes. A stream in no group has ended."""

    num_streams: int  # B
    groups: Tuple[Group, ...]

    def map(self, fn: Callable[[Tensor], Tensor]) -> "GroupedState":
        mapped = (group._replace(state=None if group.state is None else group.state.map(fn)) for group in self.groups)
        return GroupedState(self.num_streams, tuple(mapped))

    def finite(self) -> Optional[Tensor]:
        finite: Optional[Tensor] = None
        for group in self.groups:
            of_group = None if group.state is None else group.state.finite()
            if of_group is not None:
                finite = of_group.new_ones(self.num_streams) if finite is None else finite
                finite[list(group.streams)] = of_group
        return finite

    def to_dict(self) -> Dict[str, SavedField]:
        raise TypeError("save_groups writes the states of groups, each of which has fields of its own")


def advance(
    state: Optional[MemoryState],
    num_streams: int,
    cleared: Collection[int] = (),
    ended: Collection[int] = (),
) -> Optional[MemoryState]:
    """Return the memory before the next segment of a batch. Applied to the result again, it changes nothing.

    Args:
        state: the memory after the former segment, not changed; None for an empty memory.
        num_streams: B.
        cleared: streams that begin anew, from an empty memory.
        ended: streams without further tokens. They are not read, unless they are cleared later.

    Returns:
        An ordinary state if all states have the same shapes, None if all memories are empty, else a `GroupedState`.

    Raises:
        ValueError: the state is not of B streams, or a stream to clear or to end is none of them.
    """
    if not cleared and not ended and not isinstance(state, GroupedState):
        return state
    streams = count_streams(state)
    if streams not in (None, num_streams):
        raise ValueError(f"num_streams is {num_streams}, and the state is of {streams} streams: pass their number")
    unknown = [stream for stream in (*cleared, *ended) if not 0 <= stream < num_streams]
    if unknown:
        raise ValueError(
            f"there is no stream {unknown[0]}: pass streams to clear or to end from 0 to {num_streams - 1}"
        )
    empty = set(cleared) - set(ended)
    alike: Dict[Tuple[torch.Size, ...], List[Group]] = {}
    for group in _groups(state, num_streams):
        if group.state is None or not group.state.tensors():
            empty.update(set(group.streams) - set(ended))
        else:
            shapes = tuple(t.shape[1:] for t in group.state.tensors())
            going_on = [stream not in cleared and stream not in ended for stream in group.streams]
            alike.setdefault(shapes, []).append(_chosen(group, going_on))
    groups = [_joined(those) for those in alike.values()]
    if empty:
        groups.append(Group(tuple(sorted(empty)), None))
    groups = sorted((group for group in groups if group.streams), key=lambda group: group.streams)
    if len(groups) == 1 and len(groups[0].streams) == num_streams:
        return groups[0].state
    return GroupedState(num_streams, tuple(groups))


def count_streams(state: Optional[MemoryState]) -> Optional[int]:
    """Return the number of streams that a state is of; None if it has no tensors, as an empty memory."""
    if isinstance(state, GroupedState):
        return state.num_streams
    return next((len(tensor) for tensor in state.tensors()), None) if state is not None else None


def read_groups(read: ReadSegment, tokens: Tensor, state: GroupedState, lengths: Optional[Tensor]) -> Passage:
    """Read a segment ``tokens [B, N]`` group by group.

    Args:
        read: reads the segment of one group.
        lengths: ``[B]`` tokens that are not padding; None if none is.

    Returns:
        Features ``[B, N, d]``, which mean nothing for streams that have ended; the memory after the segment; and
        the mean of each loss over tokens.
    """
    # If all streams have ended, stream 0 is read as padding, so that this rank takes part in the backward pass.
    groups = state.groups or (Group((0,), None),)
    entries = [torch.tensor(group.streams, device=tokens.device) for group in groups]
    passages = [
        read(tokens[rows], group.state, None if lengths is None else lengths[rows])
        for group, rows in zip(groups, entries, strict=True)
    ]
    features = passages[0].features.new_zeros(*tokens.shape, passages[0].features.size(2))
    for rows, passage in zip(entries, passages, strict=True):
        features = features.index_copy(0, rows, passage.features)
    after = (group._replace(state=passage.state) for group, passage in zip(groups, passages, strict=True))
    counts = torch.full_like(tokens[:, 0], tokens.size(1)) if lengths is None else lengths
    losses = _means(passages, [counts[rows].sum() for rows in entries])
    return Passage(features, GroupedState(state.num_streams, tuple(after) if state.groups else ()), losses)


class SavedGroup(TypedDict):
    """A group in plain containers."""

    streams: List[int]
    state: Optional[Dict[str, SavedField]]


class SavedGroups(TypedDict):
    """The memory of a batch in plain containers, for a checkpoint."""

    num_streams: int
    groups: List[SavedGroup]


def save_groups(state: MemoryState, num_streams: int) -> SavedGroups:
    """Return the state of a batch in plain containers, its tensors on the host."""
    return {
        "num_streams": num_streams,
        "groups": [
            {
                "streams": list(group.streams),
                "state": None if group.state is None else group.state.map(lambda t: t.cpu()).to_dict(),
            }
            for group in _groups(state, num_streams)
        ],
    }


def join_batches(saved: Iterable[SavedGroups]) -> SavedGroups:
    """Join the batches of several ranks, in order of rank, to one."""
    joined: SavedGroups = {"num_streams": 0, "groups": []}
    for batch in saved:
        for group in batch["groups"]:
            streams = [joined["num_streams"] + stream for stream in group["streams"]]
            joined["groups"].append({"streams": streams, "state": group["state"]})
        joined["num_streams"] += batch["num_streams"]
    return joined


def load_groups(saved: SavedGroups, kind: Type[MemoryState], streams: range) -> GroupedState:
    """Return the state of some *streams* of a saved batch, as a batch of their own.

    Args:
        kind: the class of the groups' states.
    """
    groups = []
    for one in saved["groups"]:
        group = Group(tuple(one["streams"]), None if one["state"] is None else kind.from_dict(one["state"]))
        chosen = _chosen(group, [stream in streams for stream in group.streams])
        groups.append(chosen._replace(streams=tuple(stream - streams.start for stream in chosen.streams)))
    return GroupedState(len(streams), tuple(group for group in groups if group.streams))


def _groups(state: Optional[MemoryState], num_streams: int) -> Tuple[Group, ...]:
    return state.groups if isinstance(state, GroupedState) else (Group(tuple(range(num_streams)), state),)


def _chosen(group: Group, chosen: Sequence[bool]) -> Group:
    """Return a group with its *chosen* streams only."""
    if all(chosen):
        return group
    rows = [row for row, is_chosen in enumerate(chosen) if is_chosen]
    state = group.state if group.state is None else group.state.map(lambda t: t[rows])
    return Group(tuple(group.streams[row] for row in rows), state)


def _joined(groups: Sequence[Group]) -> Group:
    """Join groups whose states have the same shapes, with the streams in order."""
    if len(groups) == 1:
        return groups[0]
    streams = [stream for group in groups for stream in group.streams]
    order = sorted(range(len(streams)), key=streams.__getitem__)
    states = [group.state for group in groups if group.state is not None]
    tensors = zip(*(state.tensors() for state in states), strict=True)
    joined = states[0].map(lambda _: torch.cat(next(tensors))[order])
    return Group(tuple(streams[row] for row in order), joined)


def _means(passages: Sequence[Passage], weights: Sequence[Tensor]) -> Dict[str, Tensor]:
    """Return the mean of each loss over all tokens; *weights* are the numbers of tokens of the passages."""
    total = torch.stack(list(weights)).sum().clamp(min=1)
    return {
        name: torch.stack([p.losses[name] * w / total for p, w in zip(passages, weights, strict=True)]).sum()
        for name in passages[0].losses
    }
