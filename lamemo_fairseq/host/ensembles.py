"""Several models in fairseq-eval-lm."""

from typing import Any, Callable, Sequence

from fairseq import checkpoint_utils, utils

from .own import OwnTask
from .restoring import opening
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
    """Load the models of ``--path``, separated by ``:``, which fairseq-eval-lm takes for one file name."""
    if not isinstance(task, OwnTask):
        return original(filenames, arg_overrides, task, *args, **kwargs)
    with opening():
        paths = [path for name in filenames for path in utils.split_paths(name)]
        models, cfg, task = original(paths, arg_overrides, task, *args, **kwargs)
    task.trained_documents = str(cfg.task.documents)
    return models, cfg, task
