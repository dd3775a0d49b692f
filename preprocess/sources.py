"""Local texts: files, folders, archives and compressed files."""

import bz2
import gzip
import json
import lzma
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from lamemo_fairseq.core.names import nearest_path

from .files import blocks, replacing

_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, OSError)


class Source(NamedTuple):
    """A text by its name, and the file that has it: the text itself, or an archive or compressed file that holds it.

    A text in numbered parts (``train-00.txt``, ``train-01.txt.xz``) is read one file after another, as ``cat`` does.
    """

    name: str
    path: Path
    more: tuple[Path, ...] = ()  # parts behind the first

    @property
    def parts(self) -> tuple[Path, ...]:
        return (self.path, *self.more)

    def extracted(self, folder: Path, size: int | None = None) -> Path:
        """Return a plain file with the text, made in *folder* if need be.

        Args:
            size: bytes of the text, where known. No more bytes are written.

        Raises:
            ValueError: the archive is damaged or encrypted, or does not hold the text, or holds a longer one, or the
                text is itself an archive.
        """
        for part in self.parts:
            _refuse_packed(part)
        if not self.more and _opener(self.path) is None:
            return self.path
        target = folder / self.name
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            bar = tqdm(desc=f"extracting {self.name}", unit="B", unit_scale=True, mininterval=1)
            ends = []
            with bar, replacing(target) as file:
                for part in self.parts:
                    self._copy(part, file, bar, size)
                    ends.append(file.tell())
                with replacing(_ends_of(target)) as noted:  # before the text, whose file says that all is done
                    noted.write(json.dumps(ends).encode())
        return target

    def ends(self, extracted: Path) -> list[int]:
        """Return where each part ends in the *extracted* text, in bytes."""
        if extracted == self.path:
            return [extracted.stat().st_size]
        ends: list[int] = json.loads(_ends_of(extracted).read_bytes())
        return ends

    def _copy(self, part: Path, file: IO[bytes], bar: "tqdm[Any]", size: int | None) -> None:
        open_it = _opener(part) or _plain
        try:
            with open_it(part, self.name) as text:
                for block in blocks(text):
                    if size is not None and file.tell() + len(block) > size:
                        raise ValueError(f"{part}: {self.name} in it has more than the {size:,} bytes of the original")
                    file.write(block)
                    bar.update(len(block))
        except _DAMAGE as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # an error of the disk, not of the file
            raise ValueError(
                f"{part} ({part.stat().st_size:,} bytes) is damaged, cut, or not what its name says "
                f"({type(error).__name__}: {error}): fetch it again"
            ) from error
        except RuntimeError as error:  # a zip archive, encrypted or compressed in a way that Python does not know
            raise ValueError(f"{part}: {self.name} in it cannot be read: {error}") from error


def _ends_of(text: Path) -> Path:
    return text.with_name(f"{text.name}.ends")


def resolve(sources: Sequence[Path], names: Sequence[str], folders: bool = False) -> list[Source]:
    """Find the texts called *names*.

    Args:
        folders: whether a text may be a folder of its name, whose files are joined in the order of their names.
        sources: a file for each name, or one folder or archive that holds all of them. In a folder, the files may be
            compressed or in numbered parts. They may be one level deeper if the folder itself does not hold all of
            them.

    Raises:
        FileNotFoundError: a text is missing; the message says which.
        ValueError: the number of files is wrong, or several have the same name, or a numbered part is missing, or a
            path is no regular file.
    """
    existing(sources)
    if folders and len(sources) == 1 and any((sources[0] / PurePath(name).stem).is_dir() for name in names):
        return [_folder_of_parts(sources[0], name) for name in names]
    if len(sources) == 1 and sources[0].is_dir():
        return _in_folder(sources[0], names)
    if len(sources) == 1 and _is_archive(sources[0]):
        return [Source(name, sources[0]) for name in names]
    if len(sources) == len(names) and all(source.is_dir() for source in sources):
        raise ValueError(
            f"--source names {len(sources)} folders: name a file for each of {', '.join(names)}, or one folder that "
            f"holds them. If every file is a document, pass --documents and one folder that holds {_stems(names)}"
        )
    if len(sources) != len(names) or any(source.is_dir() for source in sources):
        raise ValueError(
            f"--source names {len(sources)} files, and {', '.join(names)} are needed: name as many files in this "
            "order, or one folder or archive that holds them"
        )
    return [Source(name, source) for name, source in zip(names, sources, strict=True)]


def existing(sources: Sequence[Path]) -> None:
    """Refuse sources that are neither files nor folders.

    Raises:
        FileNotFoundError, ValueError: a source is missing or of another kind; the message names it.
    """
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"--source {source}: there is no such file or folder{nearest_path(source)}")
        if not (source.is_file() or source.is_dir()):
            raise ValueError(
                f"--source {source} is a pipe or a device, and can be read only once: write it to a file first"
            )


def numbered(folder: Path) -> dict[int, Path]:
    """Return the files ``NUMBER.txt``, compressed or not, in a folder and all folders beneath it, by number.

    Raises:
        ValueError: a number occurs more than once.
    """
    name_of_book = re.compile(rf"(\d+)\.txt(?:{'|'.join(map(re.escape, _COMPRESSED))})?", re.ASCII)
    files: dict[int, Path] = {}
    for top, _, names in os.walk(folder, followlinks=True):
        for name in names:
            path = Path(top, name)
            if (match := name_of_book.fullmatch(name)) and not _added_by_macos(path.relative_to(folder)):
                other = files.setdefault(int(match[1]), path)
                if other != path:
                    raise _several(folder, f"book {match[1]}", [str(other), str(path)], "remove one of the two")
    return files


def _folder_of_parts(folder: Path, name: str) -> Source:
    parts = folder / PurePath(name).stem
    if not parts.is_dir():
        raise FileNotFoundError(f"--source {folder}: the folder {parts.name} with the documents of {name} is not there")
    files = sorted(path for path in parts.iterdir() if path.is_file() and not path.name.startswith("."))
    if not files:
        raise FileNotFoundError(f"--source {folder}: the folder {parts.name} has no file")
    return Source(name, files[0], tuple(files[1:]))


def _in_folder(folder: Path, names: Sequence[str]) -> list[Source]:
    by_name = {name: _one_a_folder(folder, name) for name in names}
    all_in_itself = all(sources and sources[0].path.parent == folder for sources in by_name.values())
    for name, sources in by_name.items():
        if not sources:
            inside = [path.name for path in sorted(folder.iterdir()) if not _added_by_macos(PurePath(path.name))]
            raise FileNotFoundError(
                f"--source {folder}: {name} is not there, nor one level deeper; the folder holds "
                f"{_first(inside) or 'nothing'}{_if_documents(folder, names)}"
            )
        if len(sources) > 1 and not all_in_itself:
            raise _several(folder, name, [str(source.path) for source in sources], "name one folder, or the files")
    return [sources[0] for sources in by_name.values()]


def _if_documents(folder: Path, names: Sequence[str]) -> str:
    """Return the end of a message on texts that are missing where there are folders of their names."""
    if not all((folder / PurePath(name).stem).is_dir() for name in names):
        return ""
    return f". If every file in {_stems(names)} is a document, pass --documents"


def _stems(names: Sequence[str]) -> str:
    *first, last = (PurePath(name).stem for name in names)
    return f"{', '.join(first)} and {last}" if first else last


def _one_a_folder(folder: Path, name: str) -> list[Source]:
    """Find a text in *folder*, and then one level deeper."""
    named = PurePath(name)
    part = re.compile(rf"{re.escape(named.stem)}(?:-(\d+))?{re.escape(named.suffix)}")
    files: dict[Path, dict[int | None, Path]] = {}  # by folder and part
    for pattern in (f"{named.stem}*", f"*/{named.stem}*"):
        for end in ("", *_COMPRESSED):  # the plain file comes before a compressed one
            for path in sorted(folder.glob(f"{pattern}{named.suffix}{end}")):
                match = part.fullmatch(path.name.removesuffix(end))
                if match and path.is_file() and not _added_by_macos(path.relative_to(folder)):
                    number = None if match[1] is None else int(match[1])
                    first = files.setdefault(path.parent, {}).setdefault(number, path)
                    if not first.name.startswith(match[0]):  # train-1.txt and train-01.txt
                        raise _several(
                            folder, f"part {number} of {name}", [first.name, path.name], "remove one of the two"
                        )
    return [Source(name, *_joined(name, parts)) for parts in files.values()]


def _joined(name: str, parts: dict[int | None, Path]) -> tuple[Path, tuple[Path, ...]]:
    """Return the text with its numbered parts in their order; a text that is not divided is its only part."""
    whole = parts.pop(None, None)
    numbers = sorted(number for number in parts if number is not None)
    ordered = [parts[number] for number in numbers]
    if whole is not None:
        if ordered:
            raise ValueError(
                f"{whole} stands beside parts of it ({_first([p.name for p in ordered])}): "
                "remove one of the two, or name the files"
            )
        return whole, ()
    missing = sorted(set(range(min(1, numbers[0]), numbers[-1] + 1)) - set(numbers))
    if missing:
        raise FileNotFoundError(
            f"{ordered[0].parent} holds parts of {name} ({_first([p.name for p in ordered])}), but not number "
            f"{_first([str(number) for number in missing])}: fetch what is missing"
        )
    return ordered[0], tuple(ordered[1:])


def _added_by_macos(path: PurePath) -> bool:
    return any(part == "__MACOSX" or part.startswith("._") for part in path.parts)


def _several(source: Path, name: str, candidates: Sequence[str], hint: str) -> ValueError:
    return ValueError(f"--source {source} holds {name} more than once ({_first(candidates)}): {hint}")


def _first(names: Sequence[str]) -> str:
    return ", ".join([*names[:10], *["..."] * (len(names) > 10)])


Opener = Callable[[Path, str], AbstractContextManager[Any]]


@contextmanager
def _in_zip(path: Path, name: str) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(path) as archive:
        members = [member.filename for member in archive.infolist() if not member.is_dir()]
        member = archive.getinfo(_member(path, members, name))
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):  # the content of a link is its target
            raise ValueError(f"{path}: {name} in it is not a file")
        with archive.open(member) as text:
            yield text


@contextmanager
def _in_tar(path: Path, name: str) -> Iterator[IO[bytes]]:
    with tarfile.open(path) as archive:
        members = [member.name for member in archive.getmembers() if not member.isdir()]
        text = None
        with suppress(KeyError):  # a link to a file that the archive does not hold
            text = archive.extractfile(_member(path, members, name))
        if text is None:
            raise ValueError(f"{path}: {name} in it is not a file")
        with text:
            yield text


def _member(path: Path, members: Sequence[str], name: str) -> str:
    members = [member for member in dict.fromkeys(members) if not _added_by_macos(PurePosixPath(member))]
    matches = [member for member in members if PurePosixPath(member).name == name]
    if not matches:
        raise ValueError(f"{path} does not hold {name}; it holds {_first(members) or 'nothing'}")
    if len(matches) > 1:
        raise _several(path, name, matches, "unpack it, and name one folder, or the files")
    return matches[0]


_ARCHIVES: dict[str, Opener] = {".zip": _in_zip, ".tar": _in_tar, ".tgz": _in_tar}
_ARCHIVES |= dict.fromkeys((".tar.gz", ".tar.bz2", ".tar.xz"), _in_tar)
_COMPRESSED: dict[str, Opener] = {
    ".gz": lambda path, name: gzip.open(path),  # noqa: SIM115
    ".bz2": lambda path, name: bz2.open(path),  # noqa: SIM115
    ".xz": lambda path, name: lzma.open(path),  # noqa: SIM115
}


# First bytes of compressed files, and the end of their name, None if this kind is not decompressed.
_PACKED = (
    (rb"\x1f\x8b", ".gz"),
    (rb"BZh[1-9]1AY&SY", ".bz2"),
    (rb"\xfd7zXZ\0", ".xz"),
    (rb"PK\x03\x04", ".zip"),
    (rb"\x28\xb5\x2f\xfd|7z\xbc\xaf\x27\x1c|Rar!\x1a\x07", None),
)


def _refuse_packed(path: Path) -> None:
    """Refuse a compressed file whose name says that it is a text."""
    if _opener(path) is not None:
        return
    with open(path, "rb") as file:
        begin = file.read(10)
    for pattern, end in _PACKED:
        if re.match(pattern, begin):
            remedy = "unpack it first" if end is None else f"name it {path.name}{end}, and it is unpacked"
            raise ValueError(f"--source {path} begins like a packed file, not like a text: {remedy}")


def _plain(path: Path, name: str) -> AbstractContextManager[Any]:
    return open(path, "rb")


def _is_archive(path: Path) -> bool:
    return path.name.lower().endswith(tuple(_ARCHIVES))


def _opener(path: Path) -> Opener | None:
    for end, opener in (_ARCHIVES | _COMPRESSED).items():
        if path.name.lower().endswith(end):
            return opener
    return None


def holds_several(path: Path) -> bool:
    """Return whether a path is a folder or an archive."""
    return path.is_dir() or _is_archive(path)
