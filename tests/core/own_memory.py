"""A memory of the user's own, which lacks something or makes a mistake, for the tests of what is said then."""

from lamemo_fairseq.core.memory import Architecture
from lamemo_fairseq.core.memory.recurrent import RecurrentMemory


def average(name="average_lm", class_name="AverageLanguageModel", **members):
    """Return the class of a memory of the user's own, Transformer-XL's with other *members*."""
    own = {"architecture": Architecture(name, class_name, "Averages."), "cache": RecurrentMemory.cache}
    return type("AverageMemory", (RecurrentMemory,), {**own, **members})
