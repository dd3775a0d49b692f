"""Turn a fairseq checkpoint into a model of the core, with its tokenizer."""

import argparse
import logging
import os
from types import SimpleNamespace
from typing import Any, Dict, Optional

import torch
from fairseq.data import Dictionary

from ..core import LanguageModel, TextEncoding, Tokenizer
from ..core.attention import BACKENDS
from ..core.names import nearest_path
from ..data.text_encoding import read_text_encoding
from ..host.configuration import complete
from ..models.config import model_config
from ..models.decoder import vocabulary_checksum

logger = logging.getLogger(__name__)


def core_model(checkpoint: Dict[str, Any], dictionary: Dictionary) -> LanguageModel:
    """Return the model of a checkpoint, in evaluation mode and in the dtype of its weights.

    Args:
        checkpoint: as `read_ours` reads it.
        dictionary: of the data that the model was trained on.

    Raises:
        ValueError: the dictionary is another one, or weights are missing.
    """
    weights = {name.removeprefix("decoder."): weight for name, weight in checkpoint["model"].items()}
    if int(weights.pop("dictionary_version", -1)) != int(vocabulary_checksum(dictionary)):
        raise ValueError("the checkpoint was trained with another dictionary: pass its own as --dictionary")
    options = complete(checkpoint["cfg"])["model"]
    if options["attention_backend"] not in BACKENDS.names():
        logger.warning(
            "--attention-backend %s is not known here: the folder has auto, with the same results up to rounding",
            options["attention_backend"],
        )
        options["attention_backend"] = "auto"
    model = LanguageModel(model_config(SimpleNamespace(**options), dictionary))
    model.to(next((weight.dtype for weight in weights.values() if weight.is_floating_point()), torch.float32))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint's weights do not fit its options: {str(error).splitlines()[-1]}") from None
    return model.eval()


def core_tokenizer(dictionary: Dictionary, encoding: Optional[TextEncoding]) -> Tokenizer:
    """Return the tokenizer with a dictionary's words.

    Raises:
        ValueError: the dictionary holds a word twice.
    """
    own = dictionary.nspecial
    return Tokenizer.of_dictionary(dictionary.symbols[own:], dictionary.count[own:], encoding)


def chosen_encoding(args: argparse.Namespace) -> Optional[TextEncoding]:
    """Return how the text became tokens, as the options say, or else as the dictionary's folder records it.

    Raises:
        ValueError: an option needs another option, or the record is damaged.
        OSError: a file is missing.
    """
    files = {"sentencepiece": ("--sentencepiece-model", args.sentencepiece_model)}
    files["subword_nmt"] = ("--bpe-codes", args.bpe_codes)
    for bpe, (option, file) in files.items():
        if file is not None and args.bpe != bpe:
            raise ValueError(f"{option} is for --bpe {bpe}: pass that too")
        if file is not None and not os.path.isfile(file):
            raise FileNotFoundError(f"{option} {file}: there is no such file{nearest_path(file)}")
    if args.source_lang is not None and args.tokenizer != "moses":
        raise ValueError("--source-lang is for --tokenizer moses: pass that too")
    if args.bpe == "sentencepiece" and args.sentencepiece_model is None:
        raise ValueError("--bpe sentencepiece needs a file: pass --sentencepiece-model")
    if args.tokenizer is None and args.bpe is None:
        return read_text_encoding(os.path.dirname(args.dictionary))
    return TextEncoding(
        tokenizer=args.tokenizer or "space",
        pieces=args.bpe or "none",
        source_lang=args.source_lang or "",
        model=files[args.bpe][1] if args.bpe in files else None,
    )
