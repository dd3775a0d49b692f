"""fairseq's Adam by PyTorch's fused kernel, which reads and writes everything once; fairseq's own does so ten times.

Where apex is installed, fairseq takes apex's in its place.
"""

import math
from collections import defaultdict
from typing import Any, Callable, DefaultDict, Dict, List, Optional, Tuple

import torch
from fairseq.optim.adam import Adam
from torch import Tensor
from torch.optim.adamw import adamw

from .stand_in import stand_in


@stand_in(Adam, "step")
def step(original: Callable[..., Any], optimizer: Any, closure: Optional[Callable[[], Any]] = None) -> Any:
    """One update, with fairseq's own where the kernel does not serve: half precision, amsgrad, sparse gradients."""
    if not serves(optimizer):
        return original(optimizer, closure)
    loss = None if closure is None else closure()
    begin_step(optimizer)()
    return loss


def serves(optimizer: Adam) -> bool:
    """Whether the kernel can update the parameters that have gradients."""
    return all(_serves(group) for group in optimizer.param_groups)


def begin_step(optimizer: Adam, skip: Optional[Tensor] = None) -> Callable[[], None]:
    """Give the device an update where the kernel serves.

    Args:
        skip: float32 scalar beside the parameters: if it is not 0, parameters and moments stay as they are.

    Returns:
        A function that counts the update, to be called if it was not skipped.
    """
    counted: List[Tuple[Dict[str, Any], int]] = []
    for group in optimizer.param_groups:
        # Parameters that have had as many updates go together; one that had no gradient for a while has had fewer.
        by_step: DefaultDict[int, List[Tensor]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                by_step[_state(optimizer, p)["step"]].append(p)
        for done, params in by_step.items():
            _update(optimizer, group, params, done, skip)
            counted += [(optimizer.state[p], done + 1) for p in params]

    def count() -> None:
        for state, done in counted:
            state["step"] = done

    return count


def _serves(group: Dict[str, Any]) -> bool:
    given = [p for p in group["params"] if p.grad is not None]
    return not group.get("amsgrad", False) and all(
        p.dtype == p.grad.dtype in (torch.float32, torch.float64)
        and p.device.type in ("cpu", "cuda")
        and not p.grad.is_sparse
        for p in given
    )


def _state(optimizer: Adam, p: Tensor) -> Dict[str, Any]:
    """The moments and the number of updates, named as fairseq names them and where the parameter is."""
    state = optimizer.state[p]
    if not state:
        state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = state[name].to(p)
    return state


@torch.no_grad()
def _update(
    optimizer: Adam, group: Dict[str, Any], params: List[Tensor], done: int, skip: Optional[Tensor] = None
) -> None:
    beta1, beta2 = group["betas"]
    states = [optimizer.state[p] for p in params]
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
