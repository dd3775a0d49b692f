"""Documents of a split: recorded beside it, or separated by a line, and read as streams of whole documents."""

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from fairseq.data import Dictionary
from numpy.typing import NDArray

from ..core.memory.documents import DocumentStream, DocumentStreams
from .segments import Segment, SegmentDataset, SegmentKey
from .streams import Layout, TokenSequence, part_of_line
from .text_encoding import PREPROCESS

logger = logging.getLogger(__name__)

RECORD = ".documents"  # after the path of a split: the number of lines of each document, one a line


class Documents(NamedTuple):
    """The documents of a split in its order, none of them empty."""

    starts: NDArray[np.int64]  # [documents], the first token of each
    stops: NDArray[np.int64]  # [documents], the token behind the last of each


@dataclass(frozen=True)
class DocumentOptions:
    """The way to read a split as documents.

    Args:
        source: ``recorded`` beside the split, or ``separator`` lines in it.
        separator: the line between two documents, as words of the dictionary; empty for an empty line.
        scored: whether separator lines are read and scored, at the end of the document before; at the beginning of the
            split, as first lines of the first document. Else they are left out.
        clear: begin each document from an empty memory. Else the memory is that of the documents before it.
    """

    source: str
    separator: str = ""
    scored: bool = False
    clear: bool = True

    @classmethod
    def of(cls, cfg: Any) -> Optional["DocumentOptions"]:
        """Return the way that the options of a task ask for, None for one text."""
        source = str(cfg.documents)
        if source == "none":
            return None
        by_separator = source == "separator"
        return cls(
            source=source,
            separator=cfg.document_separator if by_separator else "",
            scored=by_separator and cfg.score_separators,
            clear=str(cfg.at_document) == "clear",
        )

    def check(self, path: str) -> None:
        """Refuse a split that is read later if its record of documents is missing or damaged."""
        if self.source == "recorded":
            _read_record(path + RECORD)

    def find(self, paths: Sequence[str], tokens: TokenSequence, dictionary: Dictionary) -> Documents:
        """Return the documents of a split.

        Args:
            paths: of the files that the split is joined from.

        Raises:
            FileNotFoundError: no documents are recorded.
            ValueError: the record is of other lines, or there is no separator, or there are only separators.
        """
        bounds = self._recorded(paths, tokens) if self.source == "recorded" else self._separated(tokens, dictionary)
        documents = Documents(*(bound[bounds[0] < bounds[1]] for bound in bounds))
        if len(documents.starts) == 0:
            raise ValueError(f"{tokens.name} has no document of at least one token: pass another --documents")
        return documents

    def _recorded(self, paths: Sequence[str], tokens: TokenSequence) -> Tuple[NDArray[np.int64], NDArray[np.int64]]:
        lines = [count for path in paths for count in _read_record(path + RECORD)]
        ends = np.cumsum(lines, dtype=np.int64)
        if len(lines) == 0 or ends[-1] != len(tokens.lines):
            raise ValueError(
                f"{paths[0]}{RECORD} is of {sum(lines):,} lines, and the split has {len(tokens.lines):,}: make the "
                f"data again with {PREPROCESS}, or pass another --documents"
            )
        stops = np.concatenate([[0], tokens.ends])[ends]
        return np.concatenate([[0], stops[:-1]]), stops

    def _separated(self, tokens: TokenSequence, dictionary: Dictionary) -> Tuple[NDArray[np.int64], NDArray[np.int64]]:
        words = [dictionary.index(word) for word in self.separator.split()]
        for word, index in zip(self.separator.split(), words, strict=True):
            if dictionary[index] != word:
                raise ValueError(
                    f"--document-separator '{self.separator}': '{word}' is not in dict.txt: write the line as it stands"
                    " in the binarized text, pieces and all"
                )
        separators = _lines_of(tokens, words, dictionary.eos())
        if not separators:
            line = f"line '{self.separator}'" if self.separator else "empty line"
            raise ValueError(
                f"{tokens.name} has no {line}: pass another --document-separator, or --documents none "
                "to read it as one text"
            )
        begins = np.concatenate([[0], tokens.ends])
        starts = np.concatenate([[0], begins[np.array(separators) + 1]])
        stops = np.concatenate([begins[separators], [len(tokens)]])
        if not self.scored or not (starts < stops).any():
            return starts, stops
        cuts = starts[starts < stops][1:]  # separators alone make no document
        return np.concatenate([[0], cuts]), np.concatenate([cuts, [len(tokens)]])


def _read_record(path: str) -> List[int]:
    try:
        with open(path, encoding="utf-8") as file:
            lines = [int(line) for line in file]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no documents are recorded in {path}: make the data with {PREPROCESS} own --documents, or pass another "
            "--documents"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it has a number of lines for each document, {error}") from error
    if any(count < 0 for count in lines):
        raise ValueError(f"{path} is damaged: a document cannot have a negative number of lines")
    return lines


def _lines_of(tokens: TokenSequence, words: Sequence[int], eos: int) -> List[int]:
    """Return the numbers of the lines that consist of these words, with or without an end."""
    numbers = []
    for line in np.flatnonzero((tokens.sizes == len(words)) | (tokens.sizes == len(words) + 1)).tolist():
        size = int(tokens.sizes[line])
        if part_of_line(tokens.lines, line, 0, size).tolist() == [*words, eos][:size]:
            numbers.append(line)
    return numbers


@dataclass(frozen=True)
class DocumentLayout(Layout):
    """Whole documents dealt to streams."""

    documents: int
    deal: DocumentStreams

    @property
    def num_segments(self) -> int:
        return self.deal.num_segments

    def summary(self) -> str:
        return (
            f"{self.documents:,} documents of {self.num_tokens:,} tokens in {self.num_streams} streams, "
            f"{self.num_segments:,} segments; the memory is {'cleared' if self.deal.clear else 'kept'} at each document"
        )

    def check(self, name: str, training: bool, option: str = "--batch-size") -> None:
        """Warn if there are fewer documents than streams. All documents are read in any case."""
        if self.documents < self.num_streams:
            logger.warning(
                "%s has %d documents, so that %d of %d streams (%s times ranks) read nothing: a %s of %d streams in "
                "all is as fast",
                name,
                self.documents,
                self.num_streams - self.documents,
                self.num_streams,
                option,
                option,
                self.documents,
            )


class DocumentDataset(SegmentDataset):
    """A split as segments of streams of whole documents.

    The first token of every document is predicted after ``</s>``. Each stream reads its documents in the order of
    the split, or with *roll_seed* in another order each epoch.

    Args:
        documents: their beginnings and ends.
        options: the way in which documents were separated, and whether the memory is cleared.
        tokens, split, segment_length, eos, roll_seed: as for `SegmentDataset`.
    """

    def __init__(
        self,
        documents: Documents,
        options: DocumentOptions,
        tokens: TokenSequence,
        split: str,
        segment_length: int,
        eos: int,
        roll_seed: Optional[int] = None,
    ):
        super().__init__(tokens, split, segment_length, eos, roll_seed)
        self.documents = documents
        self.document_options = options
        self._layouts: Dict[int, DocumentLayout] = {}
        self._streams: Dict[Tuple[int, int, int], DocumentStream] = {}  # by epoch, number of streams, and stream

    @cached_property
    def in_order(self) -> "DocumentDataset":
        return DocumentDataset(
            self.documents, self.document_options, self.tokens, self.split, self.segment_length, self.eos
        )

    def options(self) -> Dict[str, Any]:
        chosen = self.document_options
        return {
            **super().options(),
            "--documents": chosen.source,
            "--document-separator": chosen.separator,
            "--score-separators": chosen.scored,
            "--at-document": "clear" if chosen.clear else "keep",
            "the number of documents": len(self.documents.starts),
        }

    def layout(self, num_streams: int) -> DocumentLayout:
        if num_streams not in self._layouts:
            sizes = (self.documents.stops - self.documents.starts).tolist()
            deal = DocumentStreams(sizes, num_streams, self.segment_length, self.document_options.clear)
            self._layouts[num_streams] = DocumentLayout(sum(sizes), num_streams, self.segment_length, len(sizes), deal)
        return self._layouts[num_streams]

    def __getitem__(self, key: SegmentKey) -> Segment:
        spans = [(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))]
        extracts = self._stream(key).segment(key.segment)
        for document, start, stop in extracts:
            first = int(self.documents.starts[document])
            if start > 0:
                words = self.tokens.read(first + start - 1, first + stop)
            else:
                words = np.concatenate([[self.eos], self.tokens.read(first, first + stop)])
            spans.append((words[:-1], words[1:]))
        source, target = (np.concatenate(parts) for parts in zip(*spans, strict=True))
        begins = self.document_options.clear and any(extract.start == 0 for extract in extracts)
        return Segment(key, source, target, begins, ended=not extracts)

    def _stream(self, key: SegmentKey) -> DocumentStream:
        epoch = 0 if self.roll_seed is None else key.epoch
        name = (epoch, key.num_streams, key.stream)
        if name not in self._streams:
            self._streams = {other: stream for other, stream in self._streams.items() if other[0] == epoch}
            deal = self.layout(key.num_streams).deal
            documents = deal.dealt[key.stream]
            if self.roll_seed is not None:
                seed = (self.roll_seed, epoch, key.stream)
                documents = np.random.default_rng(seed).permutation(documents).tolist()
            self._streams[name] = deal.stream(documents)
        return self._streams[name]
