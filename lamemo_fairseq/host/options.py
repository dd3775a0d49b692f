"""fairseq's command line."""

import importlib.util
import sys
from argparse import Namespace
from typing import Any, Callable, Optional, Sequence

from fairseq import options

from .stand_in import stand_in


@stand_in(options, "parse_args_and_arch")
def parse_args_and_arch(
    original: Callable[..., Any], parser: Any, input_args: Optional[Sequence[str]] = None, *args: Any, **kwargs: Any
) -> Any:
    """fairseq takes ``--bf16`` for a TPU's, from the days before GPUs had it, and then looks for torch_xla."""
    parsed = original(parser, input_args, *args, **kwargs)
    given = sys.argv[1:] if input_args is None else input_args
    namespace: Namespace = parsed[0] if isinstance(parsed, tuple) else parsed
    if getattr(namespace, "tpu", False) and "--tpu" not in given and importlib.util.find_spec("torch_xla") is None:
        namespace.tpu = False
    return parsed
