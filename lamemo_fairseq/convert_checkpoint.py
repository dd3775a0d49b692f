"""Convert checkpoints to other formats.

    python -m lamemo_fairseq.convert_checkpoint import RELEASED.pt FOLDER    writes checkpoint.pt and dict.txt
    python -m lamemo_fairseq.convert_checkpoint export CHECKPOINT.pt RELEASED.pt --dictionary dict.txt
    python -m lamemo_fairseq.convert_checkpoint core CHECKPOINT.pt FOLDER --dictionary dict.txt
    python -m lamemo_fairseq.convert_checkpoint export --format transformers CHECKPOINT FOLDER
    python -m lamemo_fairseq.convert_checkpoint import --format transformers FOLDER FOLDER

The first two are for checkpoints of the authors' code and of the original Transformer-XL. The third writes a folder
that `lamemo_fairseq.core.LanguageModel.load` reads without fairseq. It has dict.txt and a record of how the text became
tokens, from the data folder's record or from --tokenizer and --bpe. The fourth writes a folder that transformers reads,
from such a folder or from fairseq's checkpoint with --dictionary. The fifth turns it into a folder of the third kind
again. Folders need no fairseq.
"""

import argparse
import signal
import sys
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, List, Optional

from .arguments import ArgumentParser
from .core.folder import CONFIG, make_folder
from .core.names import missing_checkpoint, nearest_path

if TYPE_CHECKING:
    from .core import LanguageModel

FORMATS = ("released", "transformers")
ENCODING = ("tokenizer", "source_lang", "bpe", "sentencepiece_model", "bpe_codes")


def main(arguments: Optional[List[str]] = None) -> None:
    args = _parser().parse_args(arguments)
    try:
        if args.command == "core":
            written = _to_core(args)
        elif args.format == "transformers":
            written = _import_transformers(args) if args.command == "import" else _export_transformers(args)
        else:
            written = _import_released(args) if args.command == "import" else _export_released(args)
        print(f"wrote {written}")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"convert_checkpoint: {error}")
    except KeyboardInterrupt:
        print("convert_checkpoint: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    to_fairseq = commands.add_parser("import", help="released checkpoint to fairseq's, or transformers' to the core's")
    to_fairseq.add_argument("source", help="released checkpoint, or a folder of transformers")
    to_fairseq.add_argument("folder")
    to_fairseq.add_argument("--format", choices=FORMATS, default="released", help="format of the input")
    to_fairseq.add_argument("--vocabulary", help="a word a line, where the released checkpoint holds none")
    back = commands.add_parser("export", help="fairseq checkpoint to a released one, or a model to transformers'")
    back.add_argument("checkpoint", help="fairseq's, or with --format transformers a folder of the core")
    back.add_argument("target", help="released checkpoint, or a folder for transformers")
    back.add_argument("--format", choices=FORMATS, default="released", help="format of the output")
    to_core = commands.add_parser("core", help="fairseq checkpoint to a folder for lamemo_fairseq.core")
    to_core.add_argument("checkpoint")
    to_core.add_argument("folder")
    for command in (back, to_core):
        command.add_argument("--dictionary", required=command is to_core, help="dict.txt of the checkpoint's data")
        _add_encoding_options(command)
    return parser


def _add_encoding_options(parser: ArgumentParser) -> None:
    """Add options under fairseq's names."""
    group = parser.add_argument_group("how the text became tokens, where the dictionary's folder does not record it")
    group.add_argument("--tokenizer", choices=("space", "moses"))
    group.add_argument("--source-lang", help="language for the Moses tokenizer")
    group.add_argument("--bpe", choices=("sentencepiece", "subword_nmt", "bytes", "characters"))
    group.add_argument("--sentencepiece-model", metavar="FILE")
    group.add_argument(
        "--bpe-codes", metavar="FILE", help="codes of subword_nmt; without them, texts have to be in pieces already"
    )


def _import_released(args: argparse.Namespace) -> str:
    from .checkpoints.convert import check_released, import_checkpoint, load_plain, save, save_dictionary, words_of
    from .data.text import read_text

    _need_file(args.source)
    released = load_plain(args.source)
    check_released(released, args.source)
    vocabulary = released.get("vocab")
    if args.vocabulary:
        if not Path(args.vocabulary).is_file():
            raise FileNotFoundError(
                f"--vocabulary {args.vocabulary}: there is no such file{nearest_path(args.vocabulary)}"
            )
        vocabulary = StringIO(read_text(args.vocabulary), newline=None).read().removesuffix("\n").split("\n")
    checkpoint, dictionary = import_checkpoint(released, words_of(vocabulary))
    folder = Path(args.folder)
    _refuse_itself(args.source, folder / "checkpoint.pt", "folder")
    replaces = _replaces(folder / "checkpoint.pt", folder / "dict.txt")
    make_folder(folder)
    save_dictionary(dictionary, folder / "dict.txt")
    save(checkpoint, folder / "checkpoint.pt")
    return f"{folder / 'checkpoint.pt'} and {folder / 'dict.txt'}{replaces}"


def _export_released(args: argparse.Namespace) -> str:
    _refuse(args, [name for name in ENCODING if getattr(args, name)], "is for --format transformers: pass that too")
    _need_dictionary(args)
    from .checkpoints.convert import export_checkpoint, save
    from .data.binarized import load_dictionary
    from .host.configuration import read_ours

    target = Path(args.target)
    _refuse_itself(args.checkpoint, target, "file")
    replaces = _replaces(target)
    save(export_checkpoint(read_ours(args.checkpoint), load_dictionary(args.dictionary)), target)
    return f"{target}{replaces}"


def _export_transformers(args: argparse.Namespace) -> str:
    if not Path(args.checkpoint).exists():
        raise FileNotFoundError(_missing(args.checkpoint))
    from .core import LanguageModel
    from .huggingface.folder import export_folder

    replaces = _replaces(Path(args.target, CONFIG))
    if Path(args.checkpoint).is_dir():
        given = [name for name in ("dictionary", *ENCODING) if getattr(args, name)]
        _refuse(args, given, "is for a checkpoint of fairseq, and this is a folder: leave it out")
        export_folder(LanguageModel.load(args.checkpoint), Path(args.target))
    else:
        export_folder(_from_fairseq(args), Path(args.target))
    return f"{args.target}, for transformers{replaces}"


def _import_transformers(args: argparse.Namespace) -> str:
    from .core import LanguageModel

    _refuse(args, ["vocabulary"] if args.vocabulary else [], "is for --format released: leave it out")
    replaces = _replaces(Path(args.folder, CONFIG))
    LanguageModel.load(args.source).save(args.folder)
    return f"{args.folder}, for LanguageModel.load{replaces}"


def _to_core(args: argparse.Namespace) -> str:
    replaces = _replaces(Path(args.folder, CONFIG))
    _from_fairseq(args).save(args.folder)
    return f"{args.folder}, for LanguageModel.load{replaces}"


def _from_fairseq(args: argparse.Namespace) -> "LanguageModel":
    """Return fairseq's checkpoint as a model of the core, with its tokenizer."""
    _need_dictionary(args)
    from .checkpoints.to_core import chosen_encoding, core_model, core_tokenizer
    from .data.binarized import load_dictionary
    from .host.configuration import read_ours

    dictionary = load_dictionary(args.dictionary)
    tokenizer = core_tokenizer(dictionary, chosen_encoding(args))
    model = core_model(read_ours(args.checkpoint), dictionary)
    model.tokenizer = tokenizer
    return model


def _need_file(checkpoint: str) -> None:
    if Path(checkpoint, CONFIG).is_file():
        raise ValueError(
            f"{checkpoint} is a model's folder: pass a checkpoint's file, or export or import it with --format "
            "transformers"
        )
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(_missing(checkpoint))


def _missing(checkpoint: str) -> str:
    """Return the message on a checkpoint, or folder of the core, that is not there."""
    near = nearest_path(checkpoint)
    return f"there is no checkpoint {checkpoint}{near}" if near else missing_checkpoint(checkpoint)


def _replaces(*written: Path) -> str:
    """Return the end of the report on files to write, which names those that they take the place of."""
    former = [str(path) for path in written if path.exists()]
    return f"; the former {' and '.join(former)} {'is' if len(former) == 1 else 'are'} replaced" if former else ""


def _refuse_itself(source: str, target: Path, kind: str) -> None:
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target} is the checkpoint to convert, and would be lost: pass another {kind}")


def _need_dictionary(args: argparse.Namespace) -> None:
    _need_file(args.checkpoint)
    if not args.dictionary:
        raise ValueError(f"{args.checkpoint} is a checkpoint of fairseq: pass --dictionary, the dict.txt of its data")
    if not Path(args.dictionary).is_file():
        remedy = nearest_path(args.dictionary) or ", pass the dict.txt of the checkpoint's data"
        raise FileNotFoundError(f"--dictionary {args.dictionary}: there is no such file{remedy}")


def _refuse(args: argparse.Namespace, given: List[str], reason: str) -> None:
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')} {getattr(args, given[0])} {reason}")


if __name__ == "__main__":
    main()
