"""What a task keeps of a run."""

from typing import Any

from fairseq.tasks.fairseq_task import StatefulContainer


class TaskState(StatefulContainer):
    """fairseq's, which can be copied and pickled; there, a copy looks for attributes that it does not have yet."""

    def __getattr__(self, name: str) -> Any:
        if name in ("_state", "_factories") or name.startswith("__"):
            raise AttributeError(name)
        return super().__getattr__(name)
