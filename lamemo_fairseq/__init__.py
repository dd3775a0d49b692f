"""LaMemo, the language model with look-ahead memory, as a fairseq plugin.

``--user-dir`` imports this package; importing it registers its task, models and criterion.
"""

from . import criterions, host, models, tasks

__version__ = "0.1.0"
__all__ = ["criterions", "host", "models", "tasks"]
