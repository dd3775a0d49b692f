"""The losses that a memory is trained by, added to the loss of any criterion."""

from typing import Any, Dict, Tuple

from torch import Tensor, nn

PREFIX = "memory_"  # of their names in the log


class WithMemoryLosses:
    """A criterion plus the losses that the model's memory returned in the same forward pass.

    They are means over tokens, so that they weigh as much as the criterion's own loss on every token.
    ``--update-freq``, ``--sentence-avg`` and the number of ranks do not change this weight.
    """

    def __init__(self, criterion: Any):
        self.criterion = criterion

    def __call__(self, model: nn.Module, sample: Dict[str, Any], **kwargs: Any) -> Tuple[Tensor, Any, Dict[str, Any]]:
        """Return as the criterion does: the summed loss, the number to divide it by, and the values to log."""
        outputs = []
        # A hook sees the output of any data-parallel wrapper, in the call of any criterion.
        handle = model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        try:
            loss, sample_size, logged = self.criterion(model, sample, **kwargs)
        finally:
            handle.remove()
        for name, value in (outputs[-1][1] or {}).items():
            loss = loss + value * sample["ntokens"]
            logged[PREFIX + name] = value.detach() * sample["ntokens"]
        return loss, sample_size, logged
