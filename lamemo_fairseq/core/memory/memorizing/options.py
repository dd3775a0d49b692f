"""The memorizing memory's own options."""

# No postponed annotations: a host reads the types of the fields.
from dataclasses import dataclass
from typing import Optional

from ...fields import option
from ..base import MemoryOptions

TOP_K, DENSE = "top-k", "dense"
RETRIEVED_ROWS = 32  # the paper's


@dataclass(frozen=True)
class MemorizingOptions(MemoryOptions):
    store_len: int = option(8192, "rows S, each a key and a value, of a stream's store")
    store_layer: Optional[int] = option(
        None, "the layer with the store, from 1 (default: with a quarter of all layers above it, such as the 9th of 12)"
    )
    retrieval: str = option(
        TOP_K,
        "rows of the store that queries read: the best rows, mixed in by a gate, or all rows, in the segment's softmax",
        [TOP_K, DENSE],
    )
    retrieved_rows: Optional[int] = option(
        None, f"rows that --retrieval top-k reads for each query and head (default: {RETRIEVED_ROWS})"
    )

    @property
    def top(self) -> int:
        """The number of rows that a top-k retrieval reads."""
        return RETRIEVED_ROWS if self.retrieved_rows is None else self.retrieved_rows

    def layer_of(self, layers: int) -> int:
        """Return the layer with the store, counted from 0.

        Raises:
            ValueError: there is no such layer.
        """
        layer = layers - layers // 4 if self.store_layer is None else self.store_layer
        if not 1 <= layer <= layers:
            raise ValueError(
                f"--store-layer is {layer}, but there are {layers} layers: pass one from 1 to {layers}, or leave it out"
            )
        return layer - 1

    def check(self) -> None:
        if self.store_len < 1:
            raise ValueError(
                f"--store-len is {self.store_len}, it must be at least 1: for no store, pass --memory recurrent"
            )
        if self.top < 1:
            raise ValueError(
                f"--retrieved-rows is {self.top}, it must be at least 1: for all rows, --retrieval {DENSE}"
            )
        if self.retrieval == DENSE and self.retrieved_rows is not None:
            raise ValueError(
                f"--retrieved-rows is {self.retrieved_rows}, but --retrieval {DENSE} reads all: leave it out"
            )
