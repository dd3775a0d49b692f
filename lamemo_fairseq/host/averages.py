"""Moving averages of the weights, ``--store-ema``."""

import logging
from types import SimpleNamespace
from typing import Any, Dict

from fairseq import utils
from fairseq.models.ema import EMA
from torch import nn

logger = logging.getLogger(__name__)


class Averages(EMA):
    """fairseq's averages. fairseq averages a tensor with two names, such as tied embeddings, twice an update."""

    def build_fp32_params(self, state_dict: Any = None) -> None:
        super().build_fp32_params(state_dict)
        for name, first in _other_names(self.model).items():
            self.fp32_params[name] = self.fp32_params[first]

    def _step_internal(self, new_model: nn.Module, updates: Any = None) -> None:
        others = _other_names(new_model)
        weights = {name: weight for name, weight in new_model.state_dict().items() if name not in others}
        super()._step_internal(SimpleNamespace(state_dict=lambda: weights), updates)


def supply_averages(trainer: Any, state: Dict[str, Any], anew: bool, tunes: bool) -> None:
    """Put averages into a checkpoint that a run goes on from, if the checkpoint has none.

    fairseq means to begin with the weights then, but no longer has the weights. If a run begins *anew*, the averages of
    ``--ema-seed-model``, which fairseq would forget, replace the checkpoint's. A run that *tunes* takes nothing but
    weights from ``--finetune-from-model``.
    """
    options, extra = trainer.cfg.ema, state["extra_state"]
    counted = "averages" in extra.get(type(trainer.task).__name__, {})
    if options.store_ema and "ema" in extra and not anew and not counted and options.ema_update_freq > 1:
        logger.warning(
            "the checkpoint, of a former version, does not say how long ago its averages were updated: "
            "--ema-update-freq counts from here"
        )
    if not options.store_ema or ("ema" in extra and not tunes and not (anew and options.ema_seed_model)):
        return
    extra.pop("ema_fp32_params", None)
    if options.ema_seed_model:
        extra["ema"] = utils.move_to_cpu(trainer.ema.get_model().state_dict())
    else:
        if not tunes:
            logger.warning("the checkpoint was trained without --store-ema: the averages begin with its weights")
        extra["ema"] = state["model"]


def _other_names(model: nn.Module) -> Dict[str, str]:
    """Return the first name of every parameter that has several names, by its other names."""
    first: Dict[int, str] = {}
    others: Dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            others[name] = first[id(parameter)]
    return others
