"""Data sets of books, one file each, whose published splits are lists of numbers."""

import csv
import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .download import download
from .files import Identity, Span
from .sources import Source, existing, numbered

PUBLISHED = "as published"
_CONNECTIONS = 8
_TRAIN = "train"


@dataclass(frozen=True)
class Books:
    """The published splits of a data set of books.

    Args:
        title: the data set's name in the literature.
        total: books of each split.
        listed: the books of the splits that are listed, by number; every other book is for training.
        words: published counts of the listed splits, for their perplexity.
        folders: of each split, beneath the address.
    """

    title: str
    total: Mapping[str, int]
    listed: Mapping[str, Mapping[int, Identity]]
    words: Mapping[str, int]
    folders: Mapping[str, str]

    def split_of(self, book: int) -> str:
        return next((split for split, books in self.listed.items() if book in books), _TRAIN)

    def resolve(self, sources: Sequence[Path]) -> list[Source]:
        """Return a text for each split: the split's books below a folder, in the order of their numbers.

        Raises:
            FileNotFoundError: the folder is missing, or a split has no book.
            ValueError: the path is no folder, or the folder has a book more than once.
        """
        existing(sources)
        if len(sources) != 1 or not sources[0].is_dir():
            raise ValueError(
                f"--source takes one folder for {self.title}, with a file NUMBER.txt for each book, in any "
                "sub-folders: unpack archives first"
            )
        files: dict[str, list[Path]] = {split: [] for split in self.total}
        for book, path in sorted(numbered(sources[0]).items()):
            files[self.split_of(book)].append(path)
        for split, paths in files.items():
            if not paths:
                of_it = "any other number" if split == _TRAIN else f"such as {min(self.listed[split])}.txt"
                raise FileNotFoundError(
                    f"--source {sources[0]}: there is no book of {split} ({of_it}): add one at least"
                )
        return [Source(f"{split}.txt", paths[0], tuple(paths[1:])) for split, paths in files.items()]

    def download(self, address: str, index: Path, folder: Path) -> None:
        """Fetch the books that *folder* lacks, each to ``SPLIT/NUMBER.txt`` in it, over several connections.

        Args:
            address: of the folder with the folders of the splits.
            index: CSV file, whose first column has the number of every book.

        Raises:
            DownloadError: a book cannot be downloaded. Books that were downloaded stay.
        """
        with open(index, encoding="utf-8", newline="") as file:
            books = [int(row[0]) for row in csv.reader(file) if row]

        def fetch(book: int) -> None:
            split = self.split_of(book)
            path = folder / self.folders[split] / f"{book}.txt"
            known = self.listed.get(split, {}).get(book)
            if not (path.exists() if known is None else known.is_at(path)):
                sha256, size = (None, None) if known is None else (known.sha256, known.size)
                download([f"{address}/{self.folders[split]}/{book}.txt"], path, sha256, size, quiet=True)

        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            try:
                for _ in tqdm(pool.map(fetch, books), desc="downloading", total=len(books), unit="book", mininterval=1):
                    pass
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def counted(self, split: str, documents: Sequence[Span], counts: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """Return the counts that perplexity is computed with, and a line that says whose counts they are.

        Published counts apply to all books of a listed split, with their published text.

        Args:
            documents: the books.
            counts: of their text, as `OriginalText` has them.
        """
        number, total = len(documents), self.total[split]
        listed = {book.sha256 for book in self.listed.get(split, {}).values()}
        others = sum(hashlib.sha256(book.read()).hexdigest() not in listed for book in documents) if listed else 0
        name = f"{self.title}'s {split}"
        line = f"{counts['words']:,} words between white space"
        if number == total and listed and not others:
            text = f"{name}, all {total:,} books"
            line = f"{self.words[split]:,} words {PUBLISHED}, which are those of its perplexity ({line})"
            return {**counts, "text": text, "words": self.words[split], "counted": PUBLISHED}, f"{text}: {line}"
        if number == total:
            text = f"{name}, {total:,} books"
        elif number < total:
            text = f"a subset of {name}, {number:,} of {total:,} books"
        else:
            text = f"{number:,} books in place of the {total:,} of {name}"
        if others:
            text += f", {others:,} in another text than the published one"
        if split in self.words:
            line += f", and not the {self.words[split]:,} published for all of it"
        return {**counts, "text": text}, f"{text}: {line}"
