"""Checkpoints in other formats.

    python -m lamemo_fairseq.convert_checkpoint import RELEASED.pt FOLDER    writes checkpoint.pt and dict.txt
    python -m lamemo_fairseq.convert_checkpoint export CHECKPOINT.pt RELEASED.pt --dictionary dict.txt
    python -m lamemo_fairseq.convert_checkpoint core CHECKPOINT.pt FOLDER --dictionary dict.txt

The first two are for checkpoints of the authors' code and of the original Transformer-XL. The third writes what
`lamemo_fairseq.core.LanguageModel.load` reads without fairseq, with dict.txt and how the text became tokens: as the
data folder records it, or as --tokenizer and --bpe say.
"""

import argparse
import sys
from pathlib import Path
from typing import List, Optional

from .checkpoints.convert import export_checkpoint, import_checkpoint, load_plain, save, save_dictionary, words_of
from .checkpoints.to_core import add_encoding_options, chosen_encoding, core_model, core_tokenizer
from .data.binarized import load_dictionary
from .host.configuration import read_ours


def main(arguments: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    to_fairseq = commands.add_parser("import", help="released checkpoint to fairseq's")
    to_fairseq.add_argument("released")
    to_fairseq.add_argument("folder")
    to_fairseq.add_argument("--vocabulary", help="a word a line, where the checkpoint holds none")
    back = commands.add_parser("export", help="fairseq checkpoint to a released one")
    back.add_argument("checkpoint")
    back.add_argument("released")
    back.add_argument("--dictionary", required=True, help="dict.txt of the checkpoint's data")
    to_core = commands.add_parser("core", help="fairseq checkpoint to a folder for lamemo_fairseq.core")
    to_core.add_argument("checkpoint")
    to_core.add_argument("folder")
    to_core.add_argument("--dictionary", required=True, help="dict.txt of the checkpoint's data, copied to the folder")
    add_encoding_options(to_core)
    args = parser.parse_args(arguments)
    try:
        if args.command == "import":
            released = load_plain(args.released)
            vocabulary = released.get("vocab")
            if args.vocabulary:
                vocabulary = Path(args.vocabulary).read_text(encoding="utf-8").removesuffix("\n").split("\n")
            checkpoint, dictionary = import_checkpoint(released, words_of(vocabulary))
            folder = Path(args.folder)
            folder.mkdir(parents=True, exist_ok=True)
            save_dictionary(dictionary, folder / "dict.txt")
            save(checkpoint, folder / "checkpoint.pt")
        elif args.command == "core":
            dictionary = load_dictionary(args.dictionary)
            tokenizer = core_tokenizer(dictionary, chosen_encoding(args))
            model = core_model(read_ours(args.checkpoint), dictionary)
            model.tokenizer = tokenizer
            model.save(args.folder)
        else:
            save(export_checkpoint(read_ours(args.checkpoint), load_dictionary(args.dictionary)), Path(args.released))
    except (ValueError, OSError) as error:
        sys.exit(f"convert_checkpoint: {error}")


if __name__ == "__main__":
    main()
