"""Local texts: files, folders, archives and compressed files, whole or not."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from preprocess.sources import holds_several, resolve

NAMES = ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens")
# Random bytes do not compress, so that a cut archive is cut inside them.
TEXTS = {name: np.random.default_rng(i).bytes(30_000) for i, name in enumerate(NAMES)}


# A train.txt twice, and the others once: nothing says that they belong together.
MIXED = ("books/train.txt", "books/valid.txt", "news/train.txt", "news/test.txt")
SPLIT_NAMES = ("train.txt", "valid.txt", "test.txt")


def in_folder(folder):
    inner = folder / "corpus" / "wikitext"
    inner.mkdir(parents=True)
    for name, text in TEXTS.items():
        (inner / name).write_bytes(text)
    return inner


def in_zip(folder):
    path = folder / "corpus.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in TEXTS.items():
            archive.writestr(f"wikitext/{name}", text)
    return path


def in_tar(folder):
    path = folder / "corpus.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in TEXTS.items():
            member = tarfile.TarInfo(f"wikitext/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    return path


def compressed(folder):
    inner = folder / "compressed"
    inner.mkdir()
    for name, module, end in zip(NAMES, (lzma, gzip, bz2), ("xz", "gz", "bz2"), strict=True):
        (inner / f"{name}.{end}").write_bytes(module.compress(TEXTS[name]))
    return inner


def texts_of(sources, folder):
    return {text.name: text.extracted(folder).read_bytes() for text in resolve(sources, NAMES)}


@pytest.mark.parametrize("make", [in_folder, in_zip, in_tar, compressed])
def test_one_folder_or_archive(tmp_path, make):
    assert texts_of([make(tmp_path)], tmp_path / "work") == TEXTS


def test_one_level_deeper(tmp_path):
    assert texts_of([in_folder(tmp_path).parent], tmp_path / "work") == TEXTS


def test_a_file_each(tmp_path):
    folder, packed = in_folder(tmp_path), compressed(tmp_path)
    sources = [folder / NAMES[0], packed / f"{NAMES[1]}.gz", folder / NAMES[2]]
    assert texts_of(sources, tmp_path / "work") == TEXTS


@pytest.mark.parametrize("make", [in_zip, in_tar])
@pytest.mark.parametrize("kept", [0, 1, 45_000, -100])
def test_a_cut_archive(tmp_path, make, kept):
    path = make(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"(?s){path.name}.*damaged, cut, or not what its name says.*fetch it again"):
        texts_of([path], tmp_path / "work")
    made = [file.name for file in (tmp_path / "work").iterdir()]
    assert set(made) <= set(NAMES)  # no part of a text
    assert all((tmp_path / "work" / name).read_bytes() == TEXTS[name] for name in made)


@pytest.mark.parametrize("damage", ["cut", "changed"])
@pytest.mark.parametrize("name, end", zip(NAMES, ("xz", "gz", "bz2"), strict=True))
def test_a_damaged_compressed_file(tmp_path, name, end, damage):
    path = compressed(tmp_path) / f"{name}.{end}"
    data = bytearray(path.read_bytes())
    data[20_000] ^= 1
    path.write_bytes(data if damage == "changed" else data[:-1000])
    with pytest.raises(ValueError, match=rf"{path.name}.*damaged"):
        texts_of([path.parent], tmp_path / "work")
    assert not (tmp_path / "work" / name).exists()


def test_a_member_that_changed(tmp_path):
    path = in_zip(tmp_path)
    data = bytearray(path.read_bytes())
    data[15_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        texts_of([path], tmp_path / "work")


def test_an_archive_of_something_else(tmp_path):
    path = tmp_path / "other.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"does not hold wiki.train.tokens; it holds readme.txt"):
        texts_of([path], tmp_path / "work")


@pytest.mark.parametrize("change, what", [("flag", "encrypted"), ("method", "compression method")])
def test_a_zip_that_python_does_not_read(tmp_path, change, what):
    path = in_zip(tmp_path)
    data = bytearray(path.read_bytes())
    for mark, flags in (b"PK\x03\x04", 6), (b"PK\x01\x02", 8):  # of a member, and of its entry in the list of all
        at = data.index(mark) + flags
        if change == "flag":
            data[at] |= 1
        else:
            data[at + 2] = 99
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{path.name}: {NAMES[0]} in it cannot be read: .*{what}"):
        texts_of([path], tmp_path / "work")


def test_a_link_to_nothing(tmp_path):
    path = tmp_path / "corpus.tar"
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo(NAMES[0])
        member.type, member.linkname = tarfile.SYMTYPE, "nowhere"
        archive.addfile(member)
    with pytest.raises(ValueError, match=rf"{NAMES[0]} in it is not a file"):
        texts_of([path], tmp_path / "work")


def folder_of(path, members):
    for member in members:
        (path / member).parent.mkdir(parents=True, exist_ok=True)
        (path / member).write_bytes(member.encode())
    return path


def zip_of(path, members):
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
        for member in members:
            archive.writestr(member, member)
    return path.with_suffix(".zip")


def tar_of(path, members):
    with tarfile.open(path.with_suffix(".tgz"), "w:gz") as archive:
        archive.add(folder_of(path, members), ".")  # members are ./books, ./books/train.txt and so on
    return path.with_suffix(".tgz")


def found_in(source, folder, names=SPLIT_NAMES):
    return [text.extracted(folder).read_text() for text in resolve([source], names)]


@pytest.mark.parametrize("make", [folder_of, zip_of, tar_of])
def test_several_texts_of_one_name_are_not_mixed(tmp_path, make):
    source = make(tmp_path / "two", MIXED)
    message = (
        r"holds train\.txt more than once \(.*books/train\.txt, .*news/train\.txt\): .*name one folder, or the files"
    )
    with pytest.raises(ValueError, match=message):
        found_in(source, tmp_path / "work")


def test_several_plain_and_compressed_texts_of_one_name(tmp_path):
    source = folder_of(tmp_path / "two", (*(f"books/{name}" for name in SPLIT_NAMES), "news/train.txt.gz"))
    with pytest.raises(ValueError, match=r"books/train\.txt, .*news/train\.txt\.gz\): name one folder"):
        found_in(source, tmp_path / "work")
    folder_of(source, ["books/train.txt.gz"])
    assert found_in(source / "books", tmp_path / "work") == [f"books/{name}" for name in SPLIT_NAMES]


def test_texts_in_the_folder_itself_go_before_deeper_ones_if_all_are_there(tmp_path):
    source = folder_of(tmp_path / "two", (*SPLIT_NAMES, "old/train.txt", "old/valid.txt"))
    assert found_in(source, tmp_path / "work") == list(SPLIT_NAMES)
    (source / "test.txt").rename(source / "old" / "test.txt")
    with pytest.raises(ValueError, match=r"two/train\.txt, .*two/old/train\.txt\): name one folder"):
        found_in(source, tmp_path / "work")


def test_two_data_sets_in_one_folder(tmp_path):
    members = [f"{data}/{name}" for data in ("wikitext-103", "wikitext-2") for name in NAMES]
    source = folder_of(tmp_path / "data", members)
    with pytest.raises(ValueError, match=r"wikitext-103/wiki\.train\.tokens, .*wikitext-2/wiki\.train\.tokens"):
        found_in(source, tmp_path / "work", NAMES)
    assert found_in(source / "wikitext-2", tmp_path / "work", NAMES) == [f"wikitext-2/{name}" for name in NAMES]


@pytest.mark.parametrize("make", [folder_of, zip_of, tar_of])
def test_what_macos_adds_is_no_text(tmp_path, make):
    added = ["__MACOSX/train.txt", "__MACOSX/corpus/._train.txt", "._corpus/valid.txt", "corpus/._test.txt"]
    texts = [f"corpus/{name}" for name in SPLIT_NAMES]
    assert found_in(make(tmp_path / "corpus", added + texts), tmp_path / "work") == texts
    with pytest.raises((ValueError, FileNotFoundError), match=r"train\.txt") as error:
        found_in(make(tmp_path / "empty", added), tmp_path / "work-of-empty")
    assert "MACOSX" not in str(error.value)


@pytest.mark.parametrize("make", [folder_of, zip_of, tar_of])
def test_a_folder_of_the_same_name_is_no_text(tmp_path, make):
    source = make(tmp_path / "data", ["enwik8/", "enwik8/enwik8"] if make is zip_of else ["enwik8/enwik8"])
    assert found_in(source, tmp_path / "work", ["enwik8"]) == ["enwik8/enwik8"]


def test_a_long_list_of_candidates_is_cut(tmp_path):
    source = zip_of(tmp_path / "many", [f"{i}/train.txt" for i in range(30)])
    with pytest.raises(ValueError, match=r"0/train.txt, .*9/train.txt, \.\.\.\): unpack it"):
        found_in(source, tmp_path / "work")


def test_ends_of_names_in_capitals(tmp_path):
    for path in in_zip(tmp_path), in_tar(tmp_path):
        capitals = path.rename(path.with_name(path.name.upper()))
        assert holds_several(capitals)
        assert texts_of([capitals], tmp_path / f"{path.name}-work") == TEXTS


def test_what_is_missing_is_named(tmp_path):
    folder = in_folder(tmp_path)
    (folder / NAMES[1]).unlink()
    with pytest.raises(FileNotFoundError, match=r"wiki\.valid\.tokens is not there"):
        resolve([folder], NAMES)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        resolve([tmp_path / "nowhere"], NAMES)
    with pytest.raises(ValueError, match=r"names 2 files, and wiki.train.tokens, .* are needed"):
        resolve([folder / NAMES[0], folder / NAMES[2]], NAMES)


def in_parts(folder, *, start=0):
    """The training text in twelve parts, numbered without leading zeros, some of them compressed."""
    folder.mkdir(parents=True)
    for i, at in enumerate(range(0, 30_000, 2_500)):
        part, path = TEXTS[NAMES[0]][at : at + 2_500], folder / f"wiki.train-{i + start}.tokens"
        path.write_bytes(part) if i % 3 else path.with_name(f"{path.name}.xz").write_bytes(lzma.compress(part))
    for name in NAMES[1:]:
        (folder / name).write_bytes(TEXTS[name])
    return folder


@pytest.mark.parametrize("start", [0, 1])
def test_a_text_in_parts(tmp_path, start):
    """They are joined in the order of their numbers, in the folder itself or one level deeper."""
    folder = in_parts(tmp_path / "data" / "parts", start=start)
    assert texts_of([folder], tmp_path / "work") == TEXTS
    assert texts_of([folder.parent], tmp_path / "again") == TEXTS
    (train, *_) = resolve([folder], NAMES)
    assert [path.name.split(".")[1] for path in train.parts] == [f"train-{i + start}" for i in range(12)]


def test_parts_that_do_not_make_a_text(tmp_path):
    folder = in_parts(tmp_path / "parts")
    (folder / "wiki.train-7.tokens").rename(folder / "wiki.train-13.tokens")
    with pytest.raises(FileNotFoundError, match=r"parts of wiki\.train\.tokens .*, but not number 7, 12: fetch"):
        resolve([folder], NAMES)
    (folder / "wiki.train-013.tokens").write_bytes(b"")
    with pytest.raises(ValueError, match=r"part 13 of .* more than once \(.*-013\.tokens, .*-13\.tokens\): remove one"):
        resolve([folder], NAMES)
    folder = in_parts(tmp_path / "beside")
    (folder / NAMES[0]).write_bytes(b"")
    with pytest.raises(ValueError, match=r"wiki\.train\.tokens stands beside parts of it \(wiki\.train-0"):
        resolve([folder], NAMES)


def test_a_damaged_part_is_named(tmp_path):
    folder = in_parts(tmp_path / "parts")
    part = folder / "wiki.train-3.tokens.xz"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"wiki\.train-3\.tokens\.xz .* is damaged"):
        texts_of([folder], tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


def test_a_pipe_is_refused(tmp_path):
    reading, writing = os.pipe()
    os.write(writing, b"a line\n")
    os.close(writing)
    os.mkfifo(tmp_path / "fifo")
    # The first is what a shell makes of <(command).
    for path in (Path(f"/dev/fd/{reading}"), tmp_path / "fifo"):
        with pytest.raises(ValueError, match=rf"--source {path} is a pipe or a device.*write it to a file first"):
            resolve([path], ["text"])
    os.close(reading)
