"""The data sets: sources, checksums, splits. README.md has the sources of all numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from . import pg19
from .books import Books
from .chunks import cut
from .files import Identity, Span
from .pieces import PieceTraining
from .tokenization import ByteTokenizer, LetterTokenizer, LineTokenizer, Tokenizer

SPLITS = ("train", "valid", "test")


class WrongText(ValueError):
    """A text differs from the one that was expected."""


class Divide(Protocol):
    """A division of files into splits."""

    def __call__(self, files: Sequence[Path], tokenizer: Tokenizer) -> dict[str, Span]: ...


@dataclass(frozen=True)
class FileEach:
    """A file a split: the training text, then the validation and test texts, if there are any."""

    way: str = "a file each"

    def __call__(self, files: Sequence[Path], tokenizer: Tokenizer) -> dict[str, Span]:
        return {split: Span(file, 0, file.stat().st_size) for split, file in zip(SPLITS, files, strict=False)}


@dataclass(frozen=True)
class FirstBytes:
    """The beginning of each of these files: this many bytes, and up to the next position where the tokenizer may cut.

    Raises:
        ValueError: a file has fewer bytes.
    """

    bytes: tuple[int, ...]

    def __call__(self, files: Sequence[Path], tokenizer: Tokenizer) -> dict[str, Span]:
        whole = FileEach()(files, tokenizer)
        for (split, span), size in zip(whole.items(), self.bytes, strict=True):
            if span.size < size:
                raise ValueError(f"--first-bytes {size} for {split}: {span.path} has {span.size:,} bytes only")
            whole[split] = cut(span, tokenizer.boundary, size)[0]
        return whole


@dataclass(frozen=True)
class Sizes:
    """One file, cut after this many bytes."""

    bytes: tuple[int, ...]

    def __call__(self, files: Sequence[Path], tokenizer: Tokenizer) -> dict[str, Span]:
        (file,) = files
        if file.stat().st_size != sum(self.bytes):
            raise WrongText(
                f"{file} has {file.stat().st_size:,} bytes, not {sum(self.bytes):,}: it is not the whole file"
            )
        ends = [sum(self.bytes[:i]) for i in range(len(self.bytes) + 1)]
        return {split: Span(file, *ends[i : i + 2]) for i, split in enumerate(SPLITS)}


@dataclass(frozen=True)
class Shares:
    """One file, cut in proportion, each time at the next position where the tokenizer may cut.

    Raises:
        ValueError: there are too few of these positions.
    """

    parts: tuple[float, ...]

    def __call__(self, files: Sequence[Path], tokenizer: Tokenizer) -> dict[str, Span]:
        (file,) = files
        spans, rest = {}, Span(file, 0, file.stat().st_size)
        for i, split in enumerate(SPLITS[: len(self.parts)]):
            if rest.start > 0 and rest.size == 0:
                shares = " ".join(f"{part:g}" for part in self.parts)
                raise ValueError(
                    f"there is no text for {split} in {file}: one text is cut at {tokenizer.boundary.where} "
                    f"only, too few for --shares {shares}: give other shares, or a file for each split"
                )
            wanted = max(1, round(rest.size * self.parts[i] / sum(self.parts[i:])))
            first = next(iter(cut(rest, tokenizer.boundary, wanted)), rest)
            spans[split] = first
            rest = Span(file, first.stop, rest.stop)
        return spans


@dataclass(frozen=True)
class Dataset:
    """A text, and how it is prepared. One's own text has no address, and is not checked."""

    name: str
    files: tuple[str, ...]  # file names of the texts
    divide: Divide
    tokenizer: Tokenizer
    addresses: tuple[str, ...] = ()  # of an archive that holds them
    sha256: str = ""  # of the archive
    size: int | None = None  # of the archive, in bytes
    at_most: int | None = None  # bytes of the archive, roughly, where its size is not known
    contents: Mapping[str, Identity] = field(default_factory=dict)  # of the texts, where known
    tokens: Mapping[str, int] = field(default_factory=dict)  # of each split
    types: int | None = None  # symbols that occur in any split, the end of a line among them
    closed: bool = False  # whether symbols that only other splits have are in the dictionary too, with a count of 0
    threshold: int = -1
    nwords: int = -1
    padding_factor: int = 8
    srcdict: Path | None = None
    training: PieceTraining | None = None  # of a SentencePiece model for the tokenizer
    documents: bool = False  # whether every part of a text is a document
    books: Books | None = None  # books that the file at the addresses lists

    @property
    def archive(self) -> str:
        return self.addresses[0].rsplit("/", 1)[-1]


def _wikitext(name: str, sha256: str, at_most: int, train: int, types: int) -> Dataset:
    return Dataset(
        name=name,
        files=tuple(f"wiki.{split}.tokens" for split in SPLITS),
        divide=FileEach(),
        tokenizer=LineTokenizer(),
        addresses=(f"https://wikitext.smerity.com/{name}-v1.zip",),
        sha256=sha256,
        at_most=at_most,
        tokens={"train": train, "valid": 217_646, "test": 245_569},
        types=types,
    )


def _hutter(name: str, tokenizer: Tokenizer, sha256: str, size: int, content: str, types: int) -> Dataset:
    return Dataset(
        name=name,
        files=(name,),
        divide=Sizes((90_000_000, 5_000_000, 5_000_000)),
        tokenizer=tokenizer,
        addresses=(f"http://mattmahoney.net/dc/{name}.zip", f"https://mattmahoney.net/dc/{name}.zip"),
        sha256=sha256,
        size=size,
        contents={name: Identity(name, 100_000_000, content)},
        tokens={"train": 90_000_000, "valid": 5_000_000, "test": 5_000_000},
        types=types,
        closed=True,  # published losses count no unknown symbols
    )


DATASETS = {
    dataset.name: dataset
    for dataset in (
        _wikitext(
            "wikitext-103",
            sha256="242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
            at_most=250_000_000,
            train=103_227_021,
            types=267_735,
        ),
        _wikitext(
            "wikitext-2",
            sha256="92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
            at_most=10_000_000,
            train=2_088_628,
            types=33_278,
        ),
        _hutter(
            "enwik8",
            ByteTokenizer(),
            sha256="547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
            size=36_445_475,
            content="2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
            types=205,
        ),
        _hutter(
            "text8",
            LetterTokenizer(),
            sha256="a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
            size=31_344_016,
            content="6e890197040d37d85beb962ae1f041ff1d9a9ca8d20c7d99c85027eebf51dca7",
            types=27,
        ),
        Dataset(
            name="pg-19",
            files=tuple(f"{split}.txt" for split in SPLITS),
            divide=FileEach(),
            tokenizer=LineTokenizer(bpe="sentencepiece"),
            addresses=("https://storage.googleapis.com/deepmind-gutenberg/metadata.csv",),
            sha256="fbb2fdb48522927b2e16aa52950f2afeb83c6fa8fed45f0c3dd834e9bc9b43b9",
            size=2_737_447,
            training=PieceTraining(vocab_size=32_000, byte_fallback=True),
            documents=True,
            books=Books(
                title="PG-19",
                total={"train": 28_602, "valid": len(pg19.VALID), "test": len(pg19.TEST)},
                listed={"valid": pg19.VALID, "test": pg19.TEST},
                words={"valid": 3_007_061, "test": 6_966_499},
                folders={"train": "train", "valid": "validation", "test": "test"},
            ),
        ),
    )
}
