"""Turn text into fairseq's binary format, in one command for each data set.

    python -m preprocess wikitext-103 --destdir data-bin/wikitext-103
    python -m preprocess enwik8 --destdir data-bin/enwik8 --source enwik8.zip
    python -m preprocess pg-19 --destdir data-bin/pg-19 --source books
    python -m preprocess own --destdir data-bin/own --source train.txt valid.txt test.txt --bpe bytes

A command that was stopped goes on where it was when it is given again; a complete one does nothing.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lamemo_fairseq.arguments import ArgumentParser
from lamemo_fairseq.core.names import nearest_path

from .chunks import CHUNK
from .datasets import DATASETS, SPLITS, Dataset, Divide, FileEach, FirstBytes, Shares
from .download import DownloadError
from .files import no_room
from .pieces import PieceTraining
from .prepare import prepare
from .sources import holds_several
from .tokenization import ByteTokenizer, LineTokenizer, NormalizedLetterTokenizer, Tokenizer
from .words import PIECES, WORDS, moses_languages, versions

WHOLE_TEXT: dict[str, type[Tokenizer]] = {"bytes": ByteTokenizer, "text8": NormalizedLetterTokenizer}
_OWN = Dataset(name="own", files=(), divide=FileEach(), tokenizer=LineTokenizer())


def parser() -> ArgumentParser:
    top = ArgumentParser(
        prog=f"python -m {__package__}",
        description=(__doc__ or "").replace("python -m preprocess", f"python -m {__package__}"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="dataset", required=True, metavar="DATASET")
    for name, dataset in DATASETS.items():
        command = commands.add_parser(name, help=f"from {dataset.addresses[0]}, or --source")
        if dataset.books is None:
            _common(command, f"{', '.join(dataset.files)}: files in this order, or a folder or archive with them")
        else:
            _common(command, "a folder with a file NUMBER.txt for each book, in any sub-folders")
            _coding(command, dataset)
    own = commands.add_parser("own", help="a text of one's own")
    _common(own, "training, validation and test text; or one text; or a folder or archive with train.txt and so on")
    own.add_argument(
        "--shares",
        type=float,
        nargs="+",
        help="proportions of training, validation and test text in one text, or of the first of them (90 5 5)",
    )
    own.add_argument(
        "--first-bytes", type=int, nargs="+", help="bytes to read of each split's text, instead of all of it"
    )
    own.add_argument(
        "--documents",
        action="store_true",
        help="every file is a document: in folders train, valid and test of --source, or numbered parts",
    )
    _coding(own, _OWN)
    count = commands.add_parser("count", help="count the words and bytes of the texts of data that is there already")
    count.add_argument("destdir", type=Path, metavar="FOLDER", help="with dict.txt and the binarized splits")
    count.add_argument("texts", nargs="+", metavar="SPLIT=TEXT", help="the text that a split was made from")
    count.add_argument("--other-lines", action="store_true", help="a split may have other lines than its text")
    return top


def _coding(command: ArgumentParser, dataset: Dataset) -> None:
    """Add the options of words and pieces, with the defaults of a data set."""
    bpe = dataset.tokenizer.bpe if isinstance(dataset.tokenizer, LineTokenizer) else "none"
    pieces = dataset.training or PieceTraining()
    # Options without a default here are None unless they are given, so that options without effect can be refused.
    command.add_argument(
        "--tokenizer", choices=sorted(WORDS), default="space", help="way of dividing a line into words"
    )
    command.add_argument(
        "--bpe",
        choices=sorted({**PIECES, **WHOLE_TEXT}),
        default=bpe,
        help=f"way of splitting words into pieces ({bpe})",
    )
    command.add_argument(
        "--paragraphs", action="store_true", help="join the lines of a paragraph; empty lines separate paragraphs"
    )
    command.add_argument("--pattern", help="regular expression of a word for --tokenizer words")
    command.add_argument("--source-lang", help="language for --tokenizer moses (en)")
    command.add_argument("--sentencepiece-model", type=Path, help="a trained model; without it one is trained")
    command.add_argument("--vocab-size", type=int, help=f"pieces of a model to train ({pieces.vocab_size})")
    command.add_argument("--character-coverage", type=float, help="share of characters with a piece of their own (1)")
    command.add_argument("--threshold", type=int, help="words that occur less often are unknown")
    command.add_argument("--nwords", type=int, help="size of the dictionary, fairseq's own symbols included")
    command.add_argument(
        "--padding-factor", type=int, help=f"fill the dictionary up to a multiple of this ({Dataset.padding_factor})"
    )
    command.add_argument("--srcdict", type=Path, help="a dictionary to use instead of making one")


def _common(command: ArgumentParser, source: str) -> None:
    command.add_argument("--destdir", type=Path, required=True, help="folder for the result")
    command.add_argument("--source", type=Path, nargs="+", default=[], help=source)
    command.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    command.add_argument("--chunk-bytes", type=int, default=CHUNK, help="text that a worker holds at a time")


# Options of words and pieces, and the conditions under which they have an effect.
_NEEDS = {
    "pattern": "--tokenizer words",
    "source_lang": "--tokenizer moses",
    "sentencepiece_model": "--bpe sentencepiece",
    "vocab_size": "--bpe sentencepiece",
    "character_coverage": "--bpe sentencepiece",
}
# Options that name files, and the options of making these files.
_MADE_ALREADY = {
    "sentencepiece_model": ("vocab_size", "character_coverage"),
    "srcdict": ("threshold", "nwords", "padding_factor"),
}


def _given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def _flags(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _refuse_idle(args: argparse.Namespace) -> None:
    """Refuse options that would have no effect or have impossible values, and files that are missing."""
    given = _given(args, _NEEDS)
    if args.bpe in WHOLE_TEXT:
        words = [*["tokenizer"] * (args.tokenizer != "space"), *["paragraphs"] * args.paragraphs]
        if words or given:
            raise ValueError(f"--bpe {args.bpe} takes the text as it is: leave {_flags([*words, *given])} out")
    for name in given:
        if _NEEDS[name] not in (f"--tokenizer {args.tokenizer}", f"--bpe {args.bpe}"):
            raise ValueError(f"{_flags([name])} needs {_NEEDS[name]}")
    for name, path in _given(args, _MADE_ALREADY).items():
        if not path.is_file():
            raise FileNotFoundError(f"{_flags([name])} {path}: there is no such file{nearest_path(path)}")
        if idle := _given(args, _MADE_ALREADY[name]):
            raise ValueError(f"{_flags([name])} is made already: leave {_flags(idle)} out")
    if args.vocab_size is not None and args.vocab_size < 1:
        raise ValueError(f"--vocab-size {args.vocab_size}: a model has at least 1 piece")
    if args.character_coverage is not None and not 0.98 <= args.character_coverage <= 1:
        raise ValueError(f"--character-coverage {args.character_coverage}: SentencePiece takes .98 to 1")


def _say_fallback(language: str) -> None:
    """Warn if the language has no abbreviations: sacremoses, like fairseq with it, takes any code for a language."""
    if language not in (codes := moses_languages()):
        print(
            f"--source-lang {language} is no code of a language whose abbreviations sacremoses knows "
            f"({', '.join(codes)}); for codes that it does not know, it takes the English ones",
            file=sys.stderr,
        )


def _coded(dataset: Dataset, args: argparse.Namespace) -> Dataset:
    """Return the data set with the words and pieces that the options name.

    Raises:
        ValueError: options do not go together, or a package is not installed.
        FileNotFoundError: a file that an option names is missing.
    """
    _refuse_idle(args)
    versions(args.tokenizer, args.bpe)  # before any text is read
    if args.source_lang is not None:
        _say_fallback(args.source_lang)
    training = None
    if args.bpe in WHOLE_TEXT:
        tokenizer = WHOLE_TEXT[args.bpe]()
    else:
        pattern = args.pattern or ""
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"--pattern {pattern} is not a regular expression: {error}") from error
        if args.bpe == "sentencepiece" and args.sentencepiece_model is None:
            given = _given(args, ("vocab_size", "character_coverage"))
            training = replace(dataset.training or PieceTraining(), **given)
        tokenizer = LineTokenizer(
            tokenizer=args.tokenizer,
            bpe=args.bpe,
            paragraphs=args.paragraphs,
            pattern=pattern,
            source_lang=args.source_lang or "en" if args.tokenizer == "moses" else "",
            model=args.sentencepiece_model,
        )
    given = _given(args, ("threshold", "nwords", "padding_factor", "srcdict"))
    closed = args.bpe in WHOLE_TEXT or (training is not None and training.byte_fallback)
    return replace(dataset, tokenizer=tokenizer, closed=closed, training=training, **given)


def _described(args: argparse.Namespace) -> Dataset:
    """Return the description of the data set that the command names.

    Raises:
        ValueError, FileNotFoundError: as for `_coded`, and for the files of one's own text.
    """
    if args.dataset in DATASETS:
        dataset = DATASETS[args.dataset]
        return dataset if dataset.books is None else _coded(dataset, args)
    dataset = _coded(_OWN, args)
    files, divide = _own_files(args.source, args.shares, args.first_bytes)
    if args.documents and isinstance(divide, Shares):
        raise ValueError("--documents takes every file as a document, and --source names one text: leave it out")
    return replace(dataset, files=files, divide=divide, documents=args.documents)


def _own_files(
    sources: list[Path], shares: list[float] | None, first_bytes: list[int] | None
) -> tuple[tuple[str, ...], Divide]:
    if not 1 <= len(sources) <= len(SPLITS):
        raise ValueError("--source takes one text, or two or three for training, validation and test")
    if len(sources) == 1 and not holds_several(sources[0]):
        if first_bytes is not None:
            raise ValueError("--first-bytes needs a file for each split, and --source names one text: leave it out")
        shares = shares or [90, 5, 5]
        if not 1 <= len(shares) <= len(SPLITS) or not all(0 < share < math.inf for share in shares):
            raise ValueError("--shares takes up to three numbers above 0, such as 90 5 5")
        return ("text",), Shares(tuple(shares))
    if shares is not None:
        if len(sources) == 1:
            raise ValueError(
                f"--shares divides one text, and --source {sources[0]} is a folder or archive, which needs train.txt, "
                "valid.txt and test.txt: name the text itself, or leave --shares out"
            )
        raise ValueError("--shares divides one text, and --source has a file for each split: leave --shares out")
    count = len(SPLITS) if len(sources) == 1 else len(sources)
    files = tuple(f"{split}.txt" for split in SPLITS[:count])
    if first_bytes is None:
        return files, FileEach()
    if len(first_bytes) != count or min(first_bytes) < 1:
        raise ValueError(f"--first-bytes takes a number above 0 for each of {', '.join(files)}")
    return files, FirstBytes(tuple(first_bytes))


def _count(args: argparse.Namespace) -> None:
    from .original import count_for  # fairseq takes seconds to import

    for split, text in count_for(args.destdir, args.texts, args.other_lines).items():
        print(f"{split}: {text.words:,} words, {text.bytes:,} bytes, {text.lines:,} lines in {text.text}")


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    try:
        if args.dataset == "count":
            return _count(args)
        if args.workers < 1 or args.chunk_bytes < 1:
            raise ValueError("--workers and --chunk-bytes are at least 1")
        prepare(_described(args), args.destdir, args.source, args.workers, args.chunk_bytes)
    except (ValueError, OSError, DownloadError) as error:
        if no_room(error):
            sys.exit(
                f"preprocess: {error}: there is no room for {args.destdir}. Make some, and give the same command, "
                "which goes on where it was; or choose another --destdir"
            )
        if isinstance(error, PermissionError) and error.filename is not None:  # the system's message has no remedy
            sys.exit(
                f"preprocess: {error.filename}: you have no permission to read or write it: change that, as by "
                "chmod u+rw, or name another"
            )
        sys.exit(f"preprocess: {error}")
    except KeyboardInterrupt:
        sys.exit("preprocess: stopped; the same command goes on from here")


if __name__ == "__main__":
    main()
