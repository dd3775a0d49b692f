"""The loss of a split in the units of its original text.

The loss of a text is a sum over its tokens. Only this total, in nats, can be compared between models with different
tokens. So the loss in every unit is the total divided by a count, and never derived from the loss in another unit.
"""

import math
import os
from dataclasses import dataclass, replace
from typing import Any, Dict, Optional

from ..data.documents import DocumentDataset
from ..data.original import OriginalText, counting, read_original
from ..data.segments import SegmentDataset
from ..data.text_encoding import read_text_encoding
from ..host.ranks import several_ranks, sum_over_ranks


@dataclass(frozen=True)
class Totals:
    """Sums over the tokens that were scored.

    Args:
        nll: the loss in nats.
        tokens: their number.
        words: their number, joined as ``--post-process`` says, ``</s>`` among them.
        line_ends: tokens that are ``</s>``.
        unknown: tokens that are ``<unk>``.
    """

    nll: float = 0.0
    tokens: int = 0
    words: int = 0
    line_ends: int = 0
    unknown: int = 0

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def over_ranks(self) -> "Totals":
        """Return the sums over all ranks. Every rank has to call it."""
        if not several_ranks():
            return self
        nll, *counts = sum_over_ranks(*vars(self).values())
        return Totals(nll, *map(int, counts))

    def bits(self, count: int) -> float:
        """Return the loss in bits of each of *count* units, NaN if there are none."""
        return self.nll / count / math.log(2) if count > 0 else math.nan

    def perplexity(self, count: int) -> float:
        bits = self.bits(count)
        return math.inf if bits >= 1024 else 2**bits


@dataclass(frozen=True)
class Original:
    """The original text of the scored split, or the reason why its counts are not known.

    Args:
        note: the change that the text went through before it was scored, if any.
        read: the way in which the split is read, empty if as one text.
    """

    text: Optional[OriginalText]
    missing: str = ""
    note: str = ""
    read: str = ""

    @classmethod
    def of(cls, split: Optional[SegmentDataset]) -> "Original":
        """Look up the counts of a split's text in its folder.

        Raises:
            ValueError: the counts are damaged.
        """
        if split is None:
            return cls(None, "it is not known of which split the tokens are")
        folder, name = os.path.split(split.tokens.name)
        text, read = read_original(folder, name), _read_as(split)
        if text is None:
            missing = f"{folder} has no counts of the text of {name}; {counting(folder, name)} adds them"
            return cls(None, missing, read=read)
        if text.tokens != len(split.tokens):
            missing = (
                f"the counts in {folder} are of a text of {text.tokens:,} tokens, and {name} has "
                f"{len(split.tokens):,}; {counting(folder, name)} counts the right one"
            )
            return cls(None, missing, read=read)
        encoding = read_text_encoding(folder)
        normalized = encoding is not None and encoding.normalized
        note = "which was reduced to letters and spaces before it was scored" if normalized else ""
        return cls(text, note=note, read=read)

    def scored(self, tokens: int) -> "Original":
        """Return this text, without counts if the scored *tokens* are not all of the split."""
        if self.text is None or tokens == self.text.tokens:
            return self
        return replace(
            self,
            text=None,
            missing=f"{tokens:,} of {self.text.tokens:,} tokens were scored, and the counts of {self.text.text} are of "
            "all of them; score the whole split, every shard of it, and separators with --score-separators",
        )


def _read_as(split: SegmentDataset) -> str:
    if not isinstance(split, DocumentDataset):
        return ""
    memory = "from an empty memory" if split.document_options.clear else "with the memory of the one before"
    return f"{len(split.documents.starts):,} documents, each {memory}"


def report(totals: Totals, original: Original) -> Dict[str, Any]:
    """Return the loss in every unit, by name, with the counts behind it.

    If the counts of the text are not known, the losses by them are None, and ``missing`` says why.
    """
    original = original.scored(totals.tokens)
    text = original.text
    others = totals.tokens - totals.line_ends
    return {
        "nll_nats": totals.nll,
        "tokens": totals.tokens,
        "bits_per_token": totals.bits(totals.tokens),
        "token_perplexity": _finite(totals.perplexity(totals.tokens)),
        "line_ends": totals.line_ends,
        "unknown_tokens": totals.unknown,
        "loss_of": "word" if 0 < totals.words < totals.tokens else "token",
        "unknown_share": totals.unknown / others if others > 0 else 0.0,
        "text": text.text if text else None,
        "words": text.words if text else None,
        "words_counted": text.counted if text else None,
        "word_perplexity": _finite(totals.perplexity(text.words)) if text and text.words else None,
        "bytes": text.bytes if text else None,
        "bits_per_byte": totals.bits(text.bytes) if text else None,
        "read_as": original.read or "one text",
        "missing": original.missing,
        "note": original.note,
    }


def sentence(report: Dict[str, Any]) -> str:
    """Return a report in one line, each loss with the count that it is divided by."""
    tokens = (
        f"{report['bits_per_token']:.4f} bits a token ({report['tokens']:,}, {report['line_ends']:,} of them ends of "
        f"lines; {report['unknown_share']:.2%} of the others unknown)"
    )
    if report["read_as"] != "one text":
        tokens += f", read as {report['read_as']}"
    if report["text"] is None:
        unit = "word that --post-process joins" if report["loss_of"] == "word" else "token"
        ends = ", </s> among them" if report["line_ends"] else ""
        return (
            f"{tokens}; Loss is that of a {unit}{ends}, as words and bytes of the original text are not counted: "
            f"{report['missing']}"
        )
    note = f", {report['note']}" if report["note"] else ""
    perplexity = report["word_perplexity"]
    return (
        f"{tokens}; perplexity {'without bound' if perplexity is None else f'{perplexity:.2f}'} a word "
        f"({report['words']:,} {report['words_counted']}, {report['text']}{note}); "
        f"{report['bits_per_byte']:.4f} bits per byte ({report['bytes']:,} of it)"
        + ("; both count all unknown words as one, which is easy to predict" if report["unknown_tokens"] else "")
    )


def _finite(value: float) -> Optional[float]:
    return value if math.isfinite(value) else None
