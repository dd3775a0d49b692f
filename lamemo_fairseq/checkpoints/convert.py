"""Checkpoints of the authors' code, or of the original Transformer-XL, to fairseq's and back.

A file from elsewhere is read as tensors and plain containers. Anything else in the file is an error; nothing in the
file is run.
"""

import argparse
import collections
import logging
import os
import pickle
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from fairseq.data import Dictionary
from omegaconf import OmegaConf
from torch import Tensor

from ..core.folder import make_folder
from ..core.memory import MEMORIES
from ..core.names import option_name
from ..core.positions.base import inverse_frequencies
from ..core.released import ATTENTION_TYPES, from_released, model_options, to_released
from ..host.checkpoint_files import is_ours, names, not_ours, of_fairseq, why_damaged, why_not_read
from ..host.configuration import check_options, complete
from ..host.own import TASK
from ..models.config import MemoryLanguageModelConfig
from ..models.decoder import FairseqMemoryDecoder, vocabulary_checksum

logger = logging.getLogger(__name__)

# fairseq's own words, which a released vocabulary lacks, are never predicted: their probability underflows to 0.
NEVER = -1e4
# Values that fairseq expects of a checkpoint, for one that fairseq never trained.
NO_HISTORY: Dict[str, Any] = {
    "criterion_name": "CrossEntropyCriterion",
    "optimizer_name": None,
    "lr_scheduler_state": {},
    "num_updates": 0,
}
# The entries of a released configuration that have no default here.
REQUIRED = ("attn_type", "n_layer", "n_head", "d_model", "d_head", "d_inner", "tgt_len", "mem_len")
EOS, UNK = {"<eos>": "</s>"}, {"<unk>": "<unk>", "<UNK>": "<unk>"}


class _Vocabulary:
    """Replaces the released code's vocabulary object: it has the attributes and none of the code."""

    idx2sym: List[str]


def load_plain(path: str) -> Dict[str, Any]:
    """Read a file of tensors and plain containers.

    Raises:
        ValueError: the file is of another kind, or holds something else.
    """
    # Namespaces and counters are data; a vocabulary is read as the stand-in above.
    known: List[Any] = [argparse.Namespace, collections.Counter, collections.OrderedDict]
    known += [(_Vocabulary, f"{module}.Vocab") for module in ("utils.vocabulary", "vocabulary")]
    try:
        with torch.serialization.safe_globals(known):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a text is read as code of pickle, and may end in any
        if isinstance(error, OSError) and error.filename is not None:
            raise
        reason = why_not_read(error) if isinstance(error, pickle.UnpicklingError) else why_damaged(error, path)
        raise ValueError(
            f"{path} is not a checkpoint of tensors and plain containers; nothing in it was run ({reason}). If it is "
            "cut short, fetch it again; if it holds another object, save it anew without"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, so it is no checkpoint")
    return content


def check_released(content: Dict[str, Any], path: str) -> None:
    """Check that a file is a checkpoint of the authors' code.

    Raises:
        ValueError: the file is one of this package, or lacks the weights or their configuration.
    """
    if is_ours(content):
        raise ValueError(
            f"{path} is a checkpoint of this package already: pass it to the commands as it is, or convert it with "
            "'export' or 'core'"
        )
    if names(content) != (None, None):
        raise ValueError(f"{not_ours(content, path)}, nor of the authors' code: {of_fairseq(content)}")
    for key in ("model_state", "model_config"):
        if key not in content:
            raise ValueError(
                f"{path} lacks '{key}', so it is no checkpoint of the authors' code; it holds "
                f"{', '.join(sorted(map(str, content))) or 'nothing'}"
            )


def words_of(vocabulary: Any) -> List[str]:
    """Return the words of a released vocabulary, a list or the released code's object, in order."""
    words = getattr(vocabulary, "idx2sym", vocabulary)
    if not isinstance(words, (list, tuple)) or not all(isinstance(w, str) for w in words):
        raise ValueError("the vocabulary is no list of words: pass --vocabulary FILE, a word a line")
    if len(set(words)) != len(words):
        raise ValueError("the vocabulary holds a word twice")
    return list(words)


def fairseq_dictionary(words: List[str]) -> Dictionary:
    """Return fairseq's dictionary of the words: fairseq's four symbols, then the others in their order."""
    dictionary = Dictionary()
    for word in words:
        if word not in EOS and word not in UNK:
            dictionary.add_symbol(word)  # fairseq's own symbols stay in front
    ours = [{**EOS, **UNK}.get(word, word) for word in words]
    if len(set(ours)) != len(ours):
        double = next(word for word in ours if ours.count(word) > 1)
        raise ValueError(f"the vocabulary holds {double} under two names: pass --vocabulary FILE with one of them")
    return dictionary


def released_words(dictionary: Dictionary) -> List[str]:
    """Return all words of fairseq's dictionary, including fairseq's own, by the released code's names."""
    return ["<eos>" if symbol == "</s>" else symbol for symbol in dictionary.symbols]


def entry_order(words: List[str], dictionary: Dictionary) -> List[Optional[int]]:
    """Return the index among *words* of each word of the dictionary, None for fairseq's own that *words* lack."""
    index_of = {{**EOS, **UNK}.get(word, word): i for i, word in enumerate(words)}
    return [index_of.get(symbol) for symbol in dictionary.symbols]


def import_checkpoint(released: Dict[str, Any], words: List[str]) -> tuple[Dict[str, Any], Dictionary]:
    """Return a fairseq checkpoint and its dictionary.

    Args:
        released: ``model_state`` under the released names, and ``model_config``.
        words: the vocabulary.

    Raises:
        ValueError: something is missing, or does not fit together.
    """
    config, state = _parts(released)
    dictionary = fairseq_dictionary(words)
    order = entry_order(words, dictionary)
    if config.get("n_token", len(words)) != len(words):
        raise ValueError(f"the model has {config['n_token']} words, the vocabulary {len(words)}")
    cutoffs = list(config.get("cutoffs") or [])
    try:
        options = model_options({**config, "cutoffs": _moved_cutoffs(cutoffs, order, len(dictionary) - len(words))})
        check_options(options, MemoryLanguageModelConfig)
    except TypeError as error:
        raise ValueError(f"the released checkpoint's model_config holds a value of another kind: {error}") from None

    try:
        weights = {f"decoder.{k}": v for k, v in from_released(state, config["n_layer"]).items()}
    except KeyError as error:
        raise ValueError(f"the released checkpoint lacks the weight {error}") from None
    except RuntimeError as error:
        raise ValueError(f"the released weights do not fit their model_config: {error}") from None
    for name, weight in weights.items():
        if _is_first_table(name):
            weights[name] = _reordered(weight, order[: weight.size(0) + order.count(None)], name.split(".")[-2])
    weights["decoder.dictionary_version"] = vocabulary_checksum(dictionary)
    _check_weights(weights, options, dictionary)
    mapped = to_released(from_released(state, config["n_layer"]), config["n_layer"], _joined(config))
    rest = {k: v for k, v in state.items() if k not in mapped}
    cfg = {
        "model": {"_name": MEMORIES[options["memory"]].architecture.name, **options},
        "task": {"_name": TASK, "data": None, "tokens_per_sample": config["tgt_len"]},
        "criterion": {"_name": "cross_entropy", "sentence_avg": False},
    }
    checkpoint: Dict[str, Any] = {
        "args": None,
        "cfg": OmegaConf.to_container(OmegaConf.create(complete(cfg)), resolve=True),
        "model": weights,
        "criterion": None,
        "optimizer_history": [NO_HISTORY],
        "task_state": {},
        "extra_state": {
            "train_iterator": {"epoch": 1, "iterations_in_epoch": 0},
            "released": {"model_config": config, "vocab": words, "rest": rest},
        },
        "last_optimizer_state": None,
    }
    return checkpoint, dictionary


def _parts(released: Dict[str, Any]) -> tuple[Dict[str, Any], Dict[str, Tensor]]:
    """Return the configuration and the weights of a released checkpoint.

    Raises:
        ValueError: a value of the configuration or a weight is missing, or something else is in its place.
    """
    config = dict(released["model_config"] or {})
    state: Dict[str, Tensor] = dict(released["model_state"])
    lacking = [key for key in REQUIRED if key not in config]
    if lacking:
        raise ValueError(f"the released checkpoint's model_config lacks {', '.join(lacking)}")
    odd = [key for key in REQUIRED if type(config[key]) is not int]
    if odd:
        raise ValueError(f"the released checkpoint's model_config has {odd[0]} {config[odd[0]]!r}, no whole number")
    if not all(isinstance(weight, Tensor) for weight in state.values()):
        raise ValueError("the released checkpoint's model_state holds something that is no tensor")
    return config, state


def _check_weights(weights: Dict[str, Tensor], options: Dict[str, Any], dictionary: Dictionary) -> None:
    """Refuse weights of other shapes than the model's, and two of which the model would use one alone."""
    with torch.device("meta"):  # shapes without storage
        decoder = FairseqMemoryDecoder(MemoryLanguageModelConfig(**options), dictionary)
    wanted = {f"decoder.{name}": tuple(weight.shape) for name, weight in decoder.state_dict().items()}
    there = {name: tuple(weight.shape) for name, weight in weights.items()}
    for name in sorted({*wanted, *there}):
        if wanted.get(name) != there.get(name):
            raise ValueError(
                f"the released weights do not fit their model_config: {name} has the shape {there.get(name)}, "
                f"and by the config {wanted.get(name)}"
            )
    if pair := decoder.weights_of_two_values(weights, "decoder."):
        raise ValueError(
            f"the released checkpoint has other values for {pair[0]} than for {pair[1]}, which are one weight here: "
            "set tie_weight to False in its model_config, so that the output layer is untied"
        )


def export_checkpoint(checkpoint: Dict[str, Any], dictionary: Dictionary) -> Dict[str, Any]:
    """Return a released checkpoint, of an imported model or of one trained here. Its vocabulary is a plain list.

    Raises:
        ValueError: the checkpoint is of another model, or its dictionary another one.
    """
    ours = {k.removeprefix("decoder."): v for k, v in checkpoint["model"].items()}
    if int(ours.get("dictionary_version", -1)) != int(vocabulary_checksum(dictionary)):
        raise ValueError("the checkpoint was trained with another dictionary: pass its own as --dictionary")
    options = complete(checkpoint["cfg"])["model"]
    imported = (checkpoint.get("extra_state") or {}).get("released")
    if imported:
        config, words, rest = (imported[key] for key in ("model_config", "vocab", "rest"))
        order = entry_order(words, dictionary)
        for name, weight in ours.items():
            if _is_first_table(name):
                ours[name] = _restored(weight, order[: weight.size(0)])
    else:
        words = released_words(dictionary)
        config = released_config(options, len(words))
        if "embed_tokens.tables.0.weight" not in ours:
            raise ValueError("the checkpoint lacks the weight decoder.embed_tokens.tables.0.weight")
        rest = _buffers(config, ours["embed_tokens.tables.0.weight"].dtype)
    try:
        state = {**to_released(ours, config["n_layer"], _joined(config)), **rest}
    except KeyError as error:
        raise ValueError(f"the checkpoint lacks the weight {error}") from None
    return {"model_config": config, "model_state": state, "vocab": words}


def released_config(options: Dict[str, Any], words: int) -> Dict[str, Any]:
    """Return the released configuration for our options."""
    memory, positions = str(options["memory"]), str(options["position_encoding"])
    window = str(options["lookahead_window"]) if memory == "lookahead" else "right"  # others have none
    kind = (memory, positions.removesuffix("-normal"), window)  # a variant that only begins otherwise
    types = {names: number for number, names in ATTENTION_TYPES.items()}
    if kind not in types:
        raise ValueError(f"the released code has no model with {' and '.join(kind[:2])}")
    cutoffs = [int(c) for c in (options["adaptive_softmax_cutoff"] or "").split(",") if c]
    embed_dim, heads = options["decoder_embed_dim"], options["decoder_attention_heads"]
    bands, input_dim = len(cutoffs) + 1, options["decoder_input_dim"] or embed_dim
    factor = options["adaptive_softmax_factor"] if cutoffs else 1.0
    unknown = {
        "activation_fn": options.get("activation_fn", "relu") != "relu",
        **{
            name: kind[0] == "lookahead" and options.get(name, 1) != 1
            for name in ("lookahead_from_layer", "lookahead_every")
        },
        "decoder_output_dim": (options.get("decoder_output_dim") or input_dim) != input_dim,
        "adaptive_softmax_factor": factor != int(factor) or (factor > 1 and not options.get("adaptive_input")),
    }
    for name, is_unknown in unknown.items():
        if is_unknown:
            raise ValueError(f"the released code has no model with {option_name(name)} {options[name]}")
    inner = options.get("activation_dropout")
    if inner is not None and inner != options["dropout"]:
        logger.warning(
            "--activation-dropout %g is left out: the released code trains on with dropout %g inside the feed-forward "
            "layers too; what it evaluates is the same",
            inner,
            options["dropout"],
        )
    return {
        "attn_type": types[kind],
        "n_token": words,
        "n_layer": options["decoder_layers"],
        "n_head": heads,
        "d_model": embed_dim,
        "d_head": options["decoder_head_dim"] or embed_dim // heads,
        "d_inner": options["decoder_ffn_embed_dim"],
        "d_embed": input_dim,
        "dropout": options["dropout"],
        "dropatt": options["attention_dropout"],
        "tie_weight": not options["untie_output"],
        "tie_projs": [False] + [not options["untie_output"]] * (bands - 1),
        "div_val": int(factor),
        "cutoffs": cutoffs,
        "pre_lnorm": options["decoder_normalize_before"],
        "tgt_len": options["tokens_per_sample"] or options["preset_tokens_per_sample"],
        "ext_len": 0,
        "mem_len": options["mem_len"] if kind[0] != "none" else 0,
        "same_length": options["same_length"],
        "clamp_len": options["clamp_len"] or -1,
    }


def _moved_cutoffs(cutoffs: List[int], order: List[Optional[int]], added: int) -> List[int]:
    """Move cutoffs behind the symbols that fairseq puts in front; words must stay in their band."""
    if cutoffs and any(entry is not None and entry >= cutoffs[0] for entry in order[:4]):
        raise ValueError(f"<eos> or <unk> is not among the first {cutoffs[0]} words: the bands would have to change")
    return [c + added for c in cutoffs]


def _is_first_table(name: str) -> bool:
    """Return whether a weight has an entry for each word of the first band, which includes fairseq's own symbols."""
    return name.endswith((".tables.0.weight", ".weights.0", ".biases.0"))


def _reordered(weight: Tensor, order: List[Optional[int]], kind: str) -> Tensor:
    reordered = weight.new_full((len(order), *weight.shape[1:]), NEVER if kind == "biases" else 0.0)
    ours = [i for i, entry in enumerate(order) if entry is not None]
    reordered[ours] = weight[[entry for entry in order if entry is not None]]
    return reordered


def _restored(weight: Tensor, order: List[Optional[int]]) -> Tensor:
    restored = weight.new_empty((len(order) - order.count(None), *weight.shape[1:]))
    ours = [i for i, entry in enumerate(order) if entry is not None]
    restored[[entry for entry in order if entry is not None]] = weight[ours]
    return restored


def _joined(config: Dict[str, Any]) -> bool:
    return config["attn_type"] in (0, 1)


def _buffers(config: Dict[str, Any], dtype: torch.dtype) -> Dict[str, Tensor]:
    """Return the released code's buffers: frequencies, and unused constants of its look-ahead layers."""
    buffers = {}
    if config["attn_type"] != 1:
        buffers["pos_emb.inv_freq"] = inverse_frequencies(config["d_model"], dtype)
    if ATTENTION_TYPES[config["attn_type"]][0] == "lookahead":
        for i in range(config["n_layer"]):
            for mode in ("train", "eval"):
                buffers[f"layers.{i}.dec_attn.{mode}_logits_constant"] = torch.zeros(1, 1, 1, 1, dtype=dtype)
    return buffers


def save(data: Any, path: Path) -> None:
    """Write to a file beside the path, then rename it: an interrupted run leaves no half file.

    Raises:
        OSError: there is a folder at the path, or a file in place of a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: pass a file")
    make_folder(path.parent)
    unfinished = path.with_name(path.name + ".part")
    torch.save(data, unfinished)
    os.replace(unfinished, path)


def save_dictionary(dictionary: Dictionary, path: Path) -> None:
    """Write a dictionary, a word a line.

    Raises:
        ValueError: a word has an end of a line in it.
    """
    odd = [word for word in dictionary.symbols if "\n" in word or "\r" in word]
    if odd:
        raise ValueError(f"dict.txt has a word a line, and the vocabulary holds {odd[0]!r}: rename it")
    dictionary.save(str(path))
