"""Activations of the feed-forward layers, by fairseq's names."""

import math
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import Registry

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: Registry[Activation] = Registry("--activation-fn")
ACTIVATIONS.register("relu")(F.relu)
ACTIVATIONS.register("tanh")(torch.tanh)


@ACTIVATIONS.register("gelu")
def gelu(x: Tensor) -> Tensor:
    """Return the exact GELU, computed in float32 (Hendrycks and Gimpel 2016)."""
    return F.gelu(x.float()).type_as(x)


@ACTIVATIONS.register("gelu_accurate")
def gelu_accurate(x: Tensor) -> Tensor:
    """Return the GELU by its approximation with a tanh (Hendrycks and Gimpel 2016, section 2)."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


@ACTIVATIONS.register("linear")
def linear(x: Tensor) -> Tensor:
    """Return ``x``."""
    return x


ACTIVATIONS.register("gelu_fast")(gelu_accurate)  # its former name
