"""A model of the core as a folder for transformers; `LanguageModel.load` reads it back."""

import tempfile
from pathlib import Path

from ..core import LanguageModel
from ..core.folder import put_in_place
from .model import LamemoForCausalLM
from .tokenizer import LamemoTokenizer


def export_folder(core: LanguageModel, folder: Path) -> None:
    """Write the model and, if there is one, its tokenizer; each file appears whole.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
        LamemoForCausalLM.of(core).save_pretrained(unfinished, max_shard_size="1000TB")
        if core.tokenizer is not None:
            LamemoTokenizer.of(core.tokenizer, unfinished).save_pretrained(unfinished)
        put_in_place(unfinished, folder)
