"""Replacements for what fairseq, the host, does not do for a model with state, or does wrong on today's torch.

Importing the package, or for a few setting up the task, puts the pieces in place. Each stands in for one
function of fairseq, says why beside it, and leaves to that function whatever it does right.
"""

from .. import needs_fairseq  # noqa: F401
from . import (
    adam,
    ahead,
    checkpoints,
    encoder_names,
    ensembles,
    figures,
    mixed_precision,
    options,
    ranks,
    training,
    training_state,
)

__all__ = [
    "adam",
    "ahead",
    "checkpoints",
    "encoder_names",
    "ensembles",
    "figures",
    "mixed_precision",
    "options",
    "ranks",
    "training",
    "training_state",
]
