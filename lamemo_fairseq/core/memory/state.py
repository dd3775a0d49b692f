"""The state of a memory: what is carried from one segment to the next.

Shapes: B streams, m memory slots.
"""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Type, TypeVar, Union

import torch
from torch import Tensor

State = TypeVar("State", bound="MemoryState")
SavedField = Union[Tensor, Sequence[Tensor]]


@dataclass(frozen=True)
class MemoryState:
    """Base of all states. Every field is a tensor, or a tuple of tensors, with the streams first.

    A field with a default is left out where it has that value.

    States hold no gradient. A decoder adds the words to the state that a memory returns, if positions depend on them.
    """

    words: Optional[Tensor] = field(default=None, kw_only=True)  # [B, m] int64, of the slots

    def map(self: State, fn: Callable[[Tensor], Tensor]) -> State:
        """Return the same state with *fn* applied to each tensor."""
        mapped: Dict[str, Any] = {
            name: tuple(fn(t) for t in value) if isinstance(value, tuple) else fn(value)
            for name, value in self._values().items()
        }
        return type(self)(**mapped)

    def own(self) -> Dict[str, Any]:
        """Return the fields by name, without the words."""
        return {name: value for name, value in self._values().items() if name != "words"}

    def _values(self) -> Dict[str, Any]:
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        return {name: value for name, (value, default) in values.items() if value is not default}

    def tensors(self) -> List[Tensor]:
        """Return all tensors, in the order in which `map` meets them."""
        tensors: List[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor

        self.map(note)
        return tensors

    def finite(self) -> Optional[Tensor]:
        """Return ``[B]`` booleans, True for streams without NaN and infinity; None if there are no tensors."""
        finite = [t.isfinite().flatten(1).all(1) for t in self.tensors()]
        return torch.stack(finite).all(0) if finite else None

    def to_dict(self) -> Dict[str, SavedField]:
        """Return tensors in plain containers, for a checkpoint."""
        return self._values()

    @classmethod
    def from_dict(cls: Type[State], saved: Mapping[str, SavedField]) -> State:
        """Return the state that `to_dict` has written.

        Raises:
            ValueError: the fields are those of another memory.
        """
        optional = {f.name for f in fields(cls) if f.default is not MISSING}
        names = {f.name for f in fields(cls)} - optional
        if set(saved) - optional != names:
            raise ValueError(
                f"saved memory holds {sorted(saved)}, but this model's memory is made of {sorted(names)}: "
                "resume with the same --memory, or pass --reset-dataloader"
            )
        values: Dict[str, Any] = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in saved.items()}
        return cls(**values)
