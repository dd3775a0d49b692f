"""A model of the core as a folder for transformers; `LanguageModel.load` reads it back."""

import tempfile
from pathlib import Path

from ..core import LanguageModel
from ..core.folder import CONFIG, made_for, put_in_place
from .model import LamemoForCausalLM
from .tokenizer import LamemoTokenizer


def export_folder(core: LanguageModel, folder: Path) -> None:
    """Write the model and, if there is one, its tokenizer; each file appears whole.

    The configuration of an earlier export is removed first, so that its weights and the new ones never make one model.

    Raises:
        OSError: the folder cannot be written.
        ValueError: the folder has a tokenizer, and the model has none; or the model's has other words.
    """
    made_for(folder, core.tokenizer, core.config.vocabulary_size)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
        LamemoForCausalLM.of(core).save_pretrained(unfinished, max_shard_size="1000TB")
        if core.tokenizer is not None:
            LamemoTokenizer.of(core.tokenizer, unfinished).save_pretrained(unfinished)
        (folder / CONFIG).unlink(missing_ok=True)
        put_in_place(unfinished, folder)
