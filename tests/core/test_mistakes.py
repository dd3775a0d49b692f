"""Mistakes that no error tells: no memory makes one, and each is named in one line if a new memory makes it."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lamemo_fairseq.core import MEMORIES
from lamemo_fairseq.core.decoding.cache import FrozenCache
from lamemo_fairseq.core.fields import option
from lamemo_fairseq.core.kernels.padded import join
from lamemo_fairseq.core.memory import MemoryOptions
from lamemo_fairseq.core.memory.base import LayerPassage, last_rows
from lamemo_fairseq.core.memory.recurrent import RecurrentMemory, RecurrentState

from .helpers import first_of_each_memory
from .mistakes import CHECKS, mistake_of
from .own_memory import average


@pytest.mark.parametrize("memory", MEMORIES.names())
def test_a_memory_makes_no_silent_mistake(memory):
    mistake = mistake_of(first_of_each_memory()[memory])
    if mistake is not None:
        pytest.fail(mistake, pytrace=False)


def reading(change=lambda self, n, past, rows: past, keep=lambda self, n, joined: joined):
    """Read slots that are *change* of the past ones, and let *keep* of all rows be the next slots."""

    def pass_layer(self, n, layer, rows, before, segment):
        joined = join(change(self, n, before[0], rows), rows)
        out, _ = layer(joined, segment.biases[n], segment.tokens)
        return LayerPassage(out, (last_rows(keep(self, n, joined), self.config.mem_len),))

    return {"pass_layer": pass_layer}


def uninitialised(self, x):
    return RecurrentState((x.new_empty(len(x), 2, x.size(2)),) * self.config.layers)


def from_an_attribute(self, n, past, rows):
    own = getattr(self, f"own_{n}", past)
    return own if own.shape == past.shape else past


def to_an_attribute(self, n, joined, written=True):
    if written:
        setattr(self, f"own_{n}", last_rows(joined, self.config.mem_len))
    return joined


def mean_of_pairs(self, n, joined):
    return (joined + joined.roll(-1, 1)) / 2


def count_calls(self, n, past, rows):
    self.calls = getattr(self, "calls", 0) + 1
    return past / self.calls


class Gated(RecurrentMemory):
    """A gate of the slots that are kept."""

    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Parameter(torch.zeros(config.embed_dim))

    def reset_parameters(self):
        nn.init.normal_(self.gate)


def gated(**members):
    own = average(**members)
    return type("GatedMemory", (Gated,), {**vars(own)})


@dataclass(frozen=True)
class SlotOptions(MemoryOptions):
    slot_count: int = option(2, "slots that are there from the beginning")


def slots_from_the_beginning(self, x):
    return RecurrentState((x.new_ones(len(x), self.config.options.slot_count, x.size(2)),) * self.config.layers)


def replaced_slots(self, n, layer, rows, before, segment):
    out, _ = layer(join(before[0], rows), segment.biases[n], segment.tokens)
    return LayerPassage(out, (before[0] + last_rows(rows, 1),))


class Fading(FrozenCache):
    """Of slots that fade, which it does not know."""


def without_a_value(self, config):
    Gated.__init__(self, config)
    self.gate = nn.Parameter(torch.empty(config.embed_dim))


class OtherBeams(FrozenCache):
    def reorder(self, order):
        self.positions = [self.positions[source] for source in order.tolist()]
        self.sync()


FADED = reading(keep=lambda self, n, joined: joined / 2)
MISTAKES = {
    "uninitialised": (average(initial_state=uninitialised), "segment 0 reads numbers that nobody has written: initial"),
    "no initial value": (
        gated(__init__=without_a_value, reset_parameters=RecurrentMemory.reset_parameters),
        "memory.gate has no initial value: let reset_parameters of its class draw it",
    ),
    "attributes": (
        average(**reading(from_an_attribute, to_an_attribute)),
        "a segment that is read again, with the same state and after others, gives something else: keep all that",
    ),
    "a counter": (average(**reading(count_calls)), "a segment that is read again, with the same state and"),
    "other streams": (
        average(**reading(keep=lambda self, n, joined: joined - joined.mean(0))),
        "a stream that is read alone has other features than beside others: let nothing depend on other streams",
    ),
    "the future": (
        average(**reading(lambda self, n, past, rows: past + rows.mean(1, keepdim=True))),
        "features depend on later tokens of their segment, which they would predict: let tokens attend to what the sta",
    ),
    "pairs of rows": (
        average(**reading(lambda self, n, past, rows: past + rows.unflatten(1, (-1, 3)).size(3))),
        "a stream that ends after 1 tokens of a segment of 3 ends in: ",
    ),
    "padding": (
        average(**reading(lambda self, n, past, rows: past * rows.size(1))),
        "a stream that ends after 1 tokens has other features if padding is behind them: leave out what lies beyond se",
    ),
    "unread": (
        average(**reading(lambda self, n, past, rows: 0 * past + 1)),
        "a segment after two texts has the same fea",
    ),
    "a layout": (
        average(options=SlotOptions, initial_state=slots_from_the_beginning, pass_layer=replaced_slots),
        "a state depends on --slot-count, and a resumed run could have another: write 'slot_count' into layout",
    ),
    "a gate of the state": (
        gated(**reading(keep=lambda self, n, joined: joined * self.gate)),
        "memory.gate has no gradient in update 0 with --bptt-segments 1, and several ranks would w",
    ),
    "a gate of slots": (
        gated(**reading(lambda self, n, past, rows: past * self.gate if past.size(1) else past)),
        "memory.gate has no gradient in update 0 with --bptt-segments 1, and several ranks",
    ),
    "a gate that later segments of an update read": (
        gated(**reading(keep=lambda self, n, joined: joined * self.gate), carries_gradient=True),
        "memory.gate has no gradient in update 0 with --bptt-segments 1, and several ranks",
    ),
    "a gate without effect": (
        gated(**reading(lambda self, n, past, rows: past + 0 * self.gate)),
        "memory.gate is never trained, its gradient is zero in every update: let features depend on it before detach()",
    ),
    "a gradient that ends": (
        average(carries_gradient=True),
        "carries_gradient is True, and no gradient reaches the segment before: leave it out, or keep the gradient of",
    ),
    "slots that are no tokens": (
        average(**reading(keep=mean_of_pairs)),
        "slots_are_tokens is True, and another token 1 before a segment changes the slots 2, 1 before it: leave slots_",
    ),
    "slots in another order": (
        average(**reading(keep=lambda self, n, joined: joined.flip(1))),
        "slots_are_tokens is True, and another token 1 before a segment changes no slot: leave slots_are_tokens out",
    ),
    "attributes in training": (
        average(**reading(from_an_attribute, lambda self, n, joined: to_an_attribute(self, n, joined, self.training))),
        "in training, a segment that is read again, with the same state and after others, gives something else: keep",
    ),
    "float32": (
        average(**reading(lambda self, n, past, rows: past if past.dtype == torch.float64 else past.float())),
        "in half precision: slots are torch.float32, and the rows after them torch.bfloat16: call .to(rows) on the",
    ),
    "slots that change": (
        average(**FADED),
        "token 3 has other scores if tokens are decoded one by one, in segments of 3: FrozenCache serves slots that",
    ),
    "a cache of its own": (
        average(**FADED, cache=Fading),
        "token 3 has other scores if tokens are decoded one by one, in segments of 3: let end_segment and next_positi",
    ),
    "beams": (
        average(cache=OtherBeams),
        "sequences that were reordered go on from others: keep all that decoding need",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake, monkeypatch):
    made, message = MISTAKES[mistake]
    monkeypatch.setattr(MEMORIES, "_entries", {**MEMORIES._entries, "recurrent": made})
    assert str(mistake_of(first_of_each_memory()["recurrent"])).startswith(f"--memory recurrent: {message}")


def test_every_check_is_the_first_to_find_a_mistake(monkeypatch):
    variant, first = first_of_each_memory()["recurrent"], set()
    for made, _ in MISTAKES.values():
        monkeypatch.setattr(MEMORIES, "_entries", {**MEMORIES._entries, "recurrent": made})
        first.add(next(check for check in CHECKS if check(variant)))
    assert first == set(CHECKS)
