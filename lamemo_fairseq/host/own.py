"""The task's name, and bases that mark this package's own classes: they are recognised without an import."""

TASK = "segment_language_modeling"


class OwnTask:
    """Base of the tasks that feed consecutive segments."""

    trained_documents = "none"
    """The option ``--documents`` that the checkpoint of fairseq-eval-lm was trained with."""


class OwnModel:
    """Base of the models that read consecutive segments."""


def not_fed(task: type) -> ValueError:
    """Return the error on a model of this package that a task of another kind is to feed."""
    return ValueError(
        f"a model with memory reads consecutive segments, which {task.__name__} does not feed: pass --task {TASK}"
    )
