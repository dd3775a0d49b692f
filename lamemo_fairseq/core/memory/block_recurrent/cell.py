"""The recurrent cell of a layer: states that attend to themselves and to a window of tokens, and the gates between.

Shapes: B streams, S states, K tokens of a window and before it, H heads, D size of a head, D' its padded size,
d model width.
"""

import math
from typing import Dict, List, NamedTuple, Optional, Tuple, Type

import torch
from torch import Tensor, nn

from ...kernels.unit import unit
from ...layers import AttentionConfig
from ...layers.heads import mapped_from_heads, mapped_to_heads
from ..base import MemoryConfig
from .attention import KeyValues, length_of, read
from .options import FIXED, LSTM, BlockRecurrentOptions

EPS = 1e-6  # added to the mean square


class StateHeads(NamedTuple):
    """The states before a window, projected."""

    own_queries: Tensor  # [B, H, S, D or D'], for the states
    token_queries: Tensor  # [B, H, S, D or D'], for the tokens
    key_values: KeyValues  # [B, H, S, D or D'], for states and tokens alike


class RecurrentCell(nn.Module):
    """S states of a layer, the learned states that a text begins with, and their update, without a feed-forward layer.

    It is the paper's "skip" configuration (Hutchins et al. 2022, section 3).
    """

    def __init__(self, config: MemoryConfig[BlockRecurrentOptions]):
        super().__init__()
        options, width, d = config.options, config.heads * config.head_dim, config.embed_dim
        self.heads, self.head_dim, self.scale = config.heads, config.head_dim, 1 / math.sqrt(config.head_dim)
        self.first_states = nn.Parameter(torch.empty(options.recurrent_states, d))
        self.identities = nn.Parameter(torch.empty(options.recurrent_states, d))
        self.norm_gain = nn.Parameter(torch.ones(d))
        self.proj = nn.Linear(d, 4 * width, bias=False)
        self.own_scale = nn.Parameter(torch.full((config.heads,), options.recurrent_scale))
        self.token_scale = nn.Parameter(torch.full((config.heads,), options.recurrent_scale))
        self.gate = GATES[options.state_gate](2 * width, d, config.head_dim)

    def reset_parameters(self) -> None:
        """Draw first states N(0, .1), identities N(0, 1) and the biases of gates N(0, .1)."""
        nn.init.normal_(self.first_states, std=0.1)
        nn.init.normal_(self.identities)
        self.gate.reset_parameters()

    def begin(self, states: Tensor) -> Tensor:
        """Return ``states [B, S, d]`` as they are, and the learned first states for ``[B, 0, d]``."""
        return states if states.size(1) > 0 else self.first_states.to(states.dtype).expand(states.size(0), -1, -1)

    def project(self, states: Tensor, like: Tensor, keep_padding: bool = False) -> StateHeads:
        """Project ``rms(states) + identity`` of ``states [B, S, d]`` into heads, in the dtype of *like*.

        With *keep_padding* they may be padded.
        """
        with torch.autocast(states.device.type, enabled=False):
            mean_square = states.square().mean(-1, keepdim=True)
            rows = states * (mean_square + EPS).rsqrt() * self.norm_gain.to(states) + self.identities.to(states)
        q, token_q, k, v = mapped_to_heads(self.proj, rows.to(like.dtype), 4, self.heads, self.head_dim, keep_padding)
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
        windows, before, factors = [], seen.keys.size(2) - like.size(1), self.factors()
        for start in range(0, like.size(1), period):
            heads, stop = self.project(states, like, keep_padding=True), min(start + period, like.size(1))
            windows.append((slice(start, stop), heads.key_values))
            reached = slice(max(0, before + start - config.mem_len), before + stop)
            tokens = KeyValues(*(t[:, :, reached] for t in seen))
            states = self.update(states, heads, tokens, config.backend, factors)
        return windows, states

    def factors(self) -> Tuple[Tensor, Tensor]:
        """Return the lengths of queries for states and tokens: ``[H]``, in float32 or wider."""
        return length_of(self.own_scale, self.scale), length_of(self.token_scale, self.scale)

    def update(
        self,
        states: Tensor,
        heads: StateHeads,
        tokens: KeyValues,
        backend: str,
        factors: Optional[Tuple[Tensor, Tensor]] = None,
    ) -> Tensor:
        """Read all tokens of a window, and return the states after it.

        Args:
            states: ``[B, S, d]`` before the window.
            heads: of these states.
            tokens: ``[B, H, K, D or D']`` of the window and of the rows before it.
            backend: of the attention.
            factors: `factors`, if there are several windows.
        """
        of_own, of_tokens = factors or self.factors()
        own = read(backend, heads.own_queries, of_own, heads.key_values, self.scale)
        crossed = read(backend, heads.token_queries, of_tokens, tokens, self.scale)[..., : own.size(-1)]
        updated: Tensor = self.gate(states, torch.cat([own, crossed], dim=1))
        return updated


class Gate(nn.Module):
    """Base of both gates; h are the states' read-outs ``[B, 2 H, S, D or D']``, of a state 2 H D numbers."""

    def __init__(self, width: int, embed_dim: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.value = nn.Linear(width, embed_dim)

    def reset_parameters(self) -> None:
        raise NotImplementedError

    def forward(self, states: Tensor, h: Tensor) -> Tensor:
        """Return the next states ``[B, S, d]``, in the dtype of *states*."""
        raise NotImplementedError


class FixedGate(Gate):
    """``c' = c g + z (1 - g)`` with ``z = W_z h + b_z`` and ``g = sigmoid(b_g)``."""

    def __init__(self, width: int, embed_dim: int, head_dim: int):
        super().__init__(width, embed_dim, head_dim)
        self.bias = nn.Parameter(torch.empty(embed_dim))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.bias, std=0.1)

    def forward(self, states: Tensor, h: Tensor) -> Tensor:
        z = mapped_from_heads(self.value, h, self.head_dim).to(states.dtype)
        return torch.lerp(z, states, self.bias.to(states.dtype).sigmoid())


class LstmGate(Gate):
    """``c' = c f + z i`` with ``z = tanh(W_z h + b_z)`` and gates ``sigmoid(W h + b)``, -1 inside i and +1 inside f.

    The gates see h alone, not the states.
    """

    def __init__(self, width: int, embed_dim: int, head_dim: int):
        super().__init__(width, embed_dim, head_dim)
        self.input, self.forget = nn.Linear(width, embed_dim), nn.Linear(width, embed_dim)

    def reset_parameters(self) -> None:
        for gate in (self.input, self.forget):
            nn.init.normal_(gate.bias, std=0.1)

    def forward(self, states: Tensor, h: Tensor) -> Tensor:
        layers = self.value, self.input, self.forget
        z, i, f = (mapped_from_heads(layer, h, self.head_dim).to(states.dtype) for layer in layers)
        return states * (f + 1).sigmoid() + z.tanh() * (i - 1).sigmoid()


GATES: Dict[str, Type[Gate]] = {FIXED: FixedGate, LSTM: LstmGate}
