"""Models for transformers, whose Auto classes read exported folders once this package is imported.

The package needs transformers 5.24 and no host. The file `modeling_lamemo.py` of a folder imports the package too
(trust_remote_code).
"""

import importlib.metadata

NEEDED = (5, 24)  # since `past_key_values` is called `cache`


def _check_version() -> None:
    """Refuse to go on without transformers, or with one that is too old.

    Raises:
        ModuleNotFoundError, ImportError: with the remedy.
    """
    wanted = ".".join(map(str, NEEDED))
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        message = f"transformers is not installed: pip install 'transformers>={wanted}' (it needs Python 3.11)"
        raise ModuleNotFoundError(message, name="transformers") from None
    if tuple(int(number) for number in version.split(".")[:2]) < NEEDED:
        raise ImportError(f"transformers {version} is too old: pip install 'transformers>={wanted}'")


_check_version()

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from .cache import LamemoCache  # noqa: E402
from .configuration import LamemoConfig  # noqa: E402
from .model import LamemoForCausalLM  # noqa: E402
from .tokenizer import LamemoTokenizer  # noqa: E402

__all__ = ["LamemoCache", "LamemoConfig", "LamemoForCausalLM", "LamemoTokenizer"]

AutoConfig.register(LamemoConfig.model_type, LamemoConfig, exist_ok=True)
AutoModelForCausalLM.register(LamemoConfig, LamemoForCausalLM, exist_ok=True)
AutoTokenizer.register(LamemoConfig, slow_tokenizer_class=LamemoTokenizer, exist_ok=True)
