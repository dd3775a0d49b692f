"""The block-recurrent memory's own options."""

# No postponed annotations: a host reads the types of the fields.
import math
from dataclasses import dataclass
from typing import List, Optional

from ...fields import option
from ..base import MemoryOptions

FIXED, LSTM = "fixed", "lstm"


@dataclass(frozen=True)
class BlockRecurrentOptions(MemoryOptions):
    recurrent_states: int = option(512, "state vectors S of a recurrent layer")
    recurrent_layers: Optional[str] = option(
        None, "comma separated layers with states, from 1 (default: the third from the top, such as the 10th of 12)"
    )
    recurrent_scale: float = option(
        8.0,
        "a_h at first, by which scores of queries and keys of length 1 are multiplied (the authors' code: 1)",
        fixed=True,
    )
    state_gate: str = option(
        FIXED,
        "gate between a state and its update: a learned number for each channel, or the gates of an LSTM",
        [FIXED, LSTM],
    )

    def layers_of(self, layers: int) -> List[int]:
        """Return the recurrent layers, counted from 0 and in order.

        Raises:
            ValueError: there is no such layer.
        """
        chosen = sorted(set(self._named)) or [max(1, layers - 2)]
        for layer in chosen:
            if not 1 <= layer <= layers:
                raise ValueError(
                    f"--recurrent-layers names layer {layer}, but there are {layers} layers: pass some from 1 to "
                    f"{layers}, or leave it out"
                )
        return [layer - 1 for layer in chosen]

    @property
    def _named(self) -> List[int]:
        text = self.recurrent_layers
        try:
            return [] if text is None else [int(layer) for layer in text.split(",")]
        except ValueError:
            raise ValueError(f"--recurrent-layers '{text}': pass whole numbers such as 10, or 4,10") from None

    def check(self) -> None:
        if self.recurrent_states < 1:
            raise ValueError(
                f"--recurrent-states is {self.recurrent_states}, it must be at least 1: for no states, pass --memory "
                "recurrent"
            )
        if not 0 < self.recurrent_scale < math.inf:
            raise ValueError(f"--recurrent-scale is {self.recurrent_scale}, it must be above 0 and finite")
        self._named  # noqa: B018  (refuses what is no number)
