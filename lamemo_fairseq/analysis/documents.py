"""The loss over documents: by position in them, by class of token, and with the memory cut.

The computations take the losses of tokens and the beginnings of documents, however the tokens were read. Where a split
is not read by document, `Rule` recognises documents by their tokens.

Shapes: T tokens, D documents.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

ALL, FIRST, AGAIN = "all", "first in the document", "seen before in the document"


class Mean(NamedTuple):
    """A mean loss in bits a token.

    Its standard error assumes independence between documents, but not between the tokens of a document.
    """

    loss: float
    error: Optional[float]  # None with fewer than two documents
    tokens: int
    documents: int


@dataclass(frozen=True)
class DocumentLosses:
    """The losses of a text.

    Args:
        tokens: ``[T]`` ids.
        losses: ``[T]`` bits.
        starts: ``[D]`` the index of each document's first token, ascending from 0.
    """

    tokens: Tensor
    losses: Tensor
    starts: Tensor

    @cached_property
    def document(self) -> Tensor:
        """The number of each token's document ``[T]``."""
        return torch.searchsorted(self.starts, torch.arange(len(self.tokens)), right=True) - 1

    @cached_property
    def position(self) -> Tensor:
        """The position of each token in its document ``[T]``, from 1."""
        return torch.arange(len(self.tokens)) - self.starts[self.document] + 1

    @cached_property
    def seen(self) -> Tensor:
        """Booleans ``[T]``, True for tokens that have occurred before in their document."""
        order = torch.argsort(self.tokens, stable=True)  # equal tokens side by side, in the order of the text
        token, document = self.tokens[order], self.document[order]
        again = torch.zeros(len(order), dtype=torch.bool)
        again[1:] = (token[1:] == token[:-1]) & (document[1:] == document[:-1])
        return torch.zeros_like(again).index_copy_(0, order, again)

    def classes(self) -> Dict[str, Tensor]:
        """Return the tokens of each class, as booleans ``[T]``."""
        return {ALL: torch.ones_like(self.seen), FIRST: ~self.seen, AGAIN: self.seen}

    def means(self, group: Tensor, chosen: Tensor) -> List[Mean]:
        """Return the mean losses of groups 0, 1, ... of tokens, to which ``group [T]`` assigns those *chosen*.

        Document d has n_d tokens of a group, with the sum of losses S_d; D documents have tokens of the group. The mean
        is m = sum S_d / sum n_d, and its error sqrt(D / (D - 1) sum (S_d - m n_d)^2) / sum n_d.
        """
        cell = (group * len(self.starts) + self.document)[chosen]
        shape = int(group.max()) + 1, len(self.starts)
        counts = torch.bincount(cell, minlength=shape[0] * shape[1]).view(shape)
        sums = torch.bincount(cell, self.losses[chosen].double(), minlength=shape[0] * shape[1]).view(shape)
        tokens, documents = counts.sum(1), (counts > 0).sum(1)
        mean = sums.sum(1) / tokens
        spread = (sums - mean.unsqueeze(1) * counts).square().sum(1)
        error = (spread * documents / (documents - 1)).sqrt() / tokens  # in float64, unlike a quotient of integers
        columns = (column.tolist() for column in (mean, error, tokens, documents))
        return [Mean(m, e if d > 1 else None, n, d) for m, e, n, d in zip(*columns, strict=True)]

    def by_class(self) -> Dict[str, Mean]:
        """Return the mean loss of each class that has tokens."""
        one = torch.zeros_like(self.document)
        return {name: self.means(one, of)[0] for name, of in self.classes().items() if of.any()}

    def by_position(self) -> List[Tuple[str, int, int, Mean]]:
        """Return class, first and last position, and mean loss: positions 1, 2 to 3, 4 to 7, and so on."""
        exponent = torch.frexp(self.position.double()).exponent.long() - 1
        return [
            (name, 2**n, 2 ** (n + 1) - 1, mean)
            for name, of in self.classes().items()
            for n, mean in enumerate(self.means(exponent, of))
            if mean.tokens > 0
        ]


@dataclass(frozen=True)
class Rule:
    """A rule that recognises the beginnings of documents by tokens.

    Args:
        name: ``one``, ``recorded``, ``blank-lines``, ``separator`` or ``headings``.
        value: the least number of blank lines, or the word that stands alone in a line between two documents.
    """

    name: str = "one"
    value: str = ""

    @classmethod
    def parse(cls, given: str) -> "Rule":
        """Read ``one``, ``recorded``, ``blank-lines:2``, ``separator:WORD`` or ``headings``.

        Raises:
            ValueError: the text is none of these.
        """
        name, sign, value = given.partition(":")
        fine = {
            **dict.fromkeys(("one", "recorded", "headings"), not sign),
            "blank-lines": value.isascii() and value.isdigit() and int(value) > 0,
            "separator": value != "" and not value.isspace(),
        }
        if not fine.get(name, False):
            raise ValueError(
                f"--documents {given}: pass one, recorded, headings (as WikiText has them), blank-lines:N or "
                "separator:WORD"
            )
        return cls(name, value)

    @property
    def is_of_tokens(self) -> bool:
        """Whether the rule looks for beginnings among the tokens."""
        return self.name not in ("one", "recorded")

    def __str__(self) -> str:
        return {
            "one": "the streams, each counted as one",
            "recorded": "as recorded, each from an empty memory",
            "headings": "from one heading of WikiText's to the next",
            "blank-lines": f"between {self.value} or more blank lines",
            "separator": f"between lines with {self.value} alone",
        }[self.name]

    def check(self, dictionary: Any) -> None:
        """Check that a text of these words may have what the rule looks for.

        Raises:
            ValueError: the dictionary does not have the separator.
        """
        word = {"separator": self.value, "headings": "="}.get(self.name)
        if word is not None:
            self._id(word, dictionary)

    def starts(self, tokens: Tensor, dictionary: Any) -> Tensor:
        """Return the index of each document's first token in ``tokens [T]``, ascending from 0; not for ``recorded``.

        Raises:
            ValueError: the dictionary does not have the separator.
        """
        if len(tokens) == 0:
            return torch.empty(0, dtype=torch.int64)
        ends = tokens == dictionary.eos()
        line_starts = torch.cat([torch.tensor([True]), ends[:-1]])
        begins = torch.zeros_like(ends)
        if self.name == "blank-lines":
            # The end of the line before the blank lines, and one end for each blank line.
            run = torch.ones_like(ends)
            for back in range(1, int(self.value) + 2):
                run &= torch.cat([torch.zeros_like(ends[:back]), ends[: len(ends) - back]])[: len(ends)]
            begins = run & ~ends
        elif self.name == "separator":
            between = line_starts[:-2] & (tokens[:-2] == self._id(self.value, dictionary)) & ends[1:-1]
            begins[2:] = between
        elif self.name == "headings":
            mark = tokens == self._id("=", dictionary)
            first = line_starts[:-1] & mark[:-1] & ~mark[1:] & ~ends[1:]  # a line that is a mark alone has no title
            begins[:-1] = first & self._line_ends_in(mark, ends)[:-1]
        begins[0] = True
        return begins.nonzero().squeeze(1)

    def _id(self, word: str, dictionary: Any) -> int:
        index = int(dictionary.index(word))
        if dictionary[index] != word:
            raise ValueError(
                f"--documents {self.name}: '{word}' is not in dict.txt: pass another rule, such as one, or "
                "separator:WORD with a word of dict.txt"
            )
        return index

    @staticmethod
    def _line_ends_in(mark: Tensor, ends: Tensor) -> Tensor:
        """Return booleans ``[T]``, True for tokens of lines whose last token before their end is a mark."""
        line = torch.cumsum(ends, 0) - ends.long()
        ended = torch.zeros(int(line.max()) + 1, dtype=torch.bool)
        last = ends[1:] & mark[:-1]
        ended[line[:-1][last]] = True
        return ended[line]


def of_streams(streams: Sequence[Tuple[Tensor, Tensor]], starts: Callable[[int, Tensor], Tensor]) -> DocumentLosses:
    """Join the streams of a split, of ids and of log-probabilities in nats: ``[t]`` each.

    A stream begins with an empty memory, so that its first token counts as the beginning of a document.

    Args:
        starts: returns the index of each document's first token, given the number of a stream and its ids.
    """
    ends = list(itertools.accumulate((len(tokens) for tokens, _ in streams), initial=0))
    return DocumentLosses(
        torch.cat([tokens for tokens, _ in streams]),
        torch.cat([log_probs.double() for _, log_probs in streams]) / -math.log(2),
        torch.cat([starts(number, tokens) + ends[number] for number, (tokens, _) in enumerate(streams)]),
    )
