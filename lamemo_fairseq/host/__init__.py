"""Extend and mend fairseq, the host: for models with state, and for today's torch.

`trainer` and `optimizers` train models of this package in fairseq's place. `stand_in` lists the few functions of
fairseq that are replaced.
"""

from .. import needs_fairseq  # noqa: F401
from . import checkpoints, encoder_names, ensembles, options, quiet

__all__ = ["checkpoints", "encoder_names", "ensembles", "options", "quiet"]

quiet.shorten_configurations()
