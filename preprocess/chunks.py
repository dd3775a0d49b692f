"""Cut a text into chunks, and encode them side by side, each to a file of its own.

Chunks depend on the text and the tokenizer only, never on how many workers there are. A chunk's file is whole or
missing, so that a run that was stopped goes on with the missing chunks.
"""

import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from .files import Span, replacing
from .tokenization import Boundary, Encoded, EncodingError, Tokenizer

CHUNK = 4 << 20  # bytes of text; a worker holds one at a time
_LOOK = 1 << 14


class Chunk(NamedTuple):
    """A piece of a text, and the file for its tokens."""

    text: Span
    encoded: Path
    more: bool = False  # whether its split continues behind the chunk


def cut(text: Span, boundary: Boundary, size: int = CHUNK) -> list[Span]:
    """Return consecutive pieces of *size* bytes and a little more: up to where the text may next be cut."""
    spans = []
    with open(text.path, "rb") as file:
        start = text.start
        while start < text.stop:
            stop = _next_boundary(file, min(start + size, text.stop), text.stop, boundary)
            spans.append(Span(text.path, start, stop))
            start = stop
    return spans


def _next_boundary(file: IO[bytes], position: int, end: int, boundary: Boundary) -> int:
    """Return the first position behind *position* where the text may be cut."""
    if boundary.reach == 0 or position >= end:
        return position
    pattern = re.compile(boundary.pattern)
    limit = end if boundary.reach is None else min(position + boundary.reach, end)
    begin = position - 1  # so that a text may be cut at the position itself
    file.seek(begin)
    seen = b""  # may be the beginning of a match that ends behind the text read so far
    while begin + len(seen) < limit:
        block = file.read(min(_LOOK, limit - begin - len(seen)))
        if not block:
            raise ValueError(f"{file.name} became shorter while it was read")
        seen += block
        match = pattern.search(seen)
        # A carriage return at the end of the bytes read may be the first half of a line's end.
        if match and not (match.end() == len(seen) and seen.endswith(b"\r") and begin + len(seen) < end):
            return begin + match.end()
        line = seen.rstrip(b" \t\f\v\r")
        length = len(line) - line.endswith(b"\n")
        begin, seen = begin + length, seen[length:]
    if limit == end:
        return end
    return position if boundary.beyond is None else _next_boundary(file, limit, end, Boundary(boundary.beyond))


def encode(chunks: Sequence[Chunk], tokenizer: Tokenizer, workers: int) -> None:
    """Write the missing files of chunks.

    Raises:
        ValueError: a text has bytes that the tokenizer cannot read; the message says where.
        ChildProcessError: a worker was killed.
    """
    missing = [chunk for chunk in chunks if not chunk.encoded.exists()]
    workers = min(workers, len(missing))
    bar = tqdm(
        desc="encoding",
        total=sum(chunk.text.size for chunk in chunks),
        initial=sum(chunk.text.size for chunk in chunks) - sum(chunk.text.size for chunk in missing),
        unit="B",
        unit_scale=True,
        mininterval=1,
    )
    with bar:
        for chunk in _one_after_another(missing, tokenizer) if workers <= 1 else _pool(missing, tokenizer, workers):
            bar.update(chunk.text.size)


def _one_after_another(chunks: Sequence[Chunk], tokenizer: Tokenizer) -> Iterable[Chunk]:
    for chunk in chunks:
        yield _encode(chunk, tokenizer)


def _pool(chunks: Sequence[Chunk], tokenizer: Tokenizer, workers: int) -> Iterable[Chunk]:
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(tokenizer,)) as pool:
        try:
            for done in as_completed([pool.submit(_work, chunk) for chunk in chunks]):
                yield done.result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a worker died, perhaps for lack of memory: give the same command with fewer --workers or --chunk-bytes"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_tokenizer: Tokenizer  # of this worker: the tokenizer is loaded once


def _start_worker(tokenizer: Tokenizer) -> None:
    global _tokenizer
    _tokenizer = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles the interrupt
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker with its parent: otherwise it would wait for a killed parent for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(chunk: Chunk) -> Chunk:
    return _encode(chunk, _tokenizer)


def _encode(chunk: Chunk, tokenizer: Tokenizer) -> Chunk:
    try:
        symbols, ids, sizes = tokenizer.encode(chunk.text.read(), chunk.more)
    except EncodingError as error:
        raise error.within(chunk.text) from error
    names = np.frombuffer("\n".join(symbols).encode("utf-8"), dtype=np.uint8)
    counts = np.bincount(ids, minlength=len(symbols))
    with replacing(chunk.encoded) as file:
        np.savez(file, symbols=names, counts=counts, ids=ids, sizes=sizes)
    return chunk


def load(path: Path) -> Encoded:
    """Return the tokens of a chunk's file."""
    with np.load(path) as stored:
        return Encoded(_symbols(stored), stored["ids"], stored["sizes"])


def load_counts(path: Path) -> dict[str, int]:
    """Return the number of occurrences of each symbol of a chunk."""
    with np.load(path) as stored:
        counts = zip(_symbols(stored), stored["counts"].tolist(), strict=True)
        return {symbol: count for symbol, count in counts if count}


def _symbols(stored: Mapping[str, NDArray[Any]]) -> list[str]:
    names = stored["symbols"].tobytes().decode("utf-8")
    return names.split("\n") if names else []  # a chunk of blank lines may have no tokens
