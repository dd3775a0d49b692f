"""The compressive memory's own options."""

# No postponed annotations: a host reads the types of the fields.
import math
from dataclasses import dataclass

from ...fields import option
from ..base import MemoryOptions
from .compressions import COMPRESSIONS
from .losses import LOSSES


@dataclass(frozen=True)
class CompressiveOptions(MemoryOptions):
    compressed_len: int = option(75, "compressed slots C a layer, in addition to its --mem-len other slots")
    compression_rate: int = option(3, "rows r that become one compressed slot", fixed=True)
    compression: str = option("conv", "how rows that leave the memory are compressed", COMPRESSIONS.names(), fixed=True)
    compression_loss: str = option(
        "attention-reconstruction",
        "loss that trains a compression with weights; other compressions have no loss",
        LOSSES.names(),
    )
    compression_loss_weight: float = option(
        1.0, "factor of --compression-loss, a mean over tokens, components and layers"
    )

    def check(self) -> None:
        compression = COMPRESSIONS[self.compression]
        loss = LOSSES[self.compression_loss]
        if self.compressed_len < 0:
            raise ValueError(f"--compressed-len is {self.compressed_len}, it must be positive, or 0 for no such slots")
        if self.compression_rate < 2:
            raise ValueError(
                f"--compression-rate is {self.compression_rate}, it must be at least 2: "
                "for a memory that is not compressed, pass --memory recurrent"
            )
        if not 0 < self.compression_loss_weight < math.inf:
            raise ValueError(f"--compression-loss-weight is {self.compression_loss_weight}, it must be positive")
        if compression.trains and not loss.trains:
            trained = ", ".join(name for name in LOSSES.names() if LOSSES[name].trains)
            raise ValueError(
                f"--compression {self.compression} has weights, which --compression-loss {self.compression_loss} never "
                f"trains, nor does the language model's loss: pass one of {trained}"
            )
