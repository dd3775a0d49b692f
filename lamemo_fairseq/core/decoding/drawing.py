"""The choice of the next word: temperature, penalties, top words, a draw.

Shapes: B sequences, V words.
"""

import math
from dataclasses import dataclass
from typing import Optional, Tuple

import torch
from torch import Tensor

LEAST_TEMPERATURE = 1e-30


def truncated(log_probs: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tuple[Tensor, Optional[Tensor]]:
    """Keep the top words' ``log_probs [B, V]``, as `draw` does.

    Returns:
        Log-probabilities ``[B, n]``, -inf for words that are left out, and the words' ids; None for ids 0 to V-1.
    """
    words = None
    if top_k > 0:
        log_probs, words = log_probs.topk(min(top_k, log_probs.size(-1)), dim=-1)
    if top_p < 1:
        if words is None:
            log_probs, words = log_probs.sort(dim=-1, descending=True)
        cumulative = log_probs.exp().cumsum(-1)
        log_probs[:, 1:].masked_fill_(cumulative[:, :-1] >= top_p, -math.inf)
    return log_probs, words


def draw(log_probs: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Draw a word a sequence from ``log_probs [B, V]``: ``[B]``.

    Args:
        log_probs: where their probabilities do not add up to 1, words are drawn in proportion.
        temperature: 0 takes the most probable word.
        top_k: draw from the k most probable words only (0: from all).
        top_p: draw from the fewest words whose probabilities add up to this (1: from all).
    """
    if temperature == 0:
        return log_probs.argmax(-1)
    if temperature != 1:
        log_probs = (log_probs / temperature).log_softmax(-1)
    log_probs, words = truncated(log_probs, top_k, top_p)
    # The word whose exponential clock rings first; unlike torch.multinomial it never waits for the host.
    drawn = (log_probs - torch.empty_like(log_probs).exponential_().log_()).argmax(-1)
    return drawn if words is None else words.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class Draw:
    """`draw` with its options; on a GPU the step's last kernel can do it.

    Raises:
        ValueError: an option is out of its range. Below the least temperature float32 overflows, and any word is drawn.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        warm = self.temperature == 0 or self.temperature >= LEAST_TEMPERATURE
        wrong = {
            "temperature": (warm, f"0 for the most probable word, or {LEAST_TEMPERATURE:g} and more"),
            "top_k": (self.top_k >= 0, "0 for all words, or how many"),
            "top_p": (0 < self.top_p <= 1, "above 0, and 1 at most"),
        }
        for name, (fine, remedy) in wrong.items():
            if not fine:
                raise ValueError(f"{name} is {getattr(self, name)}: pass {remedy}")

    def __call__(self, log_probs: Tensor) -> Tensor:
        return draw(log_probs, self.temperature, self.top_k, self.top_p)


class Adjustment:
    """A change of log-probabilities ``[B, V]``, made before a word is drawn and its log-probability is recorded.

    Args:
        temperature: log-probabilities are divided by it and normalised again.
        added: ``[V]``, added to them afterwards. It may change in place from step to step.
    """

    def __init__(self, temperature: float = 1.0, added: Optional[Tensor] = None):
        self.temperature, self.added = temperature, added

    def __call__(self, log_probs: Tensor) -> Tensor:
        if self.temperature != 1:
            log_probs = (log_probs / self.temperature).log_softmax(-1)
        return log_probs if self.added is None else log_probs + self.added

    def copy_(self, other: "Adjustment") -> None:
        """Copy the numbers that *other* adds, into the same tensor."""
        if self.added is not None and other.added is not None:
            self.added.copy_(other.added)
