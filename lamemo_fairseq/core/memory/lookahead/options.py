"""The look-ahead memory's own options."""

# No postponed annotations: a host reads the types of the fields.
from dataclasses import dataclass

from ...fields import option
from ..base import MemoryOptions
from .windows import WINDOWS


@dataclass(frozen=True)
class LookaheadOptions(MemoryOptions):
    lookahead_window: str = option(
        "right", "side of a memory slot that it looks at: its right, or both", list(WINDOWS), fixed=True
    )
    lookahead_from_layer: int = option(
        1,
        "the first layer, from 1, whose slots look ahead; those of layers below stay as they are, as in Transformer-XL",
        fixed=True,
    )
    lookahead_every: int = option(
        1,
        "number K: slots look ahead in every K-th segment of a stream, and stay as they are in the others",
        fixed=True,
    )

    @property
    def cycle(self) -> int:
        return self.lookahead_every

    def check(self) -> None:
        if self.lookahead_from_layer < 1:
            raise ValueError(
                f"--lookahead-from-layer is {self.lookahead_from_layer}, but layers are counted from 1: pass 1 for all "
                "layers"
            )
        if self.lookahead_every < 1:
            raise ValueError(
                f"--lookahead-every is {self.lookahead_every}, it must be at least 1: pass 1 for every segment, or "
                "--memory recurrent for no look-ahead"
            )
