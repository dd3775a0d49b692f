"""Print the loss of a split per token, per word and per byte, as a line of JSON.

    python -m lamemo_fairseq.score data-bin/own checkpoints/lamemo/checkpoint_best.pt --subset test --batch-size 16

The command reads the split once. fairseq-eval-lm reads it in the same way, and logs the same losses.
"""

import argparse
import json
import logging
import os
import sys
from typing import List, Optional

from . import needs_fairseq  # noqa: F401
from .arguments import ArgumentParser
from .core.memory import DivergenceError
from .evaluation.evaluate import evaluate
from .evaluation.opening import open_split
from .host.interruption import end_in_one_line
from .refusals import explain_out_of_memory

OVERRIDES = (
    *("mem_len", "tokens_per_sample"),
    *("documents", "document_separator", "score_separators", "at_document"),
)


def main(arguments: Optional[List[str]] = None) -> None:
    args = parser().parse_args(arguments)
    explain_out_of_memory()
    end_in_one_line()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    try:
        _check(args)
        args.at_document = args.at_document or "clear"
        opened = open_split(
            args.data,
            args.checkpoints.split(os.pathsep),
            args.subset,
            args.batch_size,
            args.cpu,
            args.fp16,
            **{name: getattr(args, name) for name in OVERRIDES},
        )
        result = evaluate(
            opened.models,
            opened.dictionary,
            opened.batches,
            post_process=args.post_process,
            softmax_batch=args.softmax_batch,
            device=opened.device,
            split=opened.split,
        )
    except (OSError, ValueError, DivergenceError) as error:
        sys.exit(f"score: {error}")
    print(json.dumps({"data": opened.split.tokens.name, "checkpoints": args.checkpoints, **result}))


def _check(args: argparse.Namespace) -> None:
    """Refuse options that need another option.

    Raises:
        ValueError: the other option is missing; the message names both.
    """
    of_separators = {"--document-separator": args.document_separator, "--score-separators": args.score_separators}
    for option, given in of_separators.items():
        if given and args.documents != "separator":
            raise ValueError(f"{option} is for --documents separator: pass that too")
    if args.at_document is not None and args.documents == "none":
        raise ValueError("--at-document is for --documents recorded or separator: pass one of them too")


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m lamemo_fairseq.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="folder of python -m preprocess or fairseq-preprocess")
    parser.add_argument("checkpoints", help=f"one, or several with {os.pathsep} between them, which are averaged")
    parser.add_argument("--subset", default="test")
    parser.add_argument("--batch-size", type=int, help="streams read side by side")
    parser.add_argument("--mem-len", type=int, help="another memory length than in training")
    parser.add_argument("--tokens-per-sample", type=int, help="another segment length than in training")
    parser.add_argument("--documents", choices=["none", "recorded", "separator"], default="none")
    parser.add_argument("--document-separator", default="", help="as in fairseq-eval-lm")
    parser.add_argument("--score-separators", action="store_true", help="as in fairseq-eval-lm")
    parser.add_argument("--at-document", choices=["clear", "keep"], help="as in fairseq-eval-lm")
    parser.add_argument("--post-process", help="join pieces to words for the loss a word of the dictionary")
    parser.add_argument("--softmax-batch", type=int, default=0, help="largest number of tokens to score at once")
    parser.add_argument("--fp16", action="store_true", help="compute in half precision")
    parser.add_argument("--cpu", action="store_true")
    return parser


if __name__ == "__main__":
    main()
