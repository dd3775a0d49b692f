"""Several models: loaded by fairseq-eval-lm, with the file's name in an error, and their mean probability."""

import math
from typing import Any, Callable, List, Sequence

import torch
from fairseq import checkpoint_utils, utils
from torch import Tensor

from .own import OwnTask
from .restoring import expects_ours, opening
from .stand_in import stand_in


@stand_in(checkpoint_utils, "load_model_ensemble_and_task")
def load_model_ensemble_and_task(
    original: Callable[..., Any],
    filenames: Sequence[str],
    arg_overrides: Any = None,
    task: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Load the models of ``--path``, separated by ``:``, which fairseq-eval-lm takes for one file name.

    Raises:
        ValueError: a checkpoint does not fit the task, such as one with another dictionary; the message names the file.
    """
    if not (isinstance(task, OwnTask) or expects_ours()):
        return original(filenames, arg_overrides, task, *args, **kwargs)
    evaluated, models, documents = task, [], []
    with opening():
        for path in [path for name in filenames for path in utils.split_paths(name)]:
            try:
                loaded, cfg, task = original([path], arg_overrides, task, *args, **kwargs)
            except ValueError as error:
                if path in str(error):
                    raise
                raise ValueError(f"{path}: {error}") from error
            models += loaded
            documents.append(str(cfg.task.documents))
    if evaluated is not None:
        evaluated.trained_documents = next((d for d in documents if d != "none"), "none")
    return models, cfg, task


def mean_over_models(log_probs: List[Tensor]) -> Tensor:
    """Return the logarithm of the mean of probabilities, of which every model gives the logarithms."""
    return log_probs[0] if len(log_probs) == 1 else torch.stack(log_probs).logsumexp(0) - math.log(len(log_probs))
