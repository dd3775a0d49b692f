"""Turn a data set's description into a folder that fairseq reads.

All unfinished files are in ``DEST/unfinished``, in a folder named after the sources and options. Finished files move to
DEST, where ``preprocess.json`` records their sources and options, and lists all files that this command puts there.
DEST is complete when all of these are there; ``dict.txt`` comes last.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lamemo_fairseq.core.folder import make_folder
from lamemo_fairseq.locks import lock

from . import hints
from .chunks import CHUNK, Chunk, cut, encode
from .datasets import SPLITS, Dataset, WrongText
from .download import download
from .files import Identity, Span, no_text, replacing
from .sources import Source, resolve
from .tokenization import LineTokenizer, Tokenizer
from .words import versions

RECORD = "preprocess.json"
COUNTED = "original.json"  # by `python -m preprocess count`, from a text that may be another one now
UNFINISHED = "unfinished"
_BOOKS = "books"
# A change of any of these makes everything anew. One's own text may begin with a byte order mark.
_LAYOUT, _LAYOUT_OF_OWN = 1, 2
_OF_DATA = re.compile(
    rf"dict\.txt$|.*\.idx$|({'|'.join(SPLITS)})\.(bin|documents)$|sentencepiece\.bpe\.model$|{re.escape(COUNTED)}$"
)


def prepare(
    dataset: Dataset, destdir: Path, sources: Sequence[Path] = (), workers: int = 1, chunk_bytes: int = CHUNK
) -> dict[str, Any]:
    """Make the binarized data set, or check that it is complete already.

    Args:
        sources: local files, or one folder or archive; without them the data set is downloaded.
        workers: processes. The result does not depend on it.
        chunk_bytes: text that a worker holds at a time.

    Returns:
        The record of the data that was made.

    Raises:
        WrongText: the text is not the one that was asked for.
        ValueError: the text cannot be read.
        FileNotFoundError: a source is missing.
        FileExistsError: the folder holds files of another origin.
        DownloadError: the data set cannot be downloaded.
    """
    texts = _local(dataset, sources) if sources else []  # a missing one leaves no folder behind
    _refuse_others(destdir, dataset, texts)
    make_folder(destdir, "--destdir")
    with _alone(destdir):
        made_from = _made_from(dataset, texts, chunk_bytes)
        record = _read_record(destdir)
        if record is not None and record["made_from"] == made_from and _is_whole(destdir, record):
            _discard(destdir / UNFINISHED)
            _say(f"{destdir} is complete already: nothing to do")
            return record
        if record is not None and (former := record["made_from"]["settings"]["name"]) != dataset.name:
            raise FileExistsError(
                f"{destdir} holds data made by `python -m {__package__} {former}`: remove it, or choose another "
                f"--destdir for {dataset.name}"
            )
        if not texts:
            texts = _downloaded(dataset, destdir)
        work = _work_folder(destdir, made_from)
        try:
            files = [_checked(_extracted(text, work, dataset), text, dataset) for text in texts]
            ends = {file: text.ends(file) for file, text in zip(files, texts, strict=True) if dataset.documents}
            made = _make(dataset, files, ends, work, workers, chunk_bytes)
        except WrongText:
            _discard(destdir / UNFINISHED)
            raise
        return _publish(destdir, work, {"made_from": made_from, **made}, record)


def _refuse_others(destdir: Path, dataset: Dataset, texts: Sequence[Source]) -> None:
    """Refuse a folder without a record whose files are neither to be read nor left by an interrupted run.

    Raises:
        FileExistsError: the folder holds such a file. Nothing is written.
    """
    names = sorted(os.listdir(destdir)) if destdir.is_dir() else []
    if not names or RECORD in names:
        return
    model = dataset.tokenizer.model if isinstance(dataset.tokenizer, LineTokenizer) else None
    inputs = [*(part for text in texts for part in text.parts), *filter(None, (dataset.srcdict, model))]
    absolute = [Path(os.path.abspath(path)) for path in inputs]
    read = {path for file in absolute for path in (file, *file.parents)}
    begun = {UNFINISHED}
    if dataset.addresses:
        begun |= {_BOOKS, dataset.archive, f"{dataset.archive}.part"}
    for name in names:
        expected = name.startswith(".") or name in begun or Path(os.path.abspath(destdir / name)) in read
        if _OF_DATA.match(name) or not expected:
            raise FileExistsError(
                f"{destdir} holds {name}, which this command did not make: choose another --destdir, such as "
                f"{destdir / 'data-bin'}"
            )


def _made_from(dataset: Dataset, texts: Sequence[Source], chunk_bytes: int) -> dict[str, Any]:
    """Return everything that the result depends on, as it reads back from JSON."""
    if texts:
        paths = [part for text in texts for part in text.parts]
        known = {path: Identity.of(path) for path in set(paths)}
        inputs = [known[path] for path in (paths if len(known) > 1 else known)]  # one archive counts once
    elif dataset.addresses:
        inputs = [Identity(dataset.archive, dataset.size or 0, dataset.sha256)]
    else:
        raise ValueError(f"{dataset.name}: name the text with --source")
    settings = asdict(dataset)
    del settings["at_most"], settings["books"]  # of a download, not of its result; the same for every text of this name
    if not dataset.documents:  # as in records from before the option existed
        del settings["documents"]
    if dataset.training is not None and not dataset.training.byte_fallback:
        del settings["training"]["byte_fallback"]
    tokenizer = dataset.tokenizer
    if dataset.srcdict is not None:
        settings["srcdict"] = Identity.of(dataset.srcdict)
    if isinstance(tokenizer, LineTokenizer):
        if tokenizer.model is not None:
            settings["tokenizer"]["model"] = Identity.of(tokenizer.model)
        settings["versions"] = versions(tokenizer.tokenizer, tokenizer.bpe)
    layout = _LAYOUT if dataset.addresses else _LAYOUT_OF_OWN
    made_from = {"layout": layout, "inputs": inputs, "settings": settings, "chunk_bytes": chunk_bytes}
    return json.loads(json.dumps(made_from))


def _local(dataset: Dataset, sources: Sequence[Path]) -> list[Source]:
    if dataset.books is not None:
        return dataset.books.resolve(sources)
    return resolve(sources, dataset.files, folders=dataset.documents)


def _downloaded(dataset: Dataset, destdir: Path) -> list[Source]:
    archive = destdir / dataset.archive
    if not (archive.exists() and Identity.of(archive).sha256 == dataset.sha256):
        download(dataset.addresses, archive, dataset.sha256, dataset.size, at_most=dataset.at_most)
    if dataset.books is not None:
        dataset.books.download(dataset.addresses[0].rpartition("/")[0], archive, destdir / _BOOKS)
        return dataset.books.resolve([destdir / _BOOKS])
    return [Source(name, archive) for name in dataset.files]


def _extracted(text: Source, work: Path, dataset: Dataset) -> Path:
    known = dataset.contents.get(text.name)
    return text.extracted(work / "texts", None if known is None else known.size)


def _checked(file: Path, text: Source, dataset: Dataset) -> Path:
    """Return the text's file, if its contents are those known by this name."""
    expected = dataset.contents.get(text.name)
    if expected is not None:
        real = Identity.of(file)
        if (real.size, real.sha256) != (expected.size, expected.sha256):
            raise WrongText(
                f"{text.path} does not hold the original {text.name}: {real.size:,} bytes with sha256 {real.sha256}, "
                f"instead of {expected.size:,} bytes with sha256 {expected.sha256}"
            )
    return file


def _make(
    dataset: Dataset,
    files: Sequence[Path],
    ends: Mapping[Path, Sequence[int]],
    work: Path,
    workers: int,
    chunk_bytes: int,
) -> dict[str, Any]:
    """Write all files of DEST to ``work/made``; return messages about them. *ends* are the documents' ends."""
    from . import binarize  # fairseq takes seconds to import, and workers share the modules that are imported before

    dictionary = None if dataset.srcdict is None else binarize.load_dictionary(dataset.srcdict)
    tokenizer = dataset.tokenizer
    splits = dataset.divide(files, tokenizer)
    for split, span in splits.items():
        if span.size <= 0:
            raise no_text(split, span)
    if dataset.training is not None and isinstance(tokenizer, LineTokenizer):
        model = work / "sentencepiece.model"
        if not model.exists():
            dataset.training.run(splits["train"], tokenizer, model)
        tokenizer = replace(tokenizer, model=model)

    documents = {split: span.divided(ends.get(span.path, ())) for split, span in splits.items()}
    chunks = _chunks(documents, tokenizer, work / "chunks", chunk_bytes)
    encode([chunk for split in chunks.values() for chunk in split], tokenizer, workers)
    encoded = {split: [chunk.encoded for chunk in of_split] for split, of_split in chunks.items()}

    occurring = {split: binarize.count_symbols(paths) for split, paths in encoded.items()}
    for split, symbols in occurring.items():
        if not symbols:  # blank lines only
            raise no_text(split, splits[split])
    counts, everywhere = occurring["train"], set().union(*occurring.values())
    words = not _cut_already(tokenizer, counts)
    if dataset.closed:
        counts = Counter({symbol: counts[symbol] for symbol in everywhere})
    if dictionary is None:
        dictionary = binarize.make_dictionary(counts, dataset.threshold, dataset.nwords, dataset.padding_factor)
    made = work / "made"
    shutil.rmtree(made, ignore_errors=True)  # files that a killed run left in it
    made.mkdir()
    written = {split: binarize.write_split(made / split, paths, dictionary) for split, paths in encoded.items()}
    if dataset.documents:
        for split, of_split in documents.items():
            binarize.write_documents(made / split, of_split, chunks[split])
            if len(of_split) == 1 and dataset.books is None:
                _say(f"hint: {hints.single_document(split)}")
    _check_counts(dataset, {split: count.tokens for split, count in written.items()}, len(everywhere))
    for name, path in tokenizer.files().items():
        with replacing(made / name) as file:
            file.write(path.read_bytes())
    binarize.save_dictionary(dictionary, made / "dict.txt")
    return {
        "splits": {split: count._asdict() for split, count in written.items()},
        "originals": {
            split: _original(dataset, split, of_split, written[split].tokens)
            for split, of_split in documents.items()
            if words
        },
        "types": len(everywhere),
        "dictionary": len(dictionary),
    }


def _chunks(
    documents: Mapping[str, Sequence[Span]], tokenizer: Tokenizer, folder: Path, chunk_bytes: int
) -> dict[str, list[Chunk]]:
    """Cut the documents of each split. A line or a word does not go on from one document to the next."""
    folder.mkdir(exist_ok=True)
    chunks: dict[str, list[Chunk]] = {split: [] for split in documents}
    for split, of_split in documents.items():
        for document in of_split:
            for part in cut(document, tokenizer.boundary, chunk_bytes):
                file = folder / f"{split}-{len(chunks[split]):06d}.npz"
                chunks[split].append(Chunk(part, file, more=part.stop < document.stop))
    return chunks


def _original(dataset: Dataset, split: str, documents: Sequence[Span], tokens: int) -> dict[str, Any]:
    """Return the counts of a split's text; for books, say which of the published books the split has."""
    from . import original

    counts = original.count_split(documents, tokens)
    if dataset.books is None:
        return counts
    counts, line = dataset.books.counted(split, documents, counts)
    _say(line)
    return counts


def _cut_already(tokenizer: Tokenizer, counts: Mapping[str, int]) -> bool:
    """Print a hint on the kind of text that its symbols suggest; return whether they are pieces of words."""
    if not isinstance(tokenizer, LineTokenizer) or tokenizer.bpe != "none":
        return False
    if tokenizer.tokenizer == "space" and (cut := hints.cut_into_pieces(counts)):
        _say(
            f"hint: the text {cut}. For losses per word and per byte, count the text as it was before: "
            f"python -m {__package__} count DESTDIR test=TEXT"
        )
        return True
    if hint := hints.without_spaces(counts):
        _say(f"hint: {hint}")
    return False


def _check_counts(dataset: Dataset, tokens: Mapping[str, int], types: int) -> None:
    wrong = [
        f"{split} has {tokens.get(split, 0):,} tokens, not {expected:,}"
        for split, expected in dataset.tokens.items()
        if tokens.get(split, 0) != expected
    ]
    if dataset.types is not None and types != dataset.types:
        wrong.append(f"there are {types:,} types, not {dataset.types:,}")
    if wrong:
        raise WrongText(
            f"this is not the original {dataset.name}, and nothing was written: {'; '.join(wrong)}. "
            "Any other text goes through the command `own`"
        )


def _publish(destdir: Path, work: Path, record: dict[str, Any], former: dict[str, Any] | None) -> dict[str, Any]:
    """Move the finished files to DEST. At any moment the record there lists all files that must go if this is stopped.
    dict.txt, without which fairseq opens nothing, goes first and comes last."""
    made = sorted((path.name for path in (work / "made").iterdir()), key=lambda name: (name == "dict.txt", name))
    record = {**record, "files": {name: Identity.of(work / "made" / name)._asdict() for name in made}}
    dictionary = (former or {"files": {}})["files"].get("dict.txt")
    if dictionary not in (None, record["files"]["dict.txt"]):
        _say(f"{destdir / 'dict.txt'} changes: models trained on the former data do not fit the new one")
    for name in ("dict.txt", COUNTED, *(former or {"files": {}})["files"]):
        (destdir / name).unlink(missing_ok=True)
    with replacing(work / RECORD) as file:
        file.write(json.dumps(record, indent=1).encode() + b"\n")
    os.replace(work / RECORD, destdir / RECORD)
    for name in made:
        os.replace(work / "made" / name, destdir / name)
    _discard(destdir / UNFINISHED)
    for split, count in record["splits"].items():
        _say(f"{split}: {count['tokens']:,} tokens in {count['lines']:,} lines, {count['unknown']:,} unknown")
    _say(f"{record['types']:,} types in all splits, {record['dictionary']:,} words in {destdir / 'dict.txt'}")
    for hint in hints.of_the_result(record["splits"], record["files"]):
        _say(f"hint: {hint}")
    return record


def _read_record(destdir: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((destdir / RECORD).read_text(encoding="utf-8"))
        str(record["made_from"]["settings"]["name"])
        for name, entry in record["files"].items():
            Identity(**entry)
            if name in ("", ".", "..") or "/" in name or "\0" in name:
                raise ValueError(f"it lists {name!r}, which is no file of the folder")
        return record
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{destdir / RECORD} is damaged ({error}): remove {destdir}, or choose another --destdir"
        ) from error


def _is_whole(destdir: Path, record: dict[str, Any]) -> bool:
    return all(Identity(**entry).is_at(destdir / name) for name, entry in record["files"].items())


def _work_folder(destdir: Path, made_from: dict[str, Any]) -> Path:
    """Return the folder for this input and these options; unfinished files of other inputs are removed."""
    name = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    work = destdir / UNFINISHED / name
    work.mkdir(parents=True, exist_ok=True)
    _discard(work.parent, but=work)
    return work


def _discard(unfinished: Path, but: Path | None = None) -> None:
    """Remove the folders of unfinished work, and nothing else: theirs may be a link to a larger disk, or a user's."""
    for folder in unfinished.glob("*"):
        if folder != but and re.fullmatch("[0-9a-f]{16}", folder.name):
            shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        unfinished.rmdir()


@contextmanager
def _alone(destdir: Path) -> Iterator[None]:
    """Lock the folder in this context: two runs in one folder would take each other's files."""
    with open(destdir / ".lock", "a") as file:
        try:
            lock(file.fileno(), destdir)
        except BlockingIOError as error:
            raise FileExistsError(f"another run is at work in {destdir}") from error
        yield


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)
