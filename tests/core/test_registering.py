"""Registering a memory: what would be lost or wrong without a word is refused in one line, with the remedy."""

from dataclasses import dataclass

import pytest

from lamemo_fairseq.core.fields import option
from lamemo_fairseq.core.memory import MEMORIES, MemoryOptions
from lamemo_fairseq.core.memory.recurrent import RecurrentMemory

from .conftest import pytest_configure


@dataclass(frozen=True)
class Plain(MemoryOptions):
    average_keep: float = 0.9


@dataclass(frozen=True)
class Postponed(MemoryOptions):
    average_keep: "float" = option(0.9, "share of an average that is left")  # noqa: RUF009


class Undecorated(MemoryOptions):
    average_keep: float = option(0.9, "share of an average that is left")


@dataclass(frozen=True)
class Offered(MemoryOptions):
    average_keep: float = option(0.9, "share of an average that is left")


class Checked(Offered):
    """A class without fields of its own needs no decorator."""

    def check(self) -> None:
        pass


REMEDY = (
    r"write average_keep: TYPE = option\(DEFAULT, 'one line of help'\), with option from lamemo_fairseq.core.fields$"
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Plain, rf"Plain.average_keep would not be an option: {REMEDY}"),
        (Postponed, r"Postponed.average_keep has a type that no host can read: leave out from __future__ import annot"),
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
    monkeypatch.setattr(MEMORIES, "_entries", dict(MEMORIES._entries))
    for name, options in (("average", Offered), ("checked", Checked)):
        own = {"options": options, "cache": RecurrentMemory.cache}
        MEMORIES.register(name)(type("AverageMemory", (RecurrentMemory,), own))
        assert name in MEMORIES.names()


def test_a_memory_without_tests_stops_them_in_one_line(monkeypatch):
    """The line to add is the error, in place of one error for each file."""
    monkeypatch.setattr(MEMORIES, "_entries", {**MEMORIES._entries, "average": RecurrentMemory})
    message = r"^--memory average has no tests: add a line to VARIANTS in tests/core/helpers\.py .*\(\"average\", \"tr"
    with pytest.raises(pytest.UsageError, match=message):
        pytest_configure()
