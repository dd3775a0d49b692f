"""fairseq's options for generation: which of them make sense for a language model with memory."""

import logging
import math
from dataclasses import fields
from typing import Any, Dict, Iterable, List

from fairseq.dataclass.configs import GenerationConfig

from ..core.decoding.drawing import LEAST_TEMPERATURE
from ..core.names import did_you_mean, option_name

logger = logging.getLogger(__name__)

REFUSED: Dict[str, str] = {
    "match_source_len": "is for translation: pass --max-len-a and --max-len-b instead",
    "constraints": "is for translation: a language model takes a prompt instead",
    "print_alignment": "is for translation: a language model aligns nothing, leave it out",
    "replace_unk": "copies words of a source that is translated: a language model has none, leave it out",
    "lm_path": "adds a language model to a translation model: pass both to --path, separated by :",
    "lm_weight": "is for --lm-path, which adds a language model to a translation model: leave it out",
    "decoding_format": "is for models that refine a whole translation, which this one does not: leave it out",
    "retain_dropout": "is not known to a model with memory: leave it out",
    "retain_dropout_modules": "is not known to a model with memory: leave it out",
    "eos_token": "is for speech: a text ends with the dictionary's </s>, leave it out",
    **dict.fromkeys(
        (
            "print_step",
            "retain_iter_history",
            "iter_decode_eos_penalty",
            "iter_decode_max_iter",
            "iter_decode_force_max_iter",
            "iter_decode_with_beam",
            "iter_decode_with_external_reranker",
        ),
        "is for models that refine a whole translation step by step, which this one does not: leave it out",
    ),
    **dict.fromkeys(
        ("beam_mt", "max_len_a_mt", "max_len_b_mt", "lenpen_mt"),
        "is for models that translate speech in two passes: pass it without -mt",
    ),
}
"""Options that would change nothing or fail later, and what to do instead."""

WITHOUT_EFFECT: Dict[str, str] = {
    "no_early_stop": "fairseq itself does not read it any more",
    "no_beamable_mm": "fairseq itself does not read it any more",
    "sacrebleu": "a continuation has no BLEU",
}
"""Options that are harmless, and why they do not apply."""

_OF_NEW_WORDS = ("temperature", "lenpen", "unnormalized", "unkpen", "min_len", "no_repeat_ngram_size")
"""Options of generation, which change no score of a given text."""

_GREATEST = 1e30  # of a number that scores are changed by; float32 overflows not far beyond
_DEFAULTS = GenerationConfig()
NAMES: List[str] = [field.name for field in fields(GenerationConfig) if not field.name.startswith("_")]


def refusal(name: str) -> str:
    """Return the message on an option of `REFUSED` that is given."""
    return f"{option_name(name)} {REFUSED[name]}"


def check_generation(options: Any) -> None:
    """Refuse options that cannot have their effect.

    Args:
        options: an object with fairseq's names as attributes.

    Raises:
        ValueError: an option cannot have its effect; the message names it and the option to pass instead.
    """

    def value(name: str) -> Any:
        return getattr(options, name, getattr(_DEFAULTS, name))

    for name in REFUSED:
        if value(name) not in (None, getattr(_DEFAULTS, name)):
            raise ValueError(refusal(name))
    _check_ranges(value)
    _check_search(value)
    if value("score_reference"):
        for name in ("prefix_size", "sampling"):
            if value(name):
                raise ValueError(
                    f"{option_name(name)} generates text and --score-reference scores given text: pass one of them"
                )


def warn_without_effect(options: Any) -> None:
    """Log a warning for each option of `WITHOUT_EFFECT` that is given, and others with ``--score-reference``."""
    for name, reason in WITHOUT_EFFECT.items():
        if getattr(options, name, None):
            logger.warning("%s has no effect: %s", option_name(name), reason)
    scores = getattr(options, "score_reference", False)
    for name in _OF_NEW_WORDS:
        if scores and getattr(options, name, getattr(_DEFAULTS, name)) != getattr(_DEFAULTS, name):
            logger.warning("%s has no effect: --score-reference scores given text", option_name(name))


def check_length_penalty(power: float, tokens: int) -> None:
    """Refuse a length penalty whose power of a number of tokens float32 cannot hold. All scores would be alike.

    Raises:
        ValueError: the penalty is too large; the message has those that are not.
    """
    most = math.floor(10 * math.log(_GREATEST) / math.log(max(2, tokens))) / 10
    if abs(power) > most:
        raise ValueError(
            f"--lenpen {power:g} makes scores of up to {tokens} tokens 0 or infinite, so that none is the best: pass a "
            f"number between {-most} and {most}, or --unnormalized"
        )


def _check_ranges(value: Any) -> None:
    for name, least in (
        ("beam", 1),
        ("nbest", 1),
        ("min_len", 0),
        ("max_len_a", 0),
        ("max_len_b", 0),
        ("prefix_size", 0),
        ("no_repeat_ngram_size", 0),
        ("diverse_beam_strength", 0),
    ):
        if not value(name) >= least:
            raise ValueError(f"{option_name(name)} is {value(name)}: pass {least} or more")
    for name in ("lenpen", "unkpen", "max_len_a", "diverse_beam_strength", "diversity_rate"):
        forbids = name == "unkpen" and value(name) > 0  # an infinite penalty forbids unknown words
        if not (abs(value(name)) <= _GREATEST or forbids):
            raise ValueError(
                f"{option_name(name)} is {value(name)}: pass a number between {-_GREATEST:g} and {_GREATEST:g}"
            )
    if not value("temperature") >= LEAST_TEMPERATURE:
        raise ValueError(
            f"--temperature is {value('temperature')}: pass a positive number, {LEAST_TEMPERATURE:g} or more; for the "
            "most probable words leave out --sampling, or pass --sampling-topk 1"
        )
    if value("nbest") > value("beam"):
        raise ValueError(f"--nbest {value('nbest')} is more than --beam {value('beam')} finds: pass a larger --beam")
    if value("max_len_a") == 0 and value("max_len_b") < value("min_len"):
        raise ValueError(
            f"--max-len-b {value('max_len_b')} allows fewer new words than --min-len {value('min_len')}: pass a larger "
            "--max-len-b"
        )


def _check_search(value: Any) -> None:
    groups, rate = value("diverse_beam_groups"), value("diversity_rate")
    ways = {"sampling": value("sampling"), "diverse_beam_groups": groups > 0, "diversity_rate": rate != -1}
    chosen = [option_name(name) for name, on in ways.items() if on]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} are different searches: pass one of them")
    if groups > 0 and value("beam") % groups:
        raise ValueError(f"--beam {value('beam')} has to be divisible by --diverse-beam-groups {groups}")
    if groups <= 0 and value("diverse_beam_strength") != _DEFAULTS.diverse_beam_strength:
        raise ValueError("--diverse-beam-strength is for diverse beams: pass --diverse-beam-groups with it")
    if rate != -1 and not rate >= 0:
        raise ValueError(f"--diversity-rate is {rate}: pass 0 or more")
    top_k, top_p = value("sampling_topk"), value("sampling_topp")
    for name, given in (("sampling_topk", top_k != -1), ("sampling_topp", top_p != -1)):
        if given and not value("sampling"):
            raise ValueError(f"{option_name(name)} is for sampling: pass --sampling with it")
    if top_k != -1 and not top_k >= 0:
        raise ValueError(f"--sampling-topk is {top_k}: pass 1 or more")
    if top_p != -1 and not 0 < top_p <= 1:
        raise ValueError(f"--sampling-topp is {top_p}: pass a probability above 0 and up to 1")
    if top_k > 0 and top_p > 0:
        raise ValueError("fairseq draws by one of --sampling-topk and --sampling-topp: pass one of them")


def check_names(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse names that are none of the *known* options of *where*.

    Raises:
        ValueError: a name is not known; the message has the nearest known one.
    """
    known = list(known)
    useful = [name for name in known if name not in REFUSED and name not in WITHOUT_EFFECT]
    for name in given:
        if name in known:
            continue
        if name == "seed":
            raise ValueError(f"{where} does not know 'seed': call torch.manual_seed before it")
        hint = did_you_mean(name, useful, cutoff=0.4, shown=repr) or f"it knows {', '.join(useful)}"
        raise ValueError(f"{where} does not know '{name}': {hint}")
