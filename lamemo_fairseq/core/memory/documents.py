"""Documents of any lengths, dealt to streams, which are cut into segments.

Each document goes whole to one stream. The longest document is dealt first, each to the stream with the least to read.
No stream ends before every document has begun, in whatever order a stream reads its documents.
"""

from bisect import bisect_right
from heapq import heapify, heapreplace
from itertools import accumulate
from typing import List, NamedTuple, Sequence


class Extract(NamedTuple):
    """Tokens ``start .. stop-1`` of a document."""

    document: int
    start: int
    stop: int


class DocumentStreams:
    """A deal of documents to streams, which depends on these arguments alone.

    Args:
        lengths: tokens of each document; those without tokens are left out.
        num_streams: streams, over all ranks.
        segment_length: N.
        clear: begin every document in a segment of its own. Otherwise documents follow one another within segments.
    """

    def __init__(self, lengths: Sequence[int], num_streams: int, segment_length: int, clear: bool):
        self.lengths = lengths
        self.segment_length = segment_length
        self.clear = clear
        self.dealt: List[List[int]] = [[] for _ in range(num_streams)]
        loads = [(0, stream) for stream in range(num_streams)]
        heapify(loads)
        for document in sorted(range(len(lengths)), key=lambda document: -lengths[document]):
            if lengths[document] > 0:
                load, stream = loads[0]
                self.dealt[stream].append(document)
                heapreplace(loads, (load + self._size(document), stream))
        for documents in self.dealt:
            documents.sort()
        longest = max(load for load, _ in loads)
        self.num_segments = longest if clear else -(-longest // segment_length)

    def _size(self, document: int) -> int:
        """Return the share of a document in its stream: segments, or tokens where documents share segments."""
        return -(-self.lengths[document] // self.segment_length) if self.clear else self.lengths[document]

    def stream(self, documents: Sequence[int]) -> "DocumentStream":
        """Return a stream that reads these documents in this order."""
        return DocumentStream(self, documents)


class DocumentStream:
    """The documents of one stream, one after another."""

    def __init__(self, deal: DocumentStreams, documents: Sequence[int]):
        self._deal = deal
        self._documents = documents
        self._ends = list(accumulate(deal._size(document) for document in documents))

    def segment(self, index: int) -> List[Extract]:
        """Return the extracts that a segment reads, in order: with ``clear`` one at most, and none after the end."""
        deal = self._deal
        length = 1 if deal.clear else deal.segment_length
        begin, stop = index * length, (index + 1) * length
        extracts = []
        number = bisect_right(self._ends, begin)
        while number < len(self._documents) and begin < stop:
            document = self._documents[number]
            before = self._ends[number] - deal._size(document)
            offset = begin - before
            if deal.clear:
                start = offset * deal.segment_length
                extracts.append(Extract(document, start, min(start + deal.segment_length, deal.lengths[document])))
            else:
                extracts.append(Extract(document, offset, min(stop, self._ends[number]) - before))
            begin = self._ends[number]
            number += 1
        return extracts
