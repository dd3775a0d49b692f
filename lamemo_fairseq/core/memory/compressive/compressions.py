"""Compressions of the rows that leave the memory, by name (Rae et al. 2020, section 3.2).

Shapes: B streams, G compressed rows, r compression rate, d model width.
"""

from typing import ClassVar, Optional, Type

import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import aligned
from ...kernels.module_tree import is_plain
from ...registry import Registry


class Compression(nn.Module):
    """Base of all compressions; every layer has one of its own."""

    trains: ClassVar[bool] = False  # it has weights
    watches: ClassVar[bool] = False  # it is passed the attention that the rows received

    def __init__(self, rate: int, embed_dim: int):
        super().__init__()
        self.rate = rate

    def forward(self, old: Tensor, usage: Optional[Tensor] = None) -> Tensor:
        """Compress rows.

        Args:
            old: ``[B, G r, d]``, G >= 1, the oldest first.
            usage: ``[B, G r]`` the attention that each received, for those compressions that watch.

        Returns:
            ``[B, G, d]``, the oldest first.
        """
        raise NotImplementedError


COMPRESSIONS: Registry[Type[Compression]] = Registry("--compression")


@COMPRESSIONS.register("mean-pool")
class MeanPooling(Compression):
    """The mean of every r rows."""

    def forward(self, old: Tensor, usage: Optional[Tensor] = None) -> Tensor:
        return _groups(old, self.rate).mean(2)


@COMPRESSIONS.register("max-pool")
class MaxPooling(Compression):
    """The maximum of every r rows, component by component."""

    def forward(self, old: Tensor, usage: Optional[Tensor] = None) -> Tensor:
        return _groups(old, self.rate).amax(2)


@COMPRESSIONS.register("most-used")
class MostUsed(Compression):
    """The G rows that received most attention, in the order in which they stood."""

    watches: ClassVar[bool] = True

    def forward(self, old: Tensor, usage: Optional[Tensor] = None) -> Tensor:
        assert usage is not None
        # A stable sort always orders rows alike that received the same attention, such as none.
        order = usage.argsort(dim=1, descending=True, stable=True)
        chosen = order[:, : old.size(1) // self.rate].sort(dim=1).values
        return old.gather(1, chosen.unsqueeze(-1).expand(-1, -1, old.size(2)))


@COMPRESSIONS.register("conv")
class Convolution(Compression):
    """A convolution whose kernel and stride are r."""

    trains: ClassVar[bool] = True

    def __init__(self, rate: int, embed_dim: int):
        super().__init__(rate, embed_dim)
        self.conv = nn.Conv1d(embed_dim, embed_dim, rate, stride=rate)

    def forward(self, old: Tensor, usage: Optional[Tensor] = None) -> Tensor:
        if not is_plain(self.conv, nn.Conv1d):
            compressed: Tensor = self.conv(old.transpose(1, 2))
            return compressed.transpose(1, 2)
        groups = _groups(old, self.rate).flatten(2)  # groups do not overlap: a product is faster
        return aligned.linear(groups, self.conv.weight.transpose(1, 2).flatten(1), self.conv.bias)


@COMPRESSIONS.register("dilated-conv")
class DilatedConvolution(Compression):
    """Convolutions with kernel 2 and dilations 1, 2, 4, ..., ReLU between them, until an output has seen r rows.

    Every r-th output is kept, the one at the last of its r rows. If r is no power of two, it also sees some rows
    before them. Zeros stand before the first row. (The paper does not say how its own were built.)
    """

    trains: ClassVar[bool] = True

    def __init__(self, rate: int, embed_dim: int):
        super().__init__(rate, embed_dim)
        dilations = [2**i for i in range((rate - 1).bit_length())]
        self.convs = nn.ModuleList(nn.Conv1d(embed_dim, embed_dim, 2, dilation=dilation) for dilation in dilations)

    def forward(self, old: Tensor, usage: Optional[Tensor] = None) -> Tensor:
        x = old.transpose(1, 2)
        for i, conv in enumerate(self.convs):
            x = conv(F.pad(x if i == 0 else x.relu(), (2**i, 0)))
        return x[:, :, self.rate - 1 :: self.rate].transpose(1, 2)


def _groups(rows: Tensor, rate: int) -> Tensor:
    """Return rows ``[B, G r, d]`` as ``[B, G, r, d]``."""
    groups: Tensor = rows.unflatten(1, (-1, rate))
    return groups
