"""Replace fairseq's Adam by PyTorch's fused kernel: one pass over memory in place of ten.

Where apex is installed, fairseq takes apex's in its place.
"""

import math
from collections import defaultdict
from typing import Any, Callable, DefaultDict, Dict, List, Optional, Tuple

import torch
from fairseq.optim.adam import Adam
from torch import Tensor
from torch.optim.adamw import adamw


class FusedAdam(Adam):
    """Adam, with the parameter groups and the state of fairseq's."""

    def step(self, closure: Optional[Callable[[], Any]] = None) -> Any:
        """Update once, by fairseq's own Adam where the kernel cannot: half precision, amsgrad, sparse gradients."""
        if not self.serves():
            return super().step(closure)
        loss = None if closure is None else closure()
        self.begin_step()()
        return loss

    def serves(self) -> bool:
        """Return whether the kernel can update the parameters that have gradients."""
        return all(_serves(group) for group in self.param_groups)

    def begin_step(self, skip: Optional[Tensor] = None) -> Callable[[], None]:
        """Give the device an update where the kernel can compute it.

        Args:
            skip: float32 scalar beside the parameters; if it is not 0, parameters and moments do not change.

        Returns:
            A function that counts the update, to be called if the update was not skipped.
        """
        counted: List[Tuple[Dict[str, Any], int]] = []
        for group in self.param_groups:
            # Parameters with the same number of updates go together; a parameter without gradients for a while has
            # fewer.
            by_step: DefaultDict[int, List[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_step[self._state_of(p)["step"]].append(p)
            for done, params in by_step.items():
                self._update(group, params, done, skip)
                counted += [(self.state[p], done + 1) for p in params]

        def count() -> None:
            for state, done in counted:
                state["step"] = done

        return count

    def _state_of(self, p: Tensor) -> Dict[str, Any]:
        """Return the moments and the number of updates, named as fairseq names them, beside the parameter."""
        state: Dict[str, Any] = self.state[p]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].to(p)
        return state

    @torch.no_grad()
    def _update(self, group: Dict[str, Any], params: List[Tensor], done: int, skip: Optional[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        states = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [torch.full((), float(done), device=p.device) for p in params],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            # fairseq adds eps before it corrects the bias of the second moment, PyTorch after.
            eps=group["eps"] / math.sqrt(1 - beta2 ** (done + 1)),
            maximize=False,
            found_inf=skip,
        )


def _serves(group: Dict[str, Any]) -> bool:
    given = [p for p in group["params"] if p.grad is not None]
    return not group.get("amsgrad", False) and all(
        p.dtype == p.grad.dtype in (torch.float32, torch.float64)
        and p.device.type in ("cpu", "cuda")
        and not p.grad.is_sparse
        for p in given
    )
