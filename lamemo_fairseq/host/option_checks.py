"""Checks before a command begins: options without a use, values out of range, options that are missing."""

import logging
import math
import os
import re
from argparse import Namespace
from pathlib import Path
from typing import Any, Collection, Dict, List, Optional, Tuple

import torch
from fairseq.dataclass.configs import FairseqConfig
from fairseq.models import ARCH_MODEL_NAME_REGISTRY, MODEL_DATACLASS_REGISTRY
from fairseq.registry import REGISTRIES
from omegaconf import DictConfig, OmegaConf

from ..core.folder import check_folder
from ..core.names import not_known, option_name
from ..criterions import FAIRSEQ_CRITERIONS
from ..refusals import print_in_one_line_under_hydra
from .dataclass_defaults import defaults_of
from .evaluated_options import check_evaluated
from .generation_options import check_generation
from .optimizer_rules import WITH_RATE, check_needs, check_optimizer
from .option_rules import EVALUATION, GENERATE, GENERATION, HYDRA, REFUSED, TRAINING, VALIDATE, Settings, listed
from .option_table import rules_for
from .outputs import check_outputs

logger = logging.getLogger(__name__)

_AT_LEAST: Dict[int, Tuple[str, ...]] = {
    1: (
        *("update_freq", "log_interval", "validate_interval", "save_interval", "max_valid_steps"),
        *("batch_size", "batch_size_valid", "max_tokens", "max_tokens_valid", "tokens_per_sample"),
        *("distributed_world_size", "num_shards", "fp16_init_scale", "ema_update_freq"),
    ),
    0: (
        *("num_workers", "data_buffer_size", "seed", "lr", "clip_norm", "warmup_updates", "max_update", "max_epoch"),
        *("stop_time_hours", "validate_interval_updates", "validate_after_updates", "save_interval_updates"),
        *("empty_cache_freq", "ema_start_update", "shard_id", "softmax_batch", "weight_decay", "adam_eps"),
    ),
}


def check(command: str, settings: Settings, given: Collection[str], changed: Collection[str]) -> None:
    """Check the options of a command.

    Args:
        given: options to warn about if they have no use.
        changed: options that differ from their defaults, to refuse if they cannot be followed.

    Raises:
        OSError, ValueError: an option is refused, in one line, with its name and the remedy.
    """
    told: List[str] = []
    for option, rules in rules_for(command).items():
        for rule in rules:
            if option in (changed if rule.effect == REFUSED else given) and rule.applies(settings):
                if rule.effect == REFUSED:
                    raise ValueError(rule.message(option))
                told.append(rule.message(option))
    _check_values(settings)
    check_evaluated(settings, trains=command in TRAINING)
    _check_ranks(settings)
    if command in EVALUATION:
        need_path(settings.get("path"))
    if command in TRAINING:
        _check_choices(settings)
        check_outputs(settings)
    if command == GENERATE and settings.get("results_path"):
        check_folder(Path(settings["results_path"]), "--results-path")
    if command in (*TRAINING, VALIDATE) and settings.get("batch_size") is None and settings.get("max_tokens") is None:
        raise ValueError("no --batch-size: pass the number of streams that a rank reads side by side, such as 16")
    for message in told:
        logger.warning(message)


def need_path(path: Optional[str]) -> None:
    """Refuse a command that evaluates or generates without ``--path``.

    Raises:
        ValueError: there is no path.
    """
    if not path:
        raise ValueError(
            "no --path: pass the checkpoint of a trained model, such as --path checkpoints/checkpoint_best.pt; --task "
            "is read from it"
        )


def _check_ranks(settings: Settings) -> None:
    """Refuse more ranks than a machine has GPUs, where nothing says how others are started."""
    ranks, gpus = settings.get("distributed_world_size") or 1, torch.cuda.device_count()
    launched = {"MASTER_ADDR", "SLURM_JOB_NODELIST", "SLURM_STEP_NODELIST"}.intersection(os.environ)
    addressed = settings.get("distributed_init_method") or (settings.get("distributed_port") or 0) > 0
    if ranks > max(1, gpus) and not launched and not addressed:
        raise ValueError(
            f"--distributed-world-size is {ranks}, and fairseq starts one rank a GPU, of which there are {gpus} here: "
            "start the ranks with torchrun, on CPUs too"
        )


def _check_values(settings: Settings) -> None:
    for name, value in settings.items():
        if any(isinstance(v, float) and math.isnan(v) for v in listed(value)):  # no comparison would find it
            raise ValueError(f"{option_name(name)} is nan: pass a number")
    for least, names in _AT_LEAST.items():
        for name in names:
            values = listed(settings.get(name))
            if any(isinstance(v, (int, float)) and v < least for v in values):
                raise ValueError(f"{option_name(name)} is {', '.join(map(str, values))}, it must be at least {least}")
    if (settings.get("shard_id") or 0) >= (settings.get("num_shards") or 1):
        raise ValueError(
            f"--shard-id is {settings['shard_id']}, it must be below --num-shards, {settings.get('num_shards')}"
        )
    for name in ("ema_decay", "label_smoothing") if settings.get("store_ema") else ("label_smoothing",):
        if not 0 <= (settings.get(name) or 0) <= 1:
            raise ValueError(f"{option_name(name)} is {settings[name]}, it must be between 0 and 1")


def _check_choices(settings: Settings) -> None:
    if not settings.get("optimizer"):
        raise ValueError("no --optimizer: pass one, such as --optimizer adam")
    check_optimizer(settings)
    check_criterion_name(str(settings.get("criterion")))
    check_needs(settings)
    restored = settings.get("restore_file") not in (None, "checkpoint_last.pt")
    if settings.get("finetune_from_model") and restored:
        raise ValueError("--finetune-from-model begins a run and --restore-file goes on with one: pass one of the two")
    if not any(settings.get(name) for name in ("max_update", "max_epoch", "stop_time_hours")):
        logger.warning("neither --max-update nor --max-epoch is given: the run goes on until it is stopped")
    warmup, updates = settings.get("warmup_updates") or 0, settings.get("max_update") or 0
    if 0 < updates <= warmup:
        logger.warning(
            "--warmup-updates is %d and --max-update %d: the learning rate still rises towards --lr when the run ends; "
            "pass fewer --warmup-updates",
            warmup,
            updates,
        )
    falls = float(settings.get("total_num_update") or 0) if settings.get("lr_scheduler") == "polynomial_decay" else 0
    if 0 < falls < updates and not float(settings.get("end_learning_rate") or 0):
        logger.warning(
            "--total-num-update is %d and --max-update %d: the learning rate is 0 in the updates between, and "
            "nothing is learned; pass the same number, or --end-learning-rate",
            falls,
            updates,
        )


def check_criterion_name(name: str) -> None:
    """Refuse those of fairseq's criterions that are for other tasks.

    Raises:
        ValueError: the criterion is for another task.
    """
    if not serves(name):
        raise ValueError(
            f"--criterion {name} is not for language models: pass chunked_cross_entropy or one of fairseq's "
            f"{', '.join(FAIRSEQ_CRITERIONS)}"
        )


def serves(name: str) -> bool:
    """Return whether a criterion can train these models. Only fairseq's own criterions are judged."""
    criterion = REGISTRIES["criterion"]["registry"].get(name)
    return name in FAIRSEQ_CRITERIONS or criterion is None or not criterion.__module__.startswith("fairseq.")


_line_checked = False  # whether the command line of the next task has been checked


def check_line(command: str, settings: Settings, given: Collection[str], changed: Collection[str]) -> None:
    """Check the options of a command line, once for the task that is set up next.

    Raises:
        OSError, ValueError: as `check` does.
    """
    global _line_checked
    check(command, settings, given, changed)
    if command in GENERATION:
        check_generation(Namespace(**settings))
    _line_checked = True


def check_task(config: Any, from_checkpoint: bool) -> None:
    """Check the whole configuration that contains a task's, if it is one of training and comes from a YAML.

    Raises:
        OSError, ValueError: as `check` does.
    """
    global _line_checked
    checked, _line_checked = _line_checked or from_checkpoint, False
    whole: Any = config._get_root() if isinstance(config, DictConfig) else {}
    if not checked and "optimization" in whole and OmegaConf.select(whole, "common_eval.path") is None:
        print_in_one_line_under_hydra()
        check_config(whole)


def check_config(config: DictConfig) -> None:
    """Check the configuration of a training run that was not read from a command line.

    Raises:
        OSError, ValueError: as `check` does.
    """
    values: Any = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    for name, section in values.items():
        values[name] = vars(section) if isinstance(section, Namespace) else section or {}  # of options without a type
    settings: Dict[str, Any] = {}
    changed = set()
    for section, defaults in _defaults(values).items():
        unknown = set(values[section]) - set(defaults) if defaults else set()
        if unknown:
            raise ValueError(not_known(f"{section}.", min(unknown), defaults))
        for name, default in defaults.items():
            default = _referred(default, values)
            settings[name] = values[section].get(name, default)
            if settings[name] != default:
                changed.add(name)
    settings.update({name: values[name].get("_name") for name in ("criterion", "optimizer", "lr_scheduler")})
    if "lr" not in changed and settings["optimizer"] in WITH_RATE and settings["lr_scheduler"] != "manual":
        rate = ", ".join(map(str, settings["lr"]))
        logger.warning("optimization.lr is %s, fairseq's default, which is too large: set one, such as [2.5e-4]", rate)
    check(HYDRA, settings, changed, changed)


def _defaults(values: Any) -> Dict[str, Dict[str, Any]]:
    """Return the options of training by section, with the defaults of the model and the other choices in *values*."""
    known = defaults_of(FairseqConfig)
    for name in ("model", "criterion", "optimizer", "lr_scheduler"):
        choice = values[name].get("_name")
        choice = ARCH_MODEL_NAME_REGISTRY.get(choice, choice) if name == "model" else choice
        classes = MODEL_DATACLASS_REGISTRY if name == "model" else REGISTRIES[name]["dataclass_registry"]
        known[name] = defaults_of(classes[choice]) if classes.get(choice) else {}
    sections = ("common", "distributed_training", "dataset", "optimization", "checkpoint", "ema")
    return {name: known[name] for name in (*sections, "criterion", "optimizer", "lr_scheduler", "model")}


def _referred(default: Any, values: Any) -> Any:
    """Return a default; ``${section.option}`` stands for the other option's value."""
    match = re.fullmatch(r"\$\{(\w+)\.(\w+)\}", default) if isinstance(default, str) else None
    return values[match[1]][match[2]] if match else default
