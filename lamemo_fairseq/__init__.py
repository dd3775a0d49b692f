"""LaMemo, the language model with look-ahead memory, as a fairseq plugin over a core that needs torch alone.

``--user-dir`` imports this package; importing it registers its task, models and criterions. Without fairseq the package
offers `lamemo_fairseq.core` alone.
"""

import importlib.util

__version__ = "0.1.0"
__all__ = ["core"]

if importlib.util.find_spec("fairseq") is not None:
    try:
        from . import criterions, host, models, tasks
    except ValueError:  # a memory or an encoding of the user's own is refused, before a command line is read
        from .refusals import print_in_one_line, print_in_one_line_under_hydra

        print_in_one_line()
        print_in_one_line_under_hydra()
        raise

    __all__ += ["criterions", "host", "models", "tasks"]
