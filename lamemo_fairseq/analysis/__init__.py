"""From a trained model to numbers: attention over memory by distance, the mixing weight alpha, loss by position.

``python -m lamemo_fairseq.analysis`` is the command. Nothing of this is imported in training.
"""

from .. import needs_fairseq  # noqa: F401
from .collect import Attention, Collected, Losses, Mixing, collect
from .recording import Listener, record

__all__ = ["Attention", "Collected", "Listener", "Losses", "Mixing", "collect", "record"]
