"""Registering a memory: what would be lost or wrong without a word is refused in one line, with the remedy."""

import re
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

from lamemo_fairseq.core.config import refuse_names
from lamemo_fairseq.core.decoding.cache import FrozenCache, InputLayerCache, LayerCache, SegmentCache
from lamemo_fairseq.core.fields import option
from lamemo_fairseq.core.layers import CausalSelfAttention
from lamemo_fairseq.core.memory import MEMORIES, Architecture, Memory, MemoryOptions, MemoryState
from lamemo_fairseq.core.memory.recurrent import RecurrentMemory
from lamemo_fairseq.core.positions import POSITIONS, PositionEncoding

from .conftest import pytest_configure
from .own_memory import average


@dataclass(frozen=True)
class Plain(MemoryOptions):
    average_keep: float = 0.9


@dataclass(frozen=True)
class Postponed(MemoryOptions):
    average_keep: "float" = option(0.9, "share of an average that is left")  # noqa: RUF009


class Undecorated(MemoryOptions):
    average_keep: float = option(0.9, "share of an average that is left")


@dataclass(frozen=True)
class Untyped(MemoryOptions):
    average_keep = 0.9


class Unread(MemoryOptions):
    average_keep = option(0.9, "share of an average that is left")


@dataclass(frozen=True)
class Baseless:
    average_keep: float = option(0.9, "share of an average that is left")


@dataclass(frozen=True)
class Offered(MemoryOptions):
    average_keep: float = option(0.9, "share of an average that is left")


class Checked(Offered):
    """A class without fields of its own needs no decorator."""

    def check(self) -> None:
        pass


class Lower(Offered):
    average_keep = 0.5


@dataclass(frozen=True)
class Twice(MemoryOptions):
    compression_rate: int = option(4, "rows that become one")


@dataclass(frozen=True)
class Hiding(MemoryOptions):
    cycle: int = option(4, "segments between two refreshes")


@dataclass(frozen=True)
class OfEveryModel(MemoryOptions):
    dropout: float = option(0.1, "dropout of averages")


REMEDY = (
    r"write average_keep: TYPE = option\(DEFAULT, 'one line of help'\), with option from lamemo_fairseq.core.fields$"
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Plain, rf"Plain.average_keep would not be an option: {REMEDY}"),
        (Postponed, r"Postponed.average_keep has a type that no host can read: leave out from __future__ import annot"),
        (Untyped, rf"Untyped.average_keep would not be an option: {REMEDY}"),
        (Unread, rf"Unread.average_keep would not be an option: {REMEDY}"),
        (Lower, rf"Lower.average_keep would not be an option: {REMEDY}"),
        (Baseless, "options is Baseless: name a class that extends MemoryOptions$"),
        (Offered(), "options is of type Offered: name a class that extends MemoryOptions$"),
        (Undecorated, r"Undecorated has fields and is no dataclass: write @dataclass\(frozen=True\) above it"),
    ],
)
def test_fields_that_would_be_no_options(options, message):
    with pytest.raises(ValueError, match=f"^memory 'average': {message}"):
        MEMORIES.register("average")(type("AverageMemory", (RecurrentMemory,), {"options": options}))
    assert "average" not in MEMORIES.names()


def test_a_memory_names_its_own_cache(monkeypatch):
    """One that changes the slots of another must not inherit its cache."""
    message = "^memory 'average': AverageMemory names no cache for decoding: write cache = FrozenCache if a slot has "
    with pytest.raises(ValueError, match=message):
        MEMORIES.register("average")(type("AverageMemory", (RecurrentMemory,), {}))
    entries = MEMORIES._entries
    for name, options in (("average", Offered), ("checked", Checked)):
        monkeypatch.setattr(MEMORIES, "_entries", dict(entries))
        MEMORIES.register(name)(average(options=options))
        assert name in MEMORIES.names()


def test_a_memory_without_tests_stops_them_in_one_line(monkeypatch):
    """The line to add is the error, in place of one error for each file."""
    monkeypatch.setattr(MEMORIES, "_entries", {**MEMORIES._entries, "average": RecurrentMemory})
    message = r"^--memory average has no tests: add a line to VARIANTS in tests/core/helpers\.py .*\(\"average\", \"tr"
    with pytest.raises(pytest.UsageError, match=message):
        pytest_configure()


def test_a_memory_that_is_refused_stops_the_tests_in_one_line(monkeypatch):
    """pytest would print an INTERNALERROR, with all calls of the import."""

    def refuse(name):
        raise ValueError("memory 'average': AverageMemory reads no segment")

    helpers = ModuleType("helpers")
    helpers.__getattr__ = refuse  # as if the import of the core failed
    monkeypatch.setitem(sys.modules, pytest_configure.__module__.replace("conftest", "helpers"), helpers)
    with pytest.raises(pytest.UsageError, match=r"^memory 'average': AverageMemory reads no segment$"):
        pytest_configure()


def test_a_missing_triton_stops_the_tests_in_one_line(monkeypatch):
    """The installation of the README brings none on a CPU, and pytest would print an INTERNALERROR."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    message = r"^these tests interpret .* triton is not installed: pip install -c constraints\.txt '\.\[dev,fused\]'"
    with pytest.raises(pytest.UsageError, match=message):
        pytest_configure()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"options": Twice},
            "Twice.compression_rate is an option of --memory compressive too, in CompressiveOptions: ",
        ),
        ({"options": Hiding}, "Hiding.cycle would hide MemoryOptions.cycle: give the option another name"),
        ({"name": "lamemo_lm"}, "AverageMemory.architecture has the name 'lamemo_lm', which LookaheadMemory of --mem"),
        (
            {"class_name": "LaMemoLanguageModel"},
            "AverageMemory.architecture has the class_name 'LaMemoLanguageModel', which LookaheadMemory of --memory ",
        ),
    ],
)
def test_names_of_another_memory(members, message):
    with pytest.raises(ValueError, match=f"^memory 'average': {message}"):
        MEMORIES.register("average")(average(**members))
    assert "average" not in MEMORIES.names()


@pytest.mark.parametrize("own", [{}, {"architecture": "average_lm"}])
def test_a_memory_without_an_architecture(own):
    with pytest.raises(
        ValueError, match=r"^memory 'average': AverageMemory has no architecture: write architecture = "
    ):
        MEMORIES.register("average")(type("AverageMemory", (Memory,), {"cache": RecurrentMemory.cache, **own}))


class Undecided(MemoryState):
    hidden: Any


class Endless(SegmentCache):
    """Without `empty`."""


def initial_state(self, x):
    """Of a memory without slots."""


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"initial_state": initial_state}, "reads no segment: define pass_layer(n, layer, rows, before, segment)"),
        ({"pass_layer": Memory.losses_of}, "has no state before the first segment: define initial_state(x)"),
        ({"fills_caches": True}, "has fills_caches = True: define fill_cache too, or leave fills_caches out"),
        ({"has_losses": True}, "has has_losses = True: define losses_of too, or leave has_losses out"),
        ({"layout": ("mean",)}, ".layout has 'mean', which is no option: name fields of the class's options"),
        ({"layout": "mean"}, ".layout is a string: write ('mean',)"),
        ({"state": Undecided}, "Undecided is no dataclass: write @dataclass(frozen=True) above it"),
        ({"cache": Endless}, "Endless begins no decoding: extend SegmentCache, and define empty in it"),
        ({"cache": dict}, "dict begins no decoding: extend SegmentCache, and define empty in it"),
    ],
)
def test_a_class_that_lacks_a_method(members, message):
    """In place of a NotImplementedError in the middle of a run, such as in its first generation."""
    whole = {} if "initial_state" in members or "pass_layer" in members else vars(RecurrentMemory)
    own = {name: whole[name] for name in ("initial_state", "pass_layer") if name in whole}
    names = {"architecture": Architecture("average_lm", "AverageLanguageModel", "Averages."), "cache": FrozenCache}
    with pytest.raises(ValueError, match=f"^memory 'average': (AverageMemory ?)?{re.escape(message)}$"):
        MEMORIES.register("average")(type("AverageMemory", (Memory,), {**names, **own, **members}))
    assert "average" not in MEMORIES.names()


class Remembering(FrozenCache):
    keep_features = True


@dataclass(frozen=True)
class Cyclic(MemoryOptions):
    cycles: int = option(4, "segments between two refreshes")


class Unchecked(Cyclic):
    def checks(self) -> None:
        """Of no effect."""


class Rotating(PositionEncoding):
    reaches_memroy = False


def of_no_use(self):
    return 0


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"look_ahaed": True}, "AverageMemory.look_ahaed would have no effect, as Memory has no such member: did you"),
        ({"carries_gradients": True}, "AverageMemory.carries_gradients .* did you mean carries_gradient?"),
        ({"layouts": ()}, "AverageMemory.layouts .* did you mean layout?"),
        ({"rows_hold": of_no_use}, "AverageMemory.rows_hold .* did you mean rows_held?"),
        ({"slot": property(of_no_use)}, "AverageMemory.slot .* did you mean slots?"),
        ({"options": Unchecked}, "Unchecked.checks would have no effect, as MemoryOptions .* did you mean check?"),
        ({"cache": Remembering}, "Remembering.keep_features would have no effect, as SegmentCache .*keeps_features?"),
    ],
)
def test_a_misspelt_member(members, message):
    """It would have no effect, and the class would have the member of its base."""
    with pytest.raises(ValueError, match=f"^memory 'average': {message}"):
        MEMORIES.register("average")(average(**members))
    assert "average" not in MEMORIES.names()


def test_a_misspelt_member_of_a_position_encoding():
    message = "^position encoding 'rotating': Rotating.reaches_memroy .* did you mean reaches_memory?"
    with pytest.raises(ValueError, match=message):
        POSITIONS.register("rotating")(Rotating)
    assert "rotating" not in POSITIONS.names()


@pytest.mark.parametrize(
    ("base", "member", "hint"),
    [
        (InputLayerCache, {"keeps_input": True}, "LayerCache has no such member: did you mean keeps_inputs"),
        (LayerCache, {"atended": of_no_use}, "LayerCache has no such member: did you mean attended"),
        (CausalSelfAttention, {"own_biases": of_no_use}, "SelfAttention has no such member: did you mean own_bias"),
    ],
)
def test_a_misspelt_member_of_a_part(base, member, hint):
    """No memory names its layers' caches, and it may choose a class of attention for each layer."""
    (name,) = member
    with pytest.raises(ValueError, match=f"^Own.{name} would have no effect, as {hint}"):
        type("Own", (base,), member)


def test_an_option_has_any_name_that_is_not_taken(monkeypatch):
    monkeypatch.setattr(MEMORIES, "_entries", dict(MEMORIES._entries))
    MEMORIES.register("average")(average(options=Cyclic))


@pytest.mark.parametrize("name", ["join", "losses", "reached", "attend", "state_of", "mean", "write", "slots_kept"])
def test_a_helper_has_any_other_name(name, monkeypatch):
    monkeypatch.setattr(MEMORIES, "_entries", dict(MEMORIES._entries))
    MEMORIES.register("average")(average(**{name: of_no_use}))


def test_a_helper_that_its_class_reads_has_any_name(monkeypatch):
    def pass_layer(self, n, layer, rows, before, segment):
        parts = [self.layer_state(part) for part in before]
        return RecurrentMemory.pass_layer(self, n, layer, rows, (*parts,), segment)

    monkeypatch.setattr(MEMORIES, "_entries", dict(MEMORIES._entries))
    with pytest.raises(ValueError, match=r"AverageMemory.layer_state .* did you mean layer_states?"):
        MEMORIES.register("average")(average(layer_state=of_no_use))
    MEMORIES.register("average")(average(layer_state=of_no_use, pass_layer=pass_layer))


def test_an_option_that_every_model_has(monkeypatch):
    monkeypatch.setattr(MEMORIES, "_entries", {**MEMORIES._entries, "average": average(options=OfEveryModel)})
    message = (
        "^memory 'average': OfEveryModel.dropout would be --dropout, which is taken: give the option another name$"
    )
    with pytest.raises(ValueError, match=message):
        refuse_names(["dropout"], "taken")
