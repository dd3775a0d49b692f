"""What is this package's own: the task's name, and the bases that tell its classes without importing them."""

TASK = "segment_language_modeling"


class OwnTask:
    """Base of the tasks that feed consecutive segments."""


class OwnModel:
    """Base of the models that read consecutive segments."""
