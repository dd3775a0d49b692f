"""The configuration that a checkpoint brings along, checked before anything is built from it.

fairseq builds any model, task and criterion that a checkpoint names, and some of those run strings of their options.
So a checkpoint of this package is plain values of known options; one that names anything else is refused.
"""

import argparse
import logging
from dataclasses import fields
from typing import Any, Dict, List, Mapping, Tuple, Type

from fairseq.criterions import CRITERION_DATACLASS_REGISTRY
from fairseq.dataclass import FairseqDataclass
from fairseq.dataclass.configs import (
    CommonEvalConfig,
    DatasetConfig,
    FairseqConfig,
    GenerationConfig,
    InteractiveConfig,
)
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_DATACLASS_REGISTRY
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_DATACLASS_REGISTRY
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from ..core.attention import BACKENDS
from ..core.memory import MEMORIES
from ..core.names import did_you_mean, option_name
from ..core.positions import POSITIONS
from ..core.registry import Registry
from ..criterions import FAIRSEQ_CRITERIONS
from .checkpoint_files import (
    IMPORT,
    TRAIN,
    CheckpointError,
    first_line,
    is_our_model,
    is_our_task,
    is_ours,
    names,
    not_ours,
    of_fairseq,
    read_checkpoint,
    short,
)
from .dataclass_defaults import defaults_of, structured

logger = logging.getLogger(__name__)

CRITERIONS = {*FAIRSEQ_CRITERIONS, "chunked_cross_entropy"}
"""Criterions that may be built because a checkpoint names them. They run no string of their options."""

ENCODERS = {
    "tokenizer": {"moses", "space"},
    "bpe": {"bytes", "byte_bpe", "characters", "fastbpe", "sentencepiece", "subword_nmt"},
}
"""Tokenizers and pieces of words that may be built because a checkpoint names them."""

# Sections of a configuration that fairseq saves as a namespace where it has no dataclass for them.
_NAMESPACES = ("criterion", "optimizer", "lr_scheduler", "scoring")
# Other sections that commands and calls read from a checkpoint.
_READ: Dict[str, Type[FairseqDataclass]] = {
    "common_eval": CommonEvalConfig,
    "dataset": DatasetConfig,
    "generation": GenerationConfig,
    "interactive": InteractiveConfig,
}
# Options whose values are names of registries, to which users may add their own.
_REGISTRIES: Dict[str, Registry[Any]] = {
    "memory": MEMORIES,
    "position_encoding": POSITIONS,
    "attention_backend": BACKENDS,
}


def read_ours(path: str) -> Dict[str, Any]:
    """Read a checkpoint of this package, its tensors mapped, and check it.

    Raises:
        CheckpointError: the file is of another kind, or its configuration has other things than plain values of known
            options.
    """
    state = read_checkpoint(path, mapped=True)
    if not is_ours(state):
        known = names(state) != (None, None)
        remedy = of_fairseq(state) if known else f"{TRAIN}, or import with {IMPORT}"
        raise CheckpointError(f"{not_ours(state, path)}: {remedy}")
    check(state, path)
    return state


def check(state: Dict[str, Any], path: str) -> None:
    """Check a checkpoint that names a model or a task of this package.

    Raises:
        CheckpointError: a name in the checkpoint is not known, or a value has a wrong type; the message names it.
    """
    cfg = state.get("cfg")
    if state.get("args") is not None or not isinstance(cfg, dict):
        raise CheckpointError(f"{path} has no configuration as this package saves it, under 'cfg' alone: {TRAIN}")
    model, task = names(state)
    if not is_our_model(model):
        own = f"; {MEMORIES.own}" if is_our_task(task) and model else ""
        raise CheckpointError(f"{path} names the model {short(model)}, which is not one of this package: {TRAIN}{own}")
    if not is_our_task(task):
        raise CheckpointError(f"{path} names the task {short(task)}, which is not one of this package: {TRAIN}")
    try:
        for name, section in cfg.items():
            _check_plain(section, f"cfg.{name}", namespace=name in _NAMESPACES)
        options = dict(cfg["model"])
        if isinstance(options.get("attention_backend"), str):  # `check_backend` follows where no other takes its place
            del options["attention_backend"]
        check_options(options, MODEL_DATACLASS_REGISTRY[model])
        check_options(cfg["task"], TASK_DATACLASS_REGISTRY[task])
        for name, dataclass in _READ.items():
            if cfg.get(name) is not None:
                check_options(cfg[name], dataclass)
        _check_contents(state)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    unknown = sorted(set(cfg["model"]) - {f.name for f in fields(MODEL_DATACLASS_REGISTRY[model])})
    if unknown:
        logger.warning("%s: options of another version of this package are ignored: %s", path, ", ".join(unknown))


def check_options(section: Any, dataclass: Type[FairseqDataclass]) -> None:
    """Check the types of options.

    Raises:
        ValueError: an option has a wrong type; the message names it, with its value and type.
    """
    if not isinstance(section, Mapping):
        raise ValueError(f"options of {dataclass.__name__} are a {type(section).__name__}, not a dictionary")
    known = {f.name for f in fields(dataclass)}
    given = {name: value for name, value in section.items() if name in known}
    try:
        OmegaConf.merge(structured(dataclass), given)  # into a copy
    except OmegaConfBaseException as error:
        name = str(error.full_key or error.key)
        value = given.get(name.split("[")[0].split(".")[0])
        reason = _unknown(name, value) if isinstance(value, str) and name in _REGISTRIES else first_line(error)
        raise ValueError(f"{option_name(name)} cannot be {short(value)}: {reason}") from None


def _unknown(option: str, name: str) -> str:
    """Return the remedy for a name that the registry of an option lacks."""
    registry = _REGISTRIES[option]
    otherwise = f"the known ones are {', '.join(registry.names())}; {registry.own}"
    return did_you_mean(name, registry.names()) or otherwise


def check_backend(name: Any, path: str) -> None:
    """Check the attention backend that a trained model is to use. Another one gives the same results.

    Raises:
        CheckpointError: the name is not known, as that of a backend that was the user's own.
    """
    if str(name) not in BACKENDS.names():
        raise CheckpointError(
            f"{path}: --attention-backend cannot be {short(str(name))}, which is not known here: put its file back "
            "into lamemo_fairseq/core/attention, or pass --model-overrides \"{'attention_backend': 'auto'}\" "
            "(in Python attention_backend='auto')"
        )


def check_model(cfg: Any, task: str) -> None:
    """Check the name of a model before the task builds it.

    Raises:
        ValueError: the model is not one of this package.
    """
    name = getattr(cfg, "_name", None) or getattr(cfg, "arch", None)
    if not is_our_model(name):
        model = ARCH_MODEL_REGISTRY[name].__name__ if name in ARCH_MODEL_REGISTRY else short(name)
        raise ValueError(
            f"--task {task} feeds segments with memory, which {model} does not have: "
            "pass --arch lamemo_lm or another architecture of this package, or --task language_modeling"
        )


def check_criterion(cfg: Any) -> None:
    """Check the criterion of a checkpoint before it is built.

    Raises:
        CheckpointError: the criterion is not known to be safe, or an option of it has a wrong type.
    """
    name = getattr(cfg, "_name", None)
    if name not in CRITERIONS:
        raise CheckpointError(
            f"the checkpoint names the criterion {short(name)}; those built from a checkpoint are "
            f"{', '.join(sorted(CRITERIONS))}: evaluate with fairseq-eval-lm, which builds none"
        )
    options = OmegaConf.to_container(cfg, resolve=False) if OmegaConf.is_config(cfg) else cfg
    try:
        check_options(options, CRITERION_DATACLASS_REGISTRY[name])
    except ValueError as error:
        raise CheckpointError(f"the checkpoint's criterion {name}: {error}") from None


def check_encoders(state: Dict[str, Any], given: Mapping[str, Any], path: str) -> None:
    """Check the tokenizer and the pieces of words that a checkpoint names, unless others are *given*.

    Raises:
        CheckpointError: the tokenizer or the pieces are not known to be safe.
    """
    for kind, known in ENCODERS.items():
        section = state["cfg"].get(kind)
        name = section.get("_name") if isinstance(section, dict) else section
        if section is None or kind in given:
            continue
        if not isinstance(name, str) or name not in known:
            raise CheckpointError(
                f"{path} names the {kind} {short(name)}; those built from a checkpoint are "
                f"{', '.join(sorted(known))}: pass {kind}=NAME yourself"
            )
        dataclass = REGISTRIES[kind]["dataclass_registry"].get(name)
        if isinstance(section, dict) and dataclass is not None:
            try:
                check_options(section, dataclass)
            except ValueError as error:
                raise CheckpointError(f"{path}: {kind} {name}: {error}") from None
            remote = [value for value in section.values() if isinstance(value, str) and "://" in value]
            if remote:
                raise CheckpointError(
                    f"{path} names {short(remote[0])}, and nothing is fetched because a file asks for it: "
                    f"pass {kind}={name!r} and its file yourself"
                )


def complete(cfg: Dict[str, Any]) -> Dict[str, Any]:
    """Return the configuration of a checkpoint with defaults for the options that it lacks.

    A memory's own option takes the default of the memory, as the checkpoint is older than the option: the architecture
    may give new models another value.
    """
    defaults: Dict[str, Any] = {f.name: None for f in fields(FairseqConfig) if f.name != "_name"}
    defaults.update(defaults_of(FairseqConfig))
    for name, registry in (
        ("model", MODEL_DATACLASS_REGISTRY),
        ("task", TASK_DATACLASS_REGISTRY),
        ("criterion", CRITERION_DATACLASS_REGISTRY),
    ):
        section = cfg.get(name)
        dataclass = registry.get(section.get("_name")) if isinstance(section, dict) else None
        defaults[name] = None if dataclass is None else defaults_of(dataclass)
        if name == "model" and is_our_model(section and section.get("_name")):
            for memory in MEMORIES.names():
                defaults[name].update({f.name: f.default for f in fields(MEMORIES[memory].options)})
    return {**defaults, **{name: _filled(defaults.get(name), section) for name, section in cfg.items()}}


def _filled(defaults: Any, section: Any) -> Any:
    if section is None:
        return defaults
    return {**defaults, **section} if isinstance(defaults, dict) and isinstance(section, dict) else section


def _check_plain(value: Any, where: str, namespace: bool) -> None:
    """Refuse values that are not plain, and strings that a configuration would replace by something else."""
    pending: List[Tuple[str, Any]] = [(where, value)]
    while pending:
        where, value = pending.pop()
        if namespace and isinstance(value, argparse.Namespace):
            value = vars(value)
        if isinstance(value, dict):
            if not all(isinstance(key, str) for key in value):
                raise ValueError(f"{where} has names of options that are no words")
            pending += [(f"{where}.{key}", item) for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            pending += [(where, item) for item in value]
        elif isinstance(value, str):
            if "${" in value or value == "???":
                raise ValueError(f"{short(where)} is {short(value)}, which stands for another value")
        elif value is not None and not isinstance(value, (bool, int, float)):
            raise ValueError(f"{short(where)} is a {type(value).__name__}, not a plain value")


def _check_contents(state: Dict[str, Any]) -> None:
    """Check the parts of a checkpoint that fairseq relies on."""
    weights, history = state.get("model"), state.get("optimizer_history")
    if not (isinstance(weights, dict) and all(isinstance(weight, Tensor) for weight in weights.values())):
        raise ValueError("the weights under 'model' are no tensors by name")
    if not (isinstance(history, list) and history and all(isinstance(entry, dict) for entry in history)):
        raise ValueError("'optimizer_history' is no list of what was optimized")
    if not isinstance(history[-1].get("num_updates"), int):
        raise ValueError("'optimizer_history' does not say after how many updates it was saved")
    extra = state.get("extra_state")
    if not (isinstance(extra, dict) and isinstance(extra.get("train_iterator"), dict)):
        raise ValueError("'extra_state' does not say where in the data it was saved")
    if not isinstance(state.get("task_state", {}), dict):
        raise ValueError("'task_state' is no dictionary")
