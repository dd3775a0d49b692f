"""PG-19: books a file each, split by their published numbers, and counted as published where all of them are there."""

import gzip
import json
import math
from dataclasses import replace

import pytest

from lamemo_fairseq.core.text.coders import SentencePieces
from lamemo_fairseq.data.original import WHITE_SPACE, read_original
from lamemo_fairseq.evaluation.units import Original, Totals, report, sentence
from preprocess import datasets
from preprocess.__main__ import main
from preprocess.files import Identity
from preprocess.prepare import RECORD

from .preprocessing import contents, prose, tokens_of, write

TEXTS = {number: prose(20 + number % 7, number) for number in (1, 5, 12, 356, 555, 860, 2544)}
TEXTS[12] = TEXTS[12][:-1] + b" last line without an end"
FOLDERS = {1: "train", 5: "train", 12: "train", 356: "validation", 555: "validation", 860: "test", 2544: "test"}
LISTED = {"valid": (356, 555), "test": (860, 2544)}
PG19 = datasets.DATASETS["pg-19"]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """PG-19 with seven books, at an address of this machine."""
    server = tmp_path / "server"
    listed: dict[str, dict[int, Identity]] = {"valid": {}, "test": {}}
    for number, folder in FOLDERS.items():
        (server / folder).mkdir(parents=True, exist_ok=True)
        book = write(server / folder / f"{number}.txt", TEXTS[number])
        for split in (split for split, numbers in LISTED.items() if number in numbers):
            listed[split][number] = Identity.of(book)
    index = write(server / "metadata.csv", b"".join(b'%d,"Title, a",1900,http\r\n' % number for number in TEXTS))
    identity = Identity.of(index)
    dataset = replace(
        PG19,
        addresses=(index.as_uri(),),
        sha256=identity.sha256,
        size=identity.size,
        books=replace(
            PG19.books, total={"train": 3, "valid": 2, "test": 2}, listed=listed, words={"valid": 7, "test": 9}
        ),
    )
    monkeypatch.setitem(datasets.DATASETS, "pg-19", dataset)
    return dataset


@pytest.fixture
def source(tmp_path):
    """Books in folders that say nothing of their split, one packed, beside files that are no books."""
    folder = tmp_path / "books"
    (folder / "a" / "b").mkdir(parents=True)
    for number, text in TEXTS.items():
        top = folder / "a" / "b" if number % 2 else folder / "a" if number == 12 else folder
        write(top / f"{number}.txt", text)
    (folder / "12.txt.gz").write_bytes(gzip.compress(TEXTS[12]))
    (folder / "a" / "12.txt").unlink()
    write(folder / "metadata.csv", b"no book")
    write(folder / "a" / "notes.txt", b"no book")
    return folder


def pg19(destdir, *options):
    main(["pg-19", "--destdir", str(destdir), "--workers", "1", *map(str, options)])
    return json.loads((destdir / RECORD).read_text())


def test_books_are_split_by_their_numbers(small, source, tmp_path, capsys):
    """Every book is a document; the words of a listed split are the published ones."""
    data = tmp_path / "data"
    originals = pg19(data, "--source", source, "--bpe", "none")["originals"]
    for split, numbers in {"train": (1, 5, 12), **LISTED}.items():
        lines = [len(TEXTS[number].splitlines()) for number in numbers]
        assert (data / f"{split}.documents").read_text() == "".join(f"{count}\n" for count in lines)
        assert originals[split]["bytes"] == sum(len(TEXTS[number]) for number in numbers)
    train = b"\n".join(TEXTS[number].removesuffix(b"\n") for number in (1, 5, 12)).decode()
    assert tokens_of(data, "train") == (train + "\n").replace("\n", " </s> ").split()
    words = sum(len(TEXTS[number].split()) for number in (1, 5, 12))
    assert (originals["train"]["words"], originals["train"]["counted"]) == (words, WHITE_SPACE)
    assert (originals["valid"]["words"], originals["test"]["words"]) == (7, 9)
    own = sum(len(TEXTS[number].split()) for number in LISTED["test"])
    said = capsys.readouterr().err
    assert f"PG-19's test, all 2 books: 9 words as published, which are those of its perplexity ({own:,} " in said
    assert "subset" not in said


@pytest.mark.parametrize(
    "missing, changed, text",
    [
        ([860], [], "a subset of PG-19's test, 1 of 2 books"),
        ([], [860], "PG-19's test, 2 books, 1 in another text than the published one"),
        ([860], [2544], "a subset of PG-19's test, 1 of 2 books, 1 in another text than the published one"),
    ],
)
def test_other_books_are_counted_by_white_space(missing, changed, text, small, source, tmp_path, capsys):
    """Missing ones make a subset; the published count applies to neither, and the evaluation says so too."""
    for number in missing:
        (source / f"{number}.txt").unlink()
    for number in changed:
        write(source / f"{number}.txt", b"licence\n" + TEXTS[number])
    pg19(tmp_path / "data", "--source", source, "--bpe", "none")
    counts = read_original(str(tmp_path / "data"), "test")
    left = [number for number in LISTED["test"] if number not in missing]
    words = sum(len(TEXTS[number].split()) + (number in changed) for number in left)
    assert (counts.words, counts.counted, counts.text) == (words, WHITE_SPACE, text)
    line = f"\n{text}: {words:,} words between white space, and not the 9 published for all of it\n"
    assert line in capsys.readouterr().err
    said = sentence(report(Totals(nll=1.0, tokens=counts.tokens), Original(counts)))
    assert f"({words:,} between white space in the original text, {text})" in said


def test_perplexity_is_that_of_the_published_count(small, source, tmp_path):
    pg19(tmp_path / "data", "--source", source, "--bpe", "none")
    counts = read_original(str(tmp_path / "data"), "test")
    result = report(Totals(nll=30.0, tokens=counts.tokens), Original(counts))
    assert result["word_perplexity"] == pytest.approx(math.exp(30 / 9))
    assert "a word (9 as published, PG-19's test, all 2 books)" in sentence(result)


def test_a_subset_of_train_is_told(small, source, tmp_path, capsys):
    (source / "12.txt.gz").unlink()
    pg19(tmp_path / "data", "--source", source, "--bpe", "none")
    assert "a subset of PG-19's train, 2 of 3 books: " in capsys.readouterr().err
    write(source / "77.txt", TEXTS[1])
    write(source / "78.txt", TEXTS[1])
    pg19(tmp_path / "data", "--source", source, "--bpe", "none")
    assert "4 books in place of the 3 of PG-19's train: " in capsys.readouterr().err


def test_pieces_by_default(small, source, tmp_path):
    """As many as told, bytes among them for characters that the model does not know."""
    write(source / "860.txt", TEXTS[860] + "\N{SNOWMAN} \N{GREEK SMALL LETTER ALPHA}x\n".encode())
    record = pg19(tmp_path / "data", "--source", source, "--vocab-size", "330")
    assert record["made_from"]["settings"]["training"]["vocab_size"] == 330
    assert record["made_from"]["settings"]["tokenizer"]["bpe"] == "sentencepiece"
    assert "books" not in record["made_from"]["settings"]
    assert record["originals"]["valid"]["words"] == 7
    assert [count["unknown"] for count in record["splits"].values()] == [0, 0, 0]
    tokens = tokens_of(tmp_path / "data", "test")
    assert "<0xE2> <0x98> <0x83>" in " ".join(tokens)
    lines = [SentencePieces(None).decode(line) for line in " ".join(tokens).split("</s>")]
    assert "\N{SNOWMAN} \N{GREEK SMALL LETTER ALPHA}x" in lines
    assert PG19.training.vocab_size == 32_000


def test_books_are_downloaded(small, source, tmp_path, capsys):
    """Each to a file that is fetched once, and again if its checksum is another; nothing of them is needed later."""
    data = tmp_path / "data"
    pg19(tmp_path / "local", "--source", source, "--bpe", "none")
    record = pg19(data, "--bpe", "none")
    local, downloaded = contents(tmp_path / "local"), contents(data)
    assert all(downloaded[name] == local[name] for name in set(local) - {RECORD})
    books = {path.relative_to(data / "books").as_posix(): path for path in (data / "books").rglob("*.txt")}
    assert sorted(books) == sorted(f"{folder}/{number}.txt" for number, folder in FOLDERS.items())
    for path in (tmp_path / "server").rglob("*.txt"):
        if path.name in ("1.txt", "356.txt"):
            path.unlink()
    (data / "test.bin").unlink()
    write(books["test/860.txt"], b"cut")
    assert pg19(data, "--bpe", "none") == record
    assert books["test/860.txt"].read_bytes() == TEXTS[860]
    for path in (*books.values(), data / "metadata.csv"):
        path.unlink()
    assert pg19(data, "--bpe", "none") == record
    assert "nothing to do" in capsys.readouterr().err


def test_a_book_that_is_another_or_not_there(small, tmp_path):
    """It is named, and nothing is made; the books that came are left."""
    data, book = tmp_path / "data", tmp_path / "server" / "validation" / "356.txt"
    write(book, TEXTS[356][:-1] + b"?")
    with pytest.raises(SystemExit, match=r"could not download 356.txt:\n.*its sha256 is"):
        pg19(data, "--bpe", "none")
    assert not (data / "dict.txt").exists() and not (data / "books" / "validation" / "356.txt").exists()
    write(book, TEXTS[356])
    write(data / "books" / "train" / "1.txt.part", b"of another time")
    (data / "books" / "train" / "1.txt").unlink()
    assert pg19(data, "--bpe", "none")["originals"]["valid"]["words"] == 7
    assert (data / "books" / "train" / "1.txt").read_bytes() == TEXTS[1]


def test_what_is_no_source_of_books(small, source, tmp_path):
    def refused(message, *sources):
        with pytest.raises(SystemExit, match=message):
            pg19(tmp_path / "data", "--source", *sources)

    refused("--source takes one folder for PG-19, with a file NUMBER.txt for each book", source, source)
    refused("--source takes one folder for PG-19", source / "metadata.csv")
    refused("there is no such file or folder", tmp_path / "nowhere")
    write(source / "a" / "860.txt", b"once more")
    refused("holds book 860 more than once .*: remove one of the two", source)
    (source / "a" / "860.txt").unlink()
    for number in LISTED["test"]:
        (source / f"{number}.txt").unlink()
    refused("there is no book of test .such as 860.txt.", source)
    assert not (tmp_path / "data" / "dict.txt").exists()


def test_the_published_lists():
    """Their sizes, and every number in one split."""
    books = PG19.books
    assert (books.total, books.words) == (
        {"train": 28_602, "valid": 50, "test": 100},
        {"valid": 3_007_061, "test": 6_966_499},
    )
    assert {split: sum(book.size for book in listed.values()) for split, listed in books.listed.items()} == {
        "valid": 17_733_002,
        "test": 41_289_101,
    }
    entries = [book for listed in books.listed.values() for book in listed.values()]
    assert len({book.sha256 for book in entries}) == 150 and {len(book.sha256) for book in entries} == {64}
    assert [books.split_of(number) for number in (356, 58_093, 860, 58_598, 10)] == [
        "valid",
        "valid",
        "test",
        "test",
        "train",
    ]
