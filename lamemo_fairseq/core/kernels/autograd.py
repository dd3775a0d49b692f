"""Types for autograd functions."""

from typing import Tuple

from torch import Tensor
from torch.autograd.function import FunctionCtx


class Context(FunctionCtx):
    """Notes from a forward to its backward pass. A function that notes more than tensors declares it in a subclass."""

    saved_tensors: Tuple[Tensor, ...]
    needs_input_grad: Tuple[bool, ...]
