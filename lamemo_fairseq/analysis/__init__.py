"""Measure a trained model: attention over memory by distance, the mixing weight alpha, loss by position.

``python -m lamemo_fairseq.analysis`` is the command. Training imports none of this package.
"""

from .. import needs_fairseq  # noqa: F401
from .collect import Attention, Collected, Losses, Mixing, collect
from .recording import Listener, record

__all__ = ["Attention", "Collected", "Listener", "Losses", "Mixing", "collect", "record"]
