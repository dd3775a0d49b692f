"""The state that a task keeps of a run."""

from typing import Any

from fairseq.tasks.fairseq_task import StatefulContainer


class TaskState(StatefulContainer):
    """fairseq's container, which can be copied and pickled here: a copy of fairseq's reads fields that it lacks."""

    def __getattr__(self, name: str) -> Any:
        if name in ("_state", "_factories") or name.startswith("__"):
            raise AttributeError(name)
        return super().__getattr__(name)
