"""The infinity-former's unbounded memory (Martins, Marinho, Martins 2022, arXiv 2109.00301).

The short-term memory is Transformer-XL's, of M slots. Behind it every layer has a long-term one: all rows that ever
left the slots, as one continuous signal of fixed size (`signal.py`). Queries attend to it with a Gaussian density
(`attention.py`). The paper leaves some choices open, and its authors' code (deep-spin/infinite-former on GitHub)
differs:

- The rows that leave the slots enter the long-term memory before the layer's norm, as in the authors' Transformer-XL
  (``sorting/``). With ``--mem-len 0`` every segment's rows enter the long-term memory when the segment ends, as in
  their GPT-2. A signal holds no gradient; the first rows fill [0, 1].
- Queries are the short-term attention's, without its biases. W_k, W_v, w_mu, w_sigma and an output projection are a
  layer's own; w_mu and w_sigma are shared by its heads and have no bias. Both of the authors' configurations do so.
- Rows and samples stand in the middles of equal parts of their interval, as in the authors' first fit. The paper's
  t = i / L is half a part later.
- The zeros that they fit beyond [0, 1] are left out. So is the convolutional gate on the rows, an option that both of
  their configurations switch on: it would need a gradient through the signal.
- Sticky samples are quantiles, not draws (`sampling.py`).
- The KL term is the mean over layers, heads and tokens, and is 0 before there is a signal.

Shapes: B streams, N current tokens, m <= M memory slots, J basis functions, d model width.
"""

from dataclasses import dataclass
from typing import ClassVar, Dict, List, Optional, Sequence, Tuple, Type

import torch
from torch import Tensor

from ...decoding.cache import AnyCache
from ...kernels.padded import join
from ...layers import DecoderLayer, SelfAttention
from ..base import (
    MEMORIES,
    Architecture,
    LayerPassage,
    LayerState,
    Memory,
    MemoryConfig,
    MemoryState,
    Segment,
    last_rows,
)
from .attention import ContinuousSelfAttention, divergence
from .cache import ContinuousCache
from .options import ContinuousOptions
from .sampling import Density
from .signal import Signal


@dataclass(frozen=True)
class ContinuousState(MemoryState):
    """The last inputs of each layer, and the signal of all earlier inputs."""

    hidden: Tuple[Tensor, ...]  # a layer: [B, m, d]
    coefficients: Tuple[Tensor, ...]  # a layer: [B, J, d], float32 or wider; zeros before there is a signal
    taken_in: Tensor  # [B, 1] int64, rows that the signals are made of


@MEMORIES.register("continuous")
class ContinuousMemory(Memory[ContinuousState, ContinuousOptions]):
    """Segment-level recurrence, and a signal for the rows that it drops."""

    architecture: ClassVar[Architecture] = Architecture(
        name="infinity_former_lm",
        class_name="InfinityFormerLanguageModel",
        summary="infinity-former: unbounded continuous memory behind Transformer-XL's (Martins et al. 2022).",
        defaults={"position_encoding": "transformer-xl"},
        # The paper's sizes are not known: slots and basis functions are together as many as Transformer-XL's slots.
        presets={
            "wt103": {"mem_len": 74, "num_basis_functions": 76},
            "enwik8": {"mem_len": 256, "num_basis_functions": 256},
            "text8": {"mem_len": 256, "num_basis_functions": 256},
        },
    )
    options: ClassVar[Type[ContinuousOptions]] = ContinuousOptions
    attention: ClassVar[Type[SelfAttention]] = ContinuousSelfAttention
    state: ClassVar[Type[MemoryState]] = ContinuousState
    cache: ClassVar[Type[AnyCache]] = ContinuousCache
    smallest_mem_len: ClassVar[int] = 0
    has_losses: ClassVar[bool] = True
    layout: ClassVar[Tuple[str, ...]] = ("num_basis_functions", "basis_widths")

    def __init__(self, config: MemoryConfig[ContinuousOptions]):
        super().__init__(config)
        options = config.options
        self.signal = Signal(
            basis=options.basis(),
            penalty=options.ridge_penalty,
            contraction=options.contraction_factor,
            samples=options.memory_samples,
            sampling=options.memory_sampling,
        )
        growth = self.signal.growth(config.segment_length)
        if growth >= 1:
            raise ValueError(
                f"a continuous memory with these options would grow {growth:.3g} times a segment: pass a "
                f"--ridge-penalty above {options.ridge_penalty:g}, or other --memory-samples than "
                f"{options.memory_samples} with --num-basis-functions {options.num_basis_functions}"
            )

    def initial_state(self, x: Tensor) -> ContinuousState:
        batch, width, layers = x.size(0), x.size(2), self.config.layers
        exact = torch.promote_types(x.dtype, torch.float32)
        return ContinuousState(
            hidden=(x.new_empty(batch, 0, width),) * layers,
            coefficients=(x.new_zeros(batch, self.signal.basis.count, width, dtype=exact),) * layers,
            taken_in=torch.zeros(batch, 1, dtype=torch.int64, device=x.device),
        )

    def leaving(self, slots: int, current: int) -> int:
        """Return how many of *slots* and *current* rows leave the short-term memory when the segment ends."""
        return max(0, slots + current - self.slots)

    def reach(self, state: ContinuousState, current: int) -> Tuple[int, Optional[range]]:
        return state.hidden[0].size(1) + current, None

    def pass_layer(
        self, n: int, layer: DecoderLayer, rows: Tensor, before: LayerState, segment: Segment
    ) -> LayerPassage:
        past, signal, taken_in = before
        joined = join(past.to(rows), rows)
        leaving = self.leaving(past.size(1), segment.tokens)
        hidden = last_rows(joined, self.config.mem_len)
        out, density = layer(joined, segment.biases[n], segment.tokens, signal)
        coefficients = self.signal.extend(signal, taken_in, joined[:, :leaving], density)
        return LayerPassage(out, (hidden, coefficients, taken_in + leaving), density)

    def losses_of(
        self, asides: Sequence[Tuple[Tensor, ...]], before: ContinuousState, lengths: Optional[Tensor]
    ) -> Dict[str, Tensor]:
        return {"kl": self._kl([Density(*aside) for aside in asides], before.taken_in, lengths)}

    def _kl(self, densities: List[Density], taken_in: Tensor, lengths: Optional[Tensor]) -> Tensor:
        """Return the weighted mean divergence of all layers, heads and tokens, those without a signal counting 0."""
        sigma = self.config.options.kl_sigma
        by_token = torch.stack([divergence(density, sigma).mean(1) for density in densities]).mean(0)  # [B, N]
        tokens = by_token.size(1)
        real = torch.ones_like(by_token)
        if lengths is not None:
            real = (torch.arange(tokens, device=lengths.device) < lengths.unsqueeze(1)).to(by_token)
        total = (by_token * real * (taken_in > 0)).sum()
        return self.config.options.kl_weight * total / real.sum().clamp(min=1)
