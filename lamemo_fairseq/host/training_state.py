"""The state of fairseq's trainer that fairseq does not save. Without it, a resumed run differs from one never stopped.

- The float32 weights behind those of ``--fp16`` and ``--bf16``. fairseq derives them anew from the rounded weights.
- When the loss scale last changed; with ``--amp`` the scale itself, and how often a batch was tried again.
- How long ``--patience`` has waited, the state of the schedule, and when the averages of ``--store-ema`` were updated.
- The text that is validated on: values of another one cannot be compared with the best so far.
"""

import logging
import os
import re
from typing import Any, Dict, List, Optional, Set

import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager
from fairseq.optim.dynamic_loss_scaler import DynamicLossScaler
from torch import Tensor

from ..core.names import missing_checkpoint
from .commands import names_of
from .schedules import schedule_state

logger = logging.getLogger(__name__)

_PATIENCE = ("best", "num_runs")  # attributes that fairseq adds to its function
VALIDATED = "validated"  # the name of the text that the best value so far is of
_AVERAGES = ("update_freq_counter", "decay")


def first_validated(dataset: Any) -> str:
    """Return the name of the split whose validation decides on the best checkpoint, of fairseq's options of data."""
    return "valid" if dataset.combine_valid_subsets else str(dataset.valid_subset).split(",")[0]


def validated_text(trainer: Any) -> Optional[str]:
    """Return the fingerprint of the text of that split, None without validations."""
    options = trainer.cfg.dataset
    split = None if options.disable_validation else trainer.task.datasets.get(first_validated(options))
    return None if split is None else str(split.tokens.fingerprint)


def training_state(trainer: Any) -> Dict[str, Any]:
    """Return tensors and plain containers, for a checkpoint."""
    state: Dict[str, Any] = {}
    masters = _masters(trainer.optimizer)
    if masters:
        state["masters"] = (
            masters[0].flatten() if len(masters) == 1 else torch.cat([master.flatten() for master in masters])
        )
    scaler = getattr(trainer.optimizer, "scaler", None)
    if isinstance(scaler, DynamicLossScaler):
        state["scaler"] = {name: vars(scaler)[name] for name in _counted(scaler)}
    elif scaler is not None:
        state["scaler"] = scaler.state_dict()
    for names in names_of("train"):
        function = names.should_stop_early
        state["patience"] = {name: getattr(function, name) for name in _PATIENCE if hasattr(function, name)}
    if trainer.cfg.ema.store_ema:
        state["averages"] = {name: getattr(trainer.ema, name) for name in _AVERAGES}
    state["amp_retries"] = getattr(trainer, "_amp_retries", 0)
    state["schedule"] = schedule_state(trainer)
    state[VALIDATED] = validated_text(trainer)
    return state


def restore_training_state(trainer: Any, state: Dict[str, Any]) -> None:
    """Go on from the result of `training_state`, where this run has the same kind of state."""
    if "masters" in state:
        _restore_masters(trainer, state["masters"])
    scaler, saved = getattr(trainer.optimizer, "scaler", None), state.get("scaler", {})
    if isinstance(scaler, DynamicLossScaler) and saved.keys() == _counted(scaler):
        vars(scaler).update(saved)
    elif scaler is not None and saved and saved.keys() == scaler.state_dict().keys():
        scaler.load_state_dict(saved)
    for names in names_of("train"):
        vars(names.should_stop_early).update(state.get("patience", {}))
    if trainer.cfg.ema.store_ema:
        vars(trainer.ema).update(state.get("averages", {}))
    if hasattr(trainer, "_amp_retries"):
        trainer._amp_retries = state.get("amp_retries", 0)


def _masters(optimizer: Any) -> List[Tensor]:
    """Return the float32 weights, one tensor a device or one a parameter, in the order of the parameters."""
    masters = getattr(optimizer, "fp32_params", [])
    return [p.data for p in (masters.values() if isinstance(masters, dict) else masters)]


def _restore_masters(trainer: Any, saved: Tensor) -> None:
    masters = _masters(trainer.optimizer)
    if not masters:
        return
    rounded = torch.cat([p.data.flatten() for p in trainer.optimizer.fp16_params])
    saved = saved.to(rounded.device)
    # Weights may have been changed since, for example by averaging checkpoints.
    if saved.shape != rounded.shape or not torch.equal(saved.to(rounded.dtype), rounded):
        logger.warning("the float32 weights in the checkpoint are not those of its model: they begin from the model's")
        return
    for master, weights in zip(masters, saved.split([m.numel() for m in masters]), strict=True):
        master.copy_(weights.view_as(master))


def _counted(scaler: DynamicLossScaler) -> Set[str]:
    return {name for name in vars(scaler) if name == "loss_scale" or name.startswith("_")}


def check_named_checkpoint(cfg: Any, suffix: str) -> None:
    """Check that the checkpoint to begin with exists. Without it fairseq trains from the start.

    Of a run that begins in a folder with checkpoints, warn.

    Raises:
        FileNotFoundError: the checkpoint is missing; the message has the option that names it.
    """
    default = "checkpoint_last.pt"
    last = os.path.join(cfg.save_dir, default.replace(".pt", suffix + ".pt"))
    begun = PathManager.isfile(last)
    if cfg.restore_file == default and cfg.continue_once is None and not (begun or cfg.no_save):
        _warn_of_former_checkpoints(cfg.save_dir, suffix)
    if cfg.restore_file != default:
        option, path = "--restore-file", cfg.restore_file.replace(".pt", suffix + ".pt")
    elif cfg.continue_once is not None and not begun:
        option, path = "--continue-once", cfg.continue_once
    elif cfg.finetune_from_model is not None and not begun:
        option, path = "--finetune-from-model", cfg.finetune_from_model
    else:
        return
    if not PathManager.isfile(path):
        beside = os.path.join(cfg.save_dir, os.path.basename(path))
        if PathManager.isfile(beside):
            raise FileNotFoundError(f"{option} {path}: there is no such file, pass {beside}")
        raise FileNotFoundError(missing_checkpoint(path, option))
    if begun and os.path.realpath(path) != os.path.realpath(last):
        logger.warning("%s %s is taken, although there is a %s from a run that has begun", option, path, last)


def tell_of_former_best(trainer: Any, path: str) -> None:
    """Tell that the best value of a restored run counts, in a folder that has no best checkpoint.

    A run that never reaches the value ends without ``checkpoint_best.pt``, as in fairseq.

    Args:
        trainer: it has restored the checkpoint *path*.
    """
    cfg, name = trainer.cfg.checkpoint, f"checkpoint_best{trainer.checkpoint_suffix}.pt"
    best = getattr(checkpoint_utils.save_checkpoint, "best", None)
    if best is None or cfg.no_save or trainer.cfg.dataset.disable_validation:
        return
    if trainer.should_save_checkpoint_on_current_rank and not PathManager.isfile(os.path.join(cfg.save_dir, name)):
        logger.warning(
            "--save-dir %s has no %s, and gets one once %s is %.6g or %s, the best value in %s; pass --reset-meters, "
            "once, to count the validations of this run alone",
            cfg.save_dir,
            name,
            cfg.best_checkpoint_metric,
            best,
            "more" if cfg.maximize_best_checkpoint_metric else "less",
            path,
        )


def _warn_of_former_checkpoints(folder: str, suffix: str) -> None:
    """Warn that a run which has nothing to go on from replaces checkpoints, the best one first."""
    form = re.compile(rf"checkpoint(\d+|_\d+_\d+|_best|\.best_.*){re.escape(suffix)}\.pt")
    former = sorted(filter(form.fullmatch, os.listdir(folder)), reverse=True) if os.path.isdir(folder) else []
    if former:
        logger.warning(
            "--save-dir %s holds %s%s, but no checkpoint_last%s.pt to go on from: this run begins at update 0, and "
            "replaces checkpoints of the same names. To go on from one pass --restore-file, to keep all pass another "
            "--save-dir",
            folder,
            former[0],
            f" and {len(former) - 1} more" if former[1:] else "",
            suffix,
        )
