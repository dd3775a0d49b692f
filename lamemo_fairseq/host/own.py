"""The task's name, and bases that mark this package's own classes: they are recognised without an import."""

TASK = "segment_language_modeling"


class OwnTask:
    """Base of the tasks that feed consecutive segments."""

    trained_documents = "none"
    """The option ``--documents`` that the checkpoint of fairseq-eval-lm was trained with."""


class OwnModel:
    """Base of the models that read consecutive segments."""
