"""The recurrent cell of a layer: states that attend to themselves and to a window of tokens, and the gates between.

Shapes: B streams, S states, K tokens of a window and before it, H heads, D size of a head, D' its padded size,
d model width.
"""

from typing import Dict, List, NamedTuple, Tuple, Type

import torch
from torch import Tensor, nn

from ...kernels import aligned
from ...kernels.unit import unit
from ...layers import AttentionConfig
from ...layers.heads import split_heads
from ..base import MemoryConfig
from .attention import KeyValues, read
from .options import FIXED, LSTM, BlockRecurrentOptions

EPS = 1e-6  # added to the mean square


class StateHeads(NamedTuple):
    """The states before a window, projected."""

    own_queries: Tensor  # [B, H, S, D], for the states
    token_queries: Tensor  # [B, H, S, D], for the tokens
    key_values: KeyValues  # [B, H, S, D], for states and tokens alike


class RecurrentCell(nn.Module):
    """S states of a layer, the learned states that a text begins with, and their update, without a feed-forward layer.

    It is the paper's "skip" configuration (Hutchins et al. 2022, section 3).
    """

    def __init__(self, config: MemoryConfig[BlockRecurrentOptions]):
        super().__init__()
        options, width, d = config.options, config.heads * config.head_dim, config.embed_dim
        self.heads = config.heads
        self.first_states = nn.Parameter(torch.empty(options.recurrent_states, d))
        self.identities = nn.Parameter(torch.empty(options.recurrent_states, d))
        self.norm_gain = nn.Parameter(torch.ones(d))
        self.proj = nn.Linear(d, 4 * width, bias=False)
        self.own_scale = nn.Parameter(torch.full((config.heads,), options.recurrent_scale))
        self.token_scale = nn.Parameter(torch.full((config.heads,), options.recurrent_scale))
        self.gate = GATES[str(options.state_gate)](2 * width, d)

    def reset_parameters(self) -> None:
        """Draw first states N(0, .1), identities N(0, 1) and the biases of gates N(0, .1)."""
        nn.init.normal_(self.first_states, std=0.1)
        nn.init.normal_(self.identities)
        self.gate.reset_parameters()

    def begin(self, states: Tensor) -> Tensor:
        """Return ``states [B, S, d]`` as they are, and the learned first states for ``[B, 0, d]``."""
        return states if states.size(1) > 0 else self.first_states.to(states.dtype).expand(states.size(0), -1, -1)

    def project(self, states: Tensor, like: Tensor) -> StateHeads:
        """Project ``rms(states) + identity`` of ``states [B, S, d]`` into heads, in the dtype of *like*."""
        with torch.autocast(states.device.type, enabled=False):
            mean_square = states.square().mean(-1, keepdim=True)
            rows = states * (mean_square + EPS).rsqrt() * self.norm_gain.to(states) + self.identities.to(states)
        q, token_q, k, v = split_heads(aligned.mapped(self.proj, rows.to(like.dtype)), 4, self.heads)
        return StateHeads(q, token_q, KeyValues(unit(k), v))

    def pass_windows(
        self, states: Tensor, like: Tensor, period: int, config: AttentionConfig, seen: KeyValues
    ) -> Tuple[List[Tuple[slice, KeyValues]], Tensor]:
        """Update ``states [B, S, d]`` by the windows of *period* tokens, in turn.

        Args:
            like: the rows ``[B, N, d]`` of all windows' tokens.
            config: of the layer's attention.
            seen: ``[B, H, m + N, D or D']``, keys and values of these tokens and of those before them.

        Returns:
            Each window, with the keys and values of the states before it, and the states after the last window.
        """
        windows, before = [], seen.keys.size(2) - like.size(1)
        for start in range(0, like.size(1), period):
            heads, stop = self.project(states, like), min(start + period, like.size(1))
            windows.append((slice(start, stop), heads.key_values))
            reached = slice(max(0, before + start - config.mem_len), before + stop)
            states = self.update(states, heads, KeyValues(*(t[:, :, reached] for t in seen)), config.backend)
        return windows, states

    def update(self, states: Tensor, heads: StateHeads, tokens: KeyValues, backend: str) -> Tensor:
        """Read all tokens of a window, and return the states after it.

        Args:
            states: ``[B, S, d]`` before the window.
            heads: of these states.
            tokens: ``[B, H, K, D or D']`` of the window and of the rows before it.
            backend: of the attention.
        """
        own = read(backend, heads.own_queries, self.own_scale, heads.key_values)
        crossed = read(backend, heads.token_queries, self.token_scale, tokens)[..., : own.size(-1)]
        attended = torch.cat([own, crossed], dim=1).transpose(1, 2).flatten(2)
        updated: Tensor = self.gate(states, attended)
        return updated


class Gate(nn.Module):
    """Base of both gates; ``h [B, S, 2 H D]`` are the states' read-outs."""

    def __init__(self, width: int, embed_dim: int):
        super().__init__()
        self.value = nn.Linear(width, embed_dim)

    def reset_parameters(self) -> None:
        raise NotImplementedError

    def forward(self, states: Tensor, h: Tensor) -> Tensor:
        """Return the next states ``[B, S, d]``, in the dtype of *states*."""
        raise NotImplementedError


class FixedGate(Gate):
    """``c' = c g + z (1 - g)`` with ``z = W_z h + b_z`` and ``g = sigmoid(b_g)``."""

    def __init__(self, width: int, embed_dim: int):
        super().__init__(width, embed_dim)
        self.bias = nn.Parameter(torch.empty(embed_dim))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.bias, std=0.1)

    def forward(self, states: Tensor, h: Tensor) -> Tensor:
        z = aligned.mapped(self.value, h).to(states.dtype)
        return torch.lerp(z, states, self.bias.to(states.dtype).sigmoid())


class LstmGate(Gate):
    """``c' = c f + z i`` with ``z = tanh(W_z h + b_z)`` and gates ``sigmoid(W h + b)``, -1 inside i and +1 inside f.

    The gates see h alone, not the states.
    """

    def __init__(self, width: int, embed_dim: int):
        super().__init__(width, embed_dim)
        self.input, self.forget = nn.Linear(width, embed_dim), nn.Linear(width, embed_dim)

    def reset_parameters(self) -> None:
        for gate in (self.input, self.forget):
            nn.init.normal_(gate.bias, std=0.1)

    def forward(self, states: Tensor, h: Tensor) -> Tensor:
        z, i, f = (aligned.mapped(layer, h).to(states.dtype) for layer in (self.value, self.input, self.forget))
        return states * (f + 1).sigmoid() + z.tanh() * (i - 1).sigmoid()


GATES: Dict[str, Type[Gate]] = {FIXED: FixedGate, LSTM: LstmGate}
