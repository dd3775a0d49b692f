"""Compare a training run that goes on from a checkpoint with the run that wrote the checkpoint.

Options that the weights do not fit are refused by name before anything is loaded; other differences are logged.
"""

import argparse
import logging
import os
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, cast

import torch
from omegaconf import OmegaConf
from torch import Tensor

from ..core.config import ModelConfig
from ..core.fields import fixed_options
from ..core.memory import MEMORIES
from ..core.names import missing_checkpoint, option_name
from .averages import supply_averages
from .checkpoint_files import CheckpointError, is_ours, not_ours
from .configuration import complete, read_ours
from .optimizers import put_options
from .overrides import owners_of_options
from .training_state import VALIDATED, first_validated, validated_text

logger = logging.getLogger(__name__)

# Options of which another value makes another model with the same weights.
_FIXED = {"sentence_ends", "paragraph_ends", *fixed_options(ModelConfig)}
_FIXED |= {name for memory in MEMORIES.names() for name in fixed_options(MEMORIES[memory].options)}
# Options that the weights' names and shapes do not depend on.
_WEIGHTLESS = {
    "activation_dropout", "attention_backend", "attention_dropout", "checkpoint_activations", "clamp_len",
    "cuda_graphs", "dropout", "preset_tokens_per_sample", "reading_order", "same_length", "tokens_per_sample",
}  # fmt: skip
_PRECISION = {
    "fp16", "bf16", "amp", "memory_efficient_fp16", "memory_efficient_bf16", "fp16_no_flatten_grads",
}  # fmt: skip
_ALL_RANKS = " times ranks"  # after an option of a rank's streams, to count those of all
# Options of validation that are those of training if nobody gives them.
_FOLLOWING = {f"{name}_valid{end}": f"{name}{end}" for name in ("batch_size", "max_tokens") for end in ("", _ALL_RANKS)}
# Sections, and those of their options that change how a run goes on; None for all of them.
_TOLD: Dict[str, Any] = {
    "model": None,
    "task": ("tokens_per_sample", "roll", "documents", "document_separator", "score_separators", "at_document"),
    "criterion": None,
    "optimizer": None,
    "lr_scheduler": None,
    "optimization": ("lr", "clip_norm", "sentence_avg", "update_freq"),
    "dataset": (
        *("train_subset", "valid_subset", "combine_valid_subsets", "max_valid_steps"),
        *_FOLLOWING,
        *_FOLLOWING.values(),
    ),
    "checkpoint": ("best_checkpoint_metric", "maximize_best_checkpoint_metric"),
    "common": (*_PRECISION, "seed"),
    "ema": ("store_ema", "ema_decay", "ema_start_update", "ema_update_freq"),
}
# Options of which another value makes values of validations that cannot be compared with those before.
_COMPARED = ("valid_subset", "combine_valid_subsets", "max_valid_steps", *_TOLD["checkpoint"])
_NAMED = {"model": "arch"}  # the options that choose a section, where it has another name


class _Run(NamedTuple):
    trainer: Any
    anew: bool  # without the optimizer's state, as in finetuning
    schedule_anew: bool  # without the schedule's state


class _Difference(NamedTuple):
    section: str
    name: str
    now: Any
    then: Any

    def __str__(self) -> str:
        if isinstance(self.now, bool) and isinstance(self.then, bool):
            given, trained = ("given", "without") if self.now else ("not given", "with")
            return f"{option_name(self.name)} is {given}, the checkpoint was trained {trained} it"
        return f"{option_name(self.name)} is {_shown(self.now)}, the checkpoint was trained with {_shown(self.then)}"


_OBJECTS = {"allow_objects": True}
_run: ContextVar[Optional[_Run]] = ContextVar("_run", default=None)
_opening: ContextVar[bool] = ContextVar("_opening", default=False)


@contextmanager
def restoring(trainer: Any, anew: bool, schedule_anew: bool) -> Iterator[None]:
    """Compare the checkpoint that is loaded in this context with the options of a run.

    Args:
        trainer: fairseq's.
        anew: the optimizer's state is not taken from the checkpoint, as in finetuning.
        schedule_anew: the schedule's state is not taken from the checkpoint.

    Raises:
        ValueError: ``--ema-seed-model`` names no checkpoint with averages of this model.
    """
    _seed_averages(trainer)
    token = _run.set(_Run(trainer, anew, schedule_anew))
    try:
        yield
    finally:
        _run.reset(token)


@contextmanager
def opening() -> Iterator[None]:
    """Expect that a checkpoint of this package is loaded in this context, to be evaluated or continued."""
    token = _opening.set(True)
    try:
        yield
    finally:
        _opening.reset(token)


def restores() -> bool:
    """Return whether a checkpoint is loaded for a run to go on from, in `restoring`."""
    return _run.get() is not None


def expects_ours() -> bool:
    """Return whether a checkpoint is loaded for a task of this package, in `restoring` or `opening`."""
    return _opening.get() or restores()


def check_expected(state: Dict[str, Any], path: str) -> None:
    """Check a checkpoint against the purpose that it is loaded for; in `restoring`, log the differences.

    Raises:
        CheckpointError: the checkpoint is of another package, or of a model that this run's options do not make.
    """
    if _opening.get() and not is_ours(state):
        raise CheckpointError(f"{not_ours(state, path)}: pass its own task")
    run = _run.get()
    if run is None:
        return
    if not is_ours(state):
        task = run.trainer.cfg.task._name
        raise CheckpointError(f"{not_ours(state, path)}: --task {task} cannot go on from it, take another --save-dir")
    _upgrade_positions(run, state, path)
    _complete_layout(state, run.trainer.get_model().decoder.memory.layout)
    differences = _differences(run.trainer, state)
    check_weights(run.trainer.get_model(), state["model"], path, differences)
    if not run.anew:
        other = [d for d in differences if d.section == "model" and d.name in _FIXED]
        if other:
            raise CheckpointError(
                f"{path}: {_listed(other)}. Go on with the former values, or pass --finetune-from-model to take "
                "nothing but its weights"
            )
        _check_choices(run, _resolved(complete(state["cfg"])), path, differences)
        if "last_optimizer_state" not in state:
            raise CheckpointError(
                f"{path} was saved with --no-save-optimizer-state, so that no run can go on from it: pass "
                "--finetune-from-model to begin a run with its weights"
            )
        validations = [str(d) for d in differences if d.name in _COMPARED]
        _forget_the_best(run, state, path, validations or _other_text(run.trainer, state))
    told = [d for d in differences if (d.section == "model" or not run.anew) and d.name not in _COMPARED]
    if told:
        logger.warning("%s: %s", path, _listed(told))
    tunes = run.anew and path == run.trainer.cfg.checkpoint.finetune_from_model
    supply_averages(run.trainer, state, run.anew, tunes)
    if not run.anew:
        changed = [d.name for d in differences if d.section == "optimizer"]
        put_options(run.trainer.cfg.optimizer, changed, state["last_optimizer_state"])


def _complete_layout(state: Dict[str, Any], layout: Sequence[str]) -> None:
    """Add the options that a saved memory depends on, and of which it says nothing, from a checkpoint's configuration.

    The memory was saved before the option was in *layout*, or there at all.
    """
    saved = state["extra_state"].get("train_iterator", {}).get("layout")
    if saved is not None:
        trained = _resolved(complete(state["cfg"]))["model"]
        for name in layout:
            saved.setdefault(option_name(name), trained[name])


def _upgrade_positions(run: _Run, state: Dict[str, Any], path: str) -> None:
    """Bring the weights and averages of older position encodings into their form of today.

    Raises:
        CheckpointError: the run would go on with the optimizer's state, which is of the former weights.
    """
    extra, positions = state["extra_state"], run.trainer.get_model().decoder.positions
    stored = [state["model"], extra.get("ema"), extra.get("ema_fp32_params")]
    older = [positions.upgrade(weights, "decoder.positions.") for weights in stored if weights]
    if any(older) and not run.anew:
        raise CheckpointError(
            f"{path} holds the weights of --position-encoding {run.trainer.cfg.model.position_encoding} in the form of "
            "an older version, which its optimizer's state is of: pass --reset-optimizer, once, to go on with an "
            "optimizer that begins anew, or --finetune-from-model to take nothing but the weights"
        )


def _other_text(trainer: Any, state: Dict[str, Any]) -> List[str]:
    """Return the difference between the texts of validations, if there is one and the checkpoint knows its own."""
    then = state["extra_state"].get(type(trainer.task).__name__, {}).get(VALIDATED)
    now = validated_text(trainer)
    split = first_validated(trainer.cfg.dataset)
    return [f"the text of the split '{split}' is {now}, there it was {then}"] if now and then and now != then else []


def _forget_the_best(run: _Run, state: Dict[str, Any], path: str, differences: List[str]) -> None:
    """Remove the best value of a validation so far from a checkpoint, if it says nothing on those to come.

    Args:
        differences: between the validations of then and now.

    Raises:
        CheckpointError: the learning rate depends on the value too.
    """
    if not differences or run.trainer.cfg.dataset.disable_validation:
        return
    told = "; ".join(differences)
    if not run.schedule_anew and run.trainer.cfg.lr_scheduler._name == "reduce_lr_on_plateau":
        raise CheckpointError(
            f"{path}: {told}, and --lr-scheduler reduce_lr_on_plateau goes by it. Go on with the former, or pass "
            "--reset-lr-scheduler to begin the schedule anew"
        )
    extra = state["extra_state"]
    extra.pop("best", None)
    extra.get(type(run.trainer.task).__name__, {}).pop("patience", None)
    logger.warning(
        "%s: %s: the next validation is the best one so far, and --patience counts from there",
        path,
        told,
    )


def _check_choices(run: _Run, then: Mapping[str, Any], path: str, differences: List[_Difference]) -> None:
    """Check that the states of the optimizer and the schedule are of the kinds that this run has.

    Raises:
        CheckpointError: they are not; the message names the options.
    """
    refused = {"criterion", "optimizer", "untie_output"}
    if _kind_of_state(run.trainer.cfg.common) != _kind_of_state(SimpleNamespace(**then["common"])):
        refused |= _PRECISION
    choices = [d for d in differences if d.name in refused or (d.name == "beta1" and None in (d.now, d.then))]
    if choices:
        raise CheckpointError(
            f"{path}: {_listed(choices)}. Go on with the former, or pass --reset-optimizer to begin with another"
        )
    schedules = [d for d in differences if d.name == "lr_scheduler"]
    if schedules and not run.schedule_anew:
        raise CheckpointError(
            f"{path}: {_listed(schedules)}. Go on with the former, or pass --reset-lr-scheduler to begin with another"
        )


def _kind_of_state(common: Any) -> str:
    """Return the kind of the optimizer's state, which fairseq chooses by the options of precision."""
    if not (common.fp16 or common.bf16 or common.amp):
        return "full precision"
    if common.memory_efficient_fp16 or common.memory_efficient_bf16:
        return "half precision"
    if common.amp:
        return "scaled"
    return "master weights, " + ("apart" if common.bf16 or common.fp16_no_flatten_grads else "flattened")


def check_weights(model: Any, weights: Mapping[str, Any], path: str, differences: List[_Difference]) -> None:
    """Check that weights fit a model, before the model loads them.

    Raises:
        CheckpointError: the weights do not fit; the message names the options that differ, or else a weight.
    """
    weights = dict(weights)
    try:
        model.upgrade_state_dict(weights)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    wanted = model.state_dict()
    wrong = [name for name in sorted({*wanted, *weights}) if _shape(wanted.get(name)) != _shape(weights.get(name))]
    if not wrong:
        return
    by_distance = any(".distance_" in name for name in wrong)  # which alone depend on lengths
    lengths = set() if by_distance else {"bptt_segments", "mem_len", "tokens_per_sample"}
    possible = [d for d in differences if d.section == "model" and d.name not in _WEIGHTLESS | lengths]
    reason = _listed(possible) or (
        f"{wrong[0]} has the shape {_shape(wanted.get(wrong[0]))}, there {_shape(weights.get(wrong[0]))}"
    )
    raise CheckpointError(
        f"the weights of {path} do not fit this model: {reason}. Pass the former values, or train from the start in "
        "another --save-dir"
    )


def _differences(trainer: Any, state: Dict[str, Any]) -> List[_Difference]:
    """Return the differences between the options of a run and those of a checkpoint, each name once."""
    now, then = _resolved(trainer.cfg), _resolved(complete(state["cfg"]))
    _count_ranks(now, then)
    chosen = {cfg["model"][name] for cfg in (now, then) for name in ("memory", "position_encoding")}
    owners = owners_of_options()
    differences: Dict[str, _Difference] = {}
    for section, told in _TOLD.items():
        mine, theirs = _options(now, section), _options(then, section)
        for name in [n for n in mine if n in theirs and (told is None or n in told)]:
            concerns = not (name in owners and section == "model" and not owners[name] & chosen)
            if name in _FOLLOWING:
                concerns = any(options[name] != options[_FOLLOWING[name]] for options in (mine, theirs))
            if name == "valid_subset":  # the first split alone is compared
                mine[name], theirs[name] = (str(options[name]).split(",")[0] for options in (mine, theirs))
            if concerns and mine[name] != theirs[name]:
                shown = _NAMED.get(section, section) if name == "_name" else name
                differences.setdefault(shown, _Difference(section, shown, mine[name], theirs[name]))
    return list(differences.values())


def _count_ranks(*runs: Mapping[str, Any]) -> None:
    """Count the streams of all ranks, if runs have other numbers of ranks: of one rank alone they tell nothing."""
    ranks = [run["distributed_training"]["distributed_world_size"] for run in runs]
    if len(set(ranks)) == 1:
        return
    for run, count in zip(runs, ranks, strict=True):
        dataset = run["dataset"]
        for name in {*_FOLLOWING, *_FOLLOWING.values()} & set(dataset):
            value = dataset.pop(name)
            dataset[name + _ALL_RANKS] = value and value * count


def _resolved(cfg: Any) -> Dict[str, Any]:
    resolved = OmegaConf.to_container(OmegaConf.create(cfg, flags=_OBJECTS), resolve=True, enum_to_str=True)
    return cast(Dict[str, Any], resolved)


def _options(cfg: Mapping[str, Any], name: str) -> Dict[str, Any]:
    section = cfg.get(name)
    if isinstance(section, argparse.Namespace):  # with all options of all sections
        others = {key for other in cfg.values() if isinstance(other, dict) for key in other}
        return {key: value for key, value in vars(section).items() if key == "_name" or key not in others}
    return section if isinstance(section, dict) else {}


def _seed_averages(trainer: Any) -> None:
    """Begin the moving averages with those of ``--ema-seed-model`` now, where a wrong file can be recognised."""
    path = trainer.cfg.ema.ema_seed_model
    if not trainer.cfg.ema.store_ema or path is None:
        return
    if not os.path.isfile(path):
        raise FileNotFoundError(missing_checkpoint(path, "--ema-seed-model"))
    state = read_ours(path)
    averages = state["extra_state"].get("ema")
    if not isinstance(averages, dict) or not all(isinstance(weight, Tensor) for weight in averages.values()):
        raise CheckpointError(f"--ema-seed-model {path} holds no averages: name a checkpoint trained with --store-ema")
    check_weights(trainer.get_model(), averages, path, _differences(trainer, state))
    with torch.serialization.safe_globals([argparse.Namespace]):
        trainer.ema  # noqa: B018


def _shape(weight: Any) -> Any:
    return None if weight is None else tuple(weight.shape)


def _shown(value: Any) -> str:
    return str(value[0] if isinstance(value, list) and len(value) == 1 else value)


def _listed(differences: List[_Difference]) -> str:
    return "; ".join(map(str, differences))
