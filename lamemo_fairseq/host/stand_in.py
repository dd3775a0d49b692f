"""Replace functions of fairseq.

Functions with a hook in fairseq are replaced by subclasses: `trainer.SegmentTrainer`, and the optimizers that
`optimizers.adopt` makes. The functions below are replaced, since fairseq calls them by name. For a task, a model or a
checkpoint of another package each returns the result of fairseq's function with the same arguments. (`all_gather_list`
cannot tell whose values it gathers: it is replaced in processes that set up a task of this package.)

| replaced | when | in | reason |
|---|---|---|---|
| `options.parse_args_and_arch` | import | `options` | a command line has no hook; errors in one line |
| `checkpoint_utils.load_checkpoint_to_cpu` | import | `checkpoints` | checked before anything is built of it |
| `checkpoint_utils.PathManager` | import | `checkpoints` | its `copy` writes in place, over the last checkpoint |
| `checkpoint_utils.load_model_ensemble_and_task` | import | `ensembles` | several models in fairseq-eval-lm |
| `fairseq_cli.train.Trainer` | our task is set up | `training` | chooses the trainer, by the task |
| `fairseq_cli.train.train` | our task is set up | `training` | a run that has ended, or is interrupted |
| `distributed.utils.all_gather_list` | our task is set up | `ranks` | needs a GPU, and fails with long splits |
| `fairseq_cli.eval_lm.eval_lm` | our split is evaluated | `evaluation` | scores sentences, not streams |

``tests/test_replaced.py`` compares this list with the changes that an import of the package makes.
"""

import functools
from typing import Any, Callable


def stand_in(owner: Any, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator: the function replaces ``owner.name``, and gets the original as its first argument.

    *owner* is a module or a class.
    """
    original = getattr(owner, name)

    def put(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original, updated=())
        def stands_in(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        setattr(owner, name, stands_in)
        return stands_in

    return put
