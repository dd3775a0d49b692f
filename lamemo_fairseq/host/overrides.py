"""Options of a checkpoint that a command changes with ``--model-overrides``, and `from_pretrained` with arguments.

fairseq changes the options that it finds by name, and silently ignores all others.
"""

import ast
import logging
from dataclasses import fields
from typing import Any, Dict, Iterable, Mapping, Set

from fairseq.criterions import CRITERION_DATACLASS_REGISTRY
from fairseq.dataclass.configs import DatasetConfig, FairseqConfig, GenerationConfig
from fairseq.dataclass.utils import overwrite_args_by_name
from fairseq.models import MODEL_DATACLASS_REGISTRY
from fairseq.registry import REGISTRIES
from omegaconf import DictConfig

from ..core.memory import MEMORIES
from ..core.names import not_known
from ..core.positions import POSITIONS
from .configuration import ENCODERS, check_options
from .generation_options import check_names

logger = logging.getLogger(__name__)

# Options that change a training run, and not the results of a trained model.
_TRAINING_ONLY = {
    "activation_dropout", "attention_dropout", "checkpoint_activations", "compression_loss",
    "compression_loss_weight", "dropout", "kl_sigma", "kl_weight",
}  # fmt: skip


def parse_overrides(text: str) -> Dict[str, Any]:
    """Return the options that ``--model-overrides`` gives. Nothing in the text is run.

    Raises:
        ValueError: the text is no dictionary of plain values.
    """
    try:
        given = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        given = None
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise ValueError(
            f"--model-overrides {text!r} is no dictionary of options: write it as \"{{'mem_len': 640}}\", with names "
            "and words in quotes"
        )
    return given


def check_overrides(given: Mapping[str, Any], cfg: Mapping[str, Any], with_criterion: bool = False) -> None:
    """Check that each option of ``--model-overrides`` is one that the command uses.

    Args:
        given: what `parse_overrides` returned.
        cfg: the checkpoint's configuration.
        with_criterion: whether the command builds the checkpoint's criterion.

    Raises:
        ValueError: an option is not known; the message has its name, and the nearest known one.
    """
    known = {"model": _model_options(given, cfg)}
    criterion = cfg.get("criterion") or {}
    dataclass = CRITERION_DATACLASS_REGISTRY.get(criterion.get("_name")) if isinstance(criterion, dict) else None
    if with_criterion and dataclass is not None:
        known["criterion"] = _names(dataclass)
    for name, value in given.items():
        if name in known and isinstance(value, dict):
            _check_known(value, known[name], "--model-overrides")
        else:
            _check_known({name: value}, set().union(*known.values()), "--model-overrides")
    _tell_training_only(given, "--model-overrides")


def check_arguments(given: Mapping[str, Any], cfg: Mapping[str, Any]) -> None:
    """Check the keyword arguments of `from_pretrained`: options of the model, of its data, and of sampling.

    Raises:
        ValueError: an argument is not known; the message has its name, and the nearest known one.
    """
    known = _model_options(given, cfg) | _names(GenerationConfig) | {"max_tokens", "batch_size", "user_dir"}
    known = (known | {"generation_args"} | set(ENCODERS)) - {"beam"}
    for kind in ENCODERS:
        section = cfg.get(kind)
        name = given.get(kind, section.get("_name") if isinstance(section, dict) else section)
        if isinstance(given.get(kind), str) and name not in REGISTRIES[kind]["registry"]:
            raise ValueError(not_known(f"from_pretrained: {kind}=", str(name), REGISTRIES[kind]["registry"]))
        dataclass = REGISTRIES[kind]["dataclass_registry"].get(str(name))
        known |= set() if dataclass is None else _names(dataclass)
    if "beam" in given:
        raise ValueError("from_pretrained: beam is an argument of sample() and generate(), pass it there")
    _check_known(given, known, "from_pretrained")
    _check_known(given.get("generation_args") or {}, _names(GenerationConfig), "from_pretrained, generation_args")
    check_options({k: v for k, v in given.items() if k in _names(DatasetConfig)}, DatasetConfig)
    check_options({**given, **(given.get("generation_args") or {})}, GenerationConfig)
    _tell_training_only(given, "from_pretrained")


def override(cfg: DictConfig, given: Mapping[str, Any]) -> None:
    """Change the options of a whole configuration.

    Raises:
        ValueError: an option does not exist, or cannot have the value.
    """
    known = {str(name) for section in cfg.values() if isinstance(section, DictConfig) for name in section}
    known |= {
        name
        for registry in REGISTRIES.values()
        for dc in registry["dataclass_registry"].values()
        for name in _names(dc)
    }
    known |= {f.name for f in fields(FairseqConfig)} | {"generation_args", "user_dir"}
    _check_known(given, known, "an option to override")
    dataclass = MODEL_DATACLASS_REGISTRY[cfg.model._name]
    inner = given.get("model")
    check_options({**given, **(inner if isinstance(inner, dict) else {})}, dataclass)
    for kind in REGISTRIES:  # without a given one, fairseq uses the checkpoint's
        if isinstance(given.get(kind), str):
            cfg[kind] = None
    overwrite_args_by_name(cfg, given)


def _model_options(given: Mapping[str, Any], cfg: Mapping[str, Any]) -> Set[str]:
    """Return the options that change the model's results; options of other memories and positions do not."""
    model = cfg["model"]
    known = _names(MODEL_DATACLASS_REGISTRY[model["_name"]]) - {"preset_tokens_per_sample"}
    memory = given.get("memory", model.get("memory"))
    if memory not in MEMORIES.names():
        return known
    chosen = {memory, given.get("position_encoding", model.get("position_encoding"))}
    return known - {name for name, owners in owners_of_options().items() if not owners & chosen}


def owners_of_options() -> Dict[str, Set[str]]:
    """Return the memories, or position encodings, that an option belongs to, by the options' names."""
    owners: Dict[str, Set[str]] = {}
    for memory in MEMORIES.names():
        for name in _names(MEMORIES[memory].options):
            owners.setdefault(name, set()).add(memory)
        if MEMORIES[memory].carries_gradient:
            owners.setdefault("bptt_segments", set()).add(memory)
        if MEMORIES[memory].has_slots:
            owners.setdefault("mem_len", set()).add(memory)
    counting = {name for name in POSITIONS.names() if POSITIONS[name].reads_words}
    return {**owners, "sentence_ends": counting, "paragraph_ends": counting}


def _check_known(given: Iterable[str], known: Set[str], where: str) -> None:
    owners = owners_of_options()
    for name in given:
        if name in owners and name not in known:
            option = "--memory" if owners[name] <= set(MEMORIES.names()) else "--position-encoding"
            owner = f"{option} {' or '.join(sorted(owners[name]))}"
            raise ValueError(f"{where}: {name} belongs to {owner}, and this model has another: leave it out")
    check_names(given, sorted(known), where)


def _tell_training_only(given: Iterable[str], where: str) -> None:
    unused = sorted(_TRAINING_ONLY.intersection(given))
    if unused:
        logger.warning("%s: %s has no effect outside training", where, ", ".join(unused))


def _names(dataclass: Any) -> Set[str]:
    return {f.name for f in fields(dataclass) if not f.name.startswith("_")}
