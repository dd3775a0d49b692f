"""Types for autograd functions."""

from typing import TYPE_CHECKING, Any, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


class Context(FunctionCtx):
    """Values that a forward pass saves for its backward pass.

    A function that saves more than tensors declares it in a subclass.
    """

    saved_tensors: Tuple[Tensor, ...]
    needs_input_grad: Tuple[bool, ...]

    if TYPE_CHECKING:

        def save_for_backward(self, *tensors: Optional[Tensor]) -> None:
            """Save tensors; PyTorch allows None among them."""


class Function(torch.autograd.Function):
    """An autograd function whose `apply` has a type."""

    if TYPE_CHECKING:

        @classmethod
        def apply(cls, *inputs: object) -> Any:
            """Return the result of `forward`; the caller annotates it."""
