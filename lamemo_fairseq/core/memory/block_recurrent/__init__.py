"""Block-Recurrent Transformers (Hutchins et al. 2022, arXiv 2203.07852): states of a layer, updated by windows.

All layers attend within a sliding window: a token sees the M tokens before it, whose keys and values are kept. One
layer has S states as well. The tokens of a window read the states from before the window. Then the states read
themselves, all tokens of the window and the M rows before it, without a mask. A gate makes the next states. A text
begins with learned states.

Windows are segments: with ``bptt_segments`` k, the tokens of an update are k windows. Gradient flows through states,
keys and values from one to the next, and stops at the update's end.

examples/block_recurrent_transformer_lm/README.md says where this differs from the paper and from public code.

Shapes: B streams, N tokens of an update of k windows, n <= N / k tokens of a window, m <= M tokens before it, S states,
H heads, D size of a head, d model width.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, List, Optional, Sequence, Tuple, Type, cast

import torch
from torch import Tensor, nn

from ...decoding.cache import AnyCache
from ...layers import DecoderLayer, SelfAttention
from ...positions import Positions
from ..base import (
    MEMORIES,
    Architecture,
    LayerPassage,
    LayerState,
    Memory,
    MemoryConfig,
    MemoryState,
    Passage,
    Segment,
)
from ..unread import with_unread
from .attention import KeyValues, RecurrentSelfAttention, WindowSelfAttention
from .cache import BlockRecurrentCache
from .cell import RecurrentCell
from .options import BlockRecurrentOptions

# Two windows an update, so that writing is trained; a state for each token of a window, as in the paper.
_CHARACTERS = {"bptt_segments": 2, "preset_tokens_per_sample": 1024, "recurrent_states": 512}


@dataclass(frozen=True)
class BlockRecurrentState(MemoryState):
    """Keys and values of the last tokens, and the states of recurrent layers, of which there are none at first."""

    keys: Tuple[Tensor, ...]  # a layer: [B, H, m, D], of length 1
    values: Tuple[Tensor, ...]  # a layer: [B, H, m, D]
    states: Tuple[Tensor, ...]  # a recurrent layer: [B, S or 0, d], float32 or wider


@MEMORIES.register("block-recurrent")
class BlockRecurrentMemory(Memory[BlockRecurrentState, BlockRecurrentOptions]):
    """A sliding window in all layers, and states in some.

    With ``bptt_segments`` 1, only later updates read the values that a window has written, as constants.
    Writing is then not trained.
    """

    architecture: ClassVar[Architecture] = Architecture(
        name="block_recurrent_transformer_lm",
        class_name="BlockRecurrentTransformerLanguageModel",
        summary="Block-Recurrent Transformer: states of a layer, updated window by window (Hutchins et al. 2022).",
        defaults={"position_encoding": "t5", "bptt_segments": 2},
        presets={
            "wt103": {"bptt_segments": 2, "preset_tokens_per_sample": 300, "recurrent_states": 150},
            "enwik8": _CHARACTERS,
            "text8": _CHARACTERS,
        },
    )
    options: ClassVar[Type[BlockRecurrentOptions]] = BlockRecurrentOptions
    state: ClassVar[Type[MemoryState]] = BlockRecurrentState
    cache: ClassVar[Type[AnyCache]] = BlockRecurrentCache
    layout: ClassVar[Tuple[str, ...]] = ("recurrent_states", "recurrent_layers")
    carries_gradient: ClassVar[bool] = True
    # Half the launches. More windows would widen the tables of position scores, of which a band is visible.
    segments_at_once: ClassVar[int] = 2

    def __init__(self, config: MemoryConfig[BlockRecurrentOptions]):
        super().__init__(config)
        self.recurrent = config.options.layers_of(config.layers)
        self.cells = nn.ModuleList(RecurrentCell(config) for _ in self.recurrent)

    @property
    def score_scale(self) -> float:
        return self.config.options.recurrent_scale

    def attention_of(self, layer: int) -> Type[SelfAttention]:
        return RecurrentSelfAttention if layer in self.recurrent else WindowSelfAttention

    def reset_parameters(self) -> None:
        for cell in self.cells:
            cast(RecurrentCell, cell).reset_parameters()

    def cell(self, layer: int) -> Optional[RecurrentCell]:
        """Return the cell of a layer, counted from 0; None unless it is recurrent."""
        return cast(RecurrentCell, self.cells[self.recurrent.index(layer)]) if layer in self.recurrent else None

    def initial_state(self, x: Tensor) -> BlockRecurrentState:
        config, batch = self.config, x.size(0)
        nothing = (x.new_empty(batch, config.heads, 0, config.head_dim),) * config.layers
        no_states = x.new_empty(batch, 0, x.size(2), dtype=torch.promote_types(x.dtype, torch.float32))
        return BlockRecurrentState(nothing, nothing, (no_states,) * len(self.cells))

    def forward(
        self,
        x: Tensor,
        state: BlockRecurrentState,
        layers: Sequence[DecoderLayer],
        positions: Positions,
        lengths: Optional[Tensor] = None,
    ) -> Passage:
        passage = super().forward(x, state, layers, positions, lengths)
        if not self.training:
            return passage
        self.tell_untrained("--memory block-recurrent writes into its states")
        # First states are read only where a text begins, and the next update is the first to read the last window's
        # states.
        cells = (cast(RecurrentCell, cell) for cell in self.cells)
        unread = self.cells.parameters() if x.size(1) <= self.period else [cell.first_states for cell in cells]
        return passage._replace(features=with_unread(passage.features, unread))

    def layer_states(self, state: BlockRecurrentState) -> List[LayerState]:
        of_layer = dict(zip(self.recurrent, state.states, strict=True))
        windows = zip(state.keys, state.values, strict=True)
        return [(*window, of_layer[n]) if n in of_layer else window for n, window in enumerate(windows)]

    def joined(self, parts: Sequence[LayerState], like: BlockRecurrentState) -> BlockRecurrentState:
        keys, values = zip(*(part[:2] for part in parts), strict=True)
        return BlockRecurrentState(keys, values, tuple(part[2] for part in parts if len(part) > 2))

    def reach(self, state: BlockRecurrentState, current: int) -> Tuple[int, Optional[range]]:
        return state.keys[0].size(2) + current, None

    def pass_layer(
        self, n: int, layer: DecoderLayer, rows: Tensor, before: LayerState, segment: Segment
    ) -> LayerPassage:
        """Read a window ``rows [B, n, d]`` and the states from before it, and write those that the next one reads.

        Of several windows ``[B, N, d]``, each reads the states that the window before it has written.
        """
        past, cell = KeyValues(*before[:2]), self.cell(n)
        written: LayerState = ()
        if cell is None:
            out, seen = layer(rows, segment.biases[n], past)
        else:
            pass_windows = partial(cell.pass_windows, cell.begin(before[2]), rows, self.period, layer.self_attn.config)
            out, (seen, *written) = layer(rows, segment.biases[n], past, pass_windows)
        return LayerPassage(out, (*seen.last(self.config.mem_len, self.config.head_dim), *written))
