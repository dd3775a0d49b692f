"""Segatron's positions: distances in tokens, in sentences and in paragraphs (Bai et al. 2021, arXiv 2004.14996).

Shapes: B streams, R rows, L layers, H heads, D size of a head, U distances, P of sentences and paragraphs (2, or 1 if
one is left out), d model width, w width of a sinusoid.
"""

from functools import reduce
from typing import ClassVar, List, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import Counted, RelativeBias
from .base import POSITIONS
from .bias import LayerBias, PositionConfig
from .sinusoidal import TransformerXLPositions


@POSITIONS.register("segatron")
class SegatronPositions(TransformerXLPositions):
    """``(q_i + u) . k_j + (q_i + v) . W_r [sin(t_i - t_j) ; sin(s_i - s_j) ; sin(p_i - p_j)]`` with sinusoids.

    t, s and p are the numbers of a row's token, sentence and paragraph. A sentence ends after a run of words that end
    sentences, and a paragraph likewise. The end of a paragraph also ends its sentence. So an end of a line behind a
    full stop belongs to the sentence before it, and empty lines to the paragraph before them. The number of a row
    depends on the words up to the row alone, not on those that follow.

    W_r is applied to each of the three sinusoids, so that distances are looked up in tables of as many entries as there
    are rows. To the right of a slot distances are negative, as with transformer-xl.
    """

    reads_words: ClassVar[bool] = True

    def __init__(self, config: PositionConfig):
        super().__init__(config)
        sentences, paragraphs = tuple(config.sentence_ends), tuple(config.paragraph_ends)
        # Sentences come before paragraphs, as in the sinusoids. The end of a paragraph ends a sentence too.
        self.ends = [ends for ends in (sentences and sentences + paragraphs, paragraphs) if ends]
        if not self.ends:
            raise ValueError(
                "--position-encoding segatron counts sentences and paragraphs, and no word ends one: pass "
                "--sentence-ends or --paragraph-ends, or take --position-encoding transformer-xl"
            )
        self.widths = part_widths(config.embed_dim, 1 + len(self.ends))

    def counts(self, words: Tensor) -> Tensor:
        ended = [_any(words, ends) for ends in self.ends]
        begun = [F.pad(end[:, :-1] & ~end[:, 1:], (1, 0)) for end in ended]
        return torch.stack(begun).cumsum(2)

    def biases(self, causal: int, ahead: Optional[range], like: Tensor) -> List[LayerBias]:
        layers, content, position = self.config.layers, self.content_bias, self.position_bias
        past = self._tables(0, range(causal - 1, -1, -1), like).unbind()
        counted_past = self._counted_tables(range(causal), like).unbind()
        if ahead is None:
            return [
                LayerBias(RelativeBias(content, position, past[n]), None, None, Counted(position, counted_past[n]))
                for n in range(layers)
            ]
        slots = max(ahead.stop - 1, 0)
        future = self._tables(0, self._ahead_distances(ahead), like).unbind()
        around = self._counted_tables(range(-slots, slots + 1), like).unbind()
        return [
            LayerBias(
                RelativeBias(content, position, past[n]),
                RelativeBias(content, position, future[n]),
                None,
                Counted(position, counted_past[n], around[n]),
            )
            for n in range(layers)
        ]

    def _tables(self, part: int, distances: range, like: Tensor) -> Tensor:
        """Return the tables ``[L, H, U, D]`` of one sinusoid's distances."""
        first = sum(self.widths[:part])
        columns = slice(first, first + self.widths[part])
        return self._project(self._sinusoids(distances, like, self.widths[part]), columns)

    def _counted_tables(self, distances: range, like: Tensor) -> Tensor:
        """Return the tables ``[L, P, H, U, D]`` of distances in sentences and paragraphs."""
        return torch.stack([self._tables(part, distances, like) for part in range(1, len(self.widths))], dim=1)


def part_widths(embed_dim: int, parts: int) -> List[int]:
    """Return the widths w of the sinusoids: all but the last are ``d / parts``, cut and then rounded up to even.

    Raises:
        ValueError: no width is left for the last sinusoid.
    """
    width = embed_dim // parts
    width += width % 2
    last = embed_dim - width * (parts - 1)
    if width == 0 or last <= 0:
        raise ValueError(
            f"--decoder-embed-dim {embed_dim} is too narrow for the {parts} parts of --position-encoding segatron: "
            f"pass at least {2 * parts}, or another encoding"
        )
    return [width] * (parts - 1) + [last]


def _any(words: Tensor, chosen: Sequence[int]) -> Tensor:
    """Return booleans like *words*, True for the *chosen* words."""
    return reduce(torch.logical_or, (words == word for word in chosen))
