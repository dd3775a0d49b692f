"""Tile sizes of the kernels, chosen on an H200 (`python examples/benchmarks/tiles.py` compares others)."""

from typing import Dict, NamedTuple, Optional

import torch


class Tile(NamedTuple):
    """A kernel's block of queries, block of keys (or of columns), warps, pipeline stages and a bound of registers."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: Optional[int] = None

    def options(self) -> Dict[str, Optional[int]]:
        """Return Triton's options of a launch."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


class Tiles(NamedTuple):
    """One tile for each kernel that loops over pairs."""

    forward: Tile
    key: Tile
    query: Tile
    position: Tile
    table: Tile


# by the largest size of a head
HALF: Dict[int, Tiles] = {
    48: Tiles(Tile(64, 32, 4, 3), Tile(32, 64, 4, 2), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(128, 64, 4, 2)),
    # With 168 registers a thread, three blocks of the forward pass share a processor.
    64: Tiles(
        forward=Tile(64, 64, 4, 3, registers=168),
        key=Tile(32, 64, 4, 2),
        query=Tile(64, 64, 4, 3),
        position=Tile(64, 64, 4, 2),
        table=Tile(128, 64, 4, 2),
    ),
    128: Tiles(Tile(64, 64, 8, 2), Tile(32, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 128, 8, 2), Tile(64, 128, 8, 2)),
}
# float32 multiplies without tensor cores, to stay exact.
SMALL = Tile(32, 32, 4, 1)
SINGLE: Dict[int, Tiles] = {
    64: Tiles(Tile(32, 32, 8, 1), Tile(16, 32, 8, 1), SMALL, SMALL, SMALL),
    128: Tiles(Tile(16, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
}


def tiles_for(size: int, dtype: torch.dtype) -> Tiles:
    """Return the tiles for heads of *size* elements, 128 at most."""
    table = SINGLE if dtype == torch.float32 else HALF
    return next(tiles for largest, tiles in table.items() if size <= largest)
