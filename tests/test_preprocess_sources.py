"""Local texts: files, folders, archives and compressed files, whole or not."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile

import numpy as np
import pytest

from preprocess.sources import holds_several, resolve

NAMES = ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens")
# Random bytes do not compress, so that a cut archive is cut inside them.
TEXTS = {name: np.random.default_rng(i).bytes(30_000) for i, name in enumerate(NAMES)}


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
