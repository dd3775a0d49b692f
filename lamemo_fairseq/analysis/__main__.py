"""Draw Figure 1 of the LaMemo paper and similar figures from checkpoints: numbers as CSV, pictures as SVG and PNG.

python -m lamemo_fairseq.analysis data-bin/wikitext-103 LaMemo=checkpoints/lamemo/checkpoint_best.pt \\
    Transformer-XL=checkpoints/transformer_xl/checkpoint_best.pt --subset valid --out figures
"""

import argparse
import itertools
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..arguments import ArgumentParser
from ..core.config import ModelConfig
from ..core.folder import make_folder
from ..core.memory import MEMORIES, DivergenceError
from ..core.names import missing_checkpoint
from ..data.documents import DocumentDataset
from ..data.text_encoding import RECORD
from ..evaluation.evaluate import score_segments
from ..evaluation.opening import Opened, open_split
from ..evaluation.output import TokenLog
from ..host.interruption import end_in_one_line
from ..refusals import explain_out_of_memory
from . import report
from .collect import Collected, collect
from .documents import ALL, Rule, of_streams


def main(arguments: Optional[List[str]] = None) -> int:
    args = parser().parse_args(arguments)
    explain_out_of_memory()
    end_in_one_line()
    logging.getLogger().setLevel(logging.INFO)
    try:
        paths = checkpoints(args.models)
        rule = args.rule = Rule.parse(args.documents)
        about = report.About(os.path.join(args.data, args.subset), str(rule))
        make_folder(args.out, "--out")  # a full disk is told now, not after hours of reading
        models = {name: analyse(name, path, args) for name, path in paths.items()}
        print(summary(models, rule))
        files = report.save(report.tabulate(models, about, paper=_is_wikitext_103(args.data)), args.out, about)
    except (OSError, ValueError, DivergenceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(map(str, files)))
    return 0


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m lamemo_fairseq.analysis",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", help="folder of python -m preprocess or fairseq-preprocess")
    parser.add_argument("models", nargs="+", metavar="NAME=CHECKPOINT")
    parser.add_argument("--subset", default="valid")
    parser.add_argument("--out", type=Path, required=True, help="folder for CSV files and pictures")
    parser.add_argument("--batch-size", type=int, default=8, help="streams read side by side")
    parser.add_argument("--segments", type=positive, help="number of segments to read of every stream (default: all)")
    parser.add_argument("--mem-len", type=int, help="another memory length than in training")
    parser.add_argument("--tokens-per-sample", type=int, help="another segment length than in training")
    parser.add_argument(
        "--documents",
        default="one",
        metavar="RULE",
        help="where documents begin: one, recorded, headings (as WikiText has them), blank-lines:N, separator:WORD",
    )
    parser.add_argument(
        "--cut-memory",
        type=not_negative,
        nargs="+",
        default=[],
        metavar="SLOTS",
        help="read the split again with these numbers of slots",
    )
    parser.add_argument("--cpu", action="store_true")
    return parser


def named(given: str) -> Tuple[str, str]:
    """Parse ``NAME=CHECKPOINT``; the default name is the checkpoint's folder, whose path may have a ``=`` too."""
    name, separator, path = given.partition("=")
    unnamed = not separator or (Path(given).exists() and not Path(path).exists())
    return (Path(given).resolve().parent.name, given) if unnamed else (name, path)


def checkpoints(models: List[str]) -> Dict[str, str]:
    """Return paths by name, after checking all of them before any is read.

    Raises:
        ValueError: two models have one name.
        FileNotFoundError: a checkpoint is missing.
    """
    paths: Dict[str, str] = {}
    for given in models:
        name, path = named(given)
        if name in paths:
            raise ValueError(f"two models are called '{name}': pass NAME=CHECKPOINT")
        if not Path(path).is_file():
            raise FileNotFoundError(_missing(given, path))
        paths[name] = path
    return paths


def _missing(given: str, path: str) -> str:
    """Return the message on a checkpoint that is not there, or a name without one."""
    if path == given and path == Path(path).name and not path.endswith(".pt") and not Path(path).exists():
        form = f"{path}=checkpoints/checkpoint_best.pt"
        return f"there is no checkpoint {path}: if it is a name, pass NAME=CHECKPOINT, such as {form}"
    return missing_checkpoint(path)


def positive(text: str) -> int:
    """Parse a number of segments."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def not_negative(text: str) -> int:
    """Parse a number of slots."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return int(text)


def analyse(name: str, path: str, args: argparse.Namespace) -> Collected:
    """Read the split with a model.

    Raises:
        FileNotFoundError: the checkpoint or the split is missing.
        ValueError: the checkpoint is not of this package, or an option does not suit it.
    """
    opened = opening(path, args, mem_len=args.mem_len)
    model = opened.models[0]
    memory = model.decoder.memory
    if not memory.has_slots:
        for option, given in (("--mem-len", args.mem_len is not None), ("--cut-memory", args.cut_memory)):
            if given:
                kind = model.decoder.config.memory
                print(f"{name}: {option} has no effect on this model: --memory {kind} has no slots", file=sys.stderr)
    starts = starts_of(opened, args.rule)
    collected = collect(model, segments(opened, args, name), opened.device)
    if collected.slots < memory.slots:
        print(
            f"{name}: the memory of {memory.slots} slots was never full when a whole segment was read; "
            f"attention is that of {collected.slots}: read more segments, or longer streams with a smaller "
            "--batch-size. (A compressive memory never fills up if its rate does not divide the lengths.)",
            file=sys.stderr,
        )
    config = model.decoder.config
    losses = collected.curves[config.slots] = of_streams(collected.log.streams(), starts)
    if args.rule.is_of_tokens and len(losses.starts) == opened.num_streams:
        print(
            f"{name}: --documents {args.documents}: no document begins inside a stream, so that each of the "
            f"{opened.num_streams} streams counts as one",
            file=sys.stderr,
        )
    for length in args.cut_memory:
        if memory.has_slots and length not in collected.curves:
            cut = opening(path, args, **cut_to(length, config))
            log = TokenLog()
            for scored in score_segments(cut.models, segments(cut, args, f"{name}, {length} slots"), cut.device):
                log.add(scored.position.streams, scored.lengths, scored.target, scored.log_probs)
            collected.curves[length] = of_streams(log.streams(), starts_of(cut, args.rule))
    return collected


def opening(path: str, args: argparse.Namespace, **overrides: Any) -> Opened:
    lengths = {"tokens_per_sample": args.tokens_per_sample, **overrides}
    # By default as one text, even for a model that was trained on documents: other rules tell documents by their
    # tokens.
    documents = "recorded" if args.rule.name == "recorded" else "none"
    return open_split(args.data, [path], args.subset, args.batch_size, args.cpu, documents=documents, **lengths)


def starts_of(opened: Opened, rule: Rule) -> Callable[[int, Tensor], Tensor]:
    """Return the function that finds the beginnings of documents in a stream's tokens.

    Raises:
        ValueError: the rule looks for a word that the dictionary does not have.
    """
    split = opened.split
    if not isinstance(split, DocumentDataset):
        rule.check(opened.dictionary)
        return lambda stream, tokens: rule.starts(tokens, opened.dictionary)
    sizes = split.documents.stops - split.documents.starts
    dealt = split.layout(opened.num_streams).deal.dealt

    def recorded(stream: int, tokens: Tensor) -> Tensor:
        starts = list(itertools.accumulate((int(sizes[document]) for document in dealt[stream]), initial=0))
        return torch.tensor([start for start in starts if start < len(tokens)], dtype=torch.int64)

    return recorded


def cut_to(length: int, config: ModelConfig) -> Dict[str, Any]:
    """Return the options with which a model has this many slots of memory."""
    if length >= MEMORIES[config.memory].smallest_mem_len:
        return {"mem_len": length}
    ahead = config.position_encoding.startswith("disentangled")  # directions are not used without memory
    return {"memory": "none", **({"position_encoding": "transformer-xl"} if ahead else {})}


def segments(opened: Opened, args: argparse.Namespace, name: str) -> Any:
    """Return the batches that are read, with a progress bar."""
    batches = opened.batches
    total = len(batches) if args.segments is None else min(args.segments, len(batches))
    return tqdm(itertools.islice(batches, total), total=total, desc=name, unit="segment")


def _is_wikitext_103(data: str) -> bool:
    try:
        with open(os.path.join(data, RECORD), encoding="utf-8") as file:
            return bool(json.load(file)["made_from"]["settings"]["name"] == "wikitext-103")
    except (OSError, ValueError, KeyError, TypeError):  # no record of `python -m preprocess`
        return False


def summary(models: Dict[str, Collected], rule: Rule) -> str:
    """Return a line for each model."""
    lines, units = [], "streams" if rule.name == "one" else "documents"
    for name, collected in models.items():
        clauses = [
            f"{name}: loss {collected.losses.mean():.4f} bits over {int(collected.losses.counts.sum()):,} tokens"
        ]
        if collected.slots:  # other memories are read by other means than attention to slots
            weights = [collected.attention.by_slot(layer).sum() for layer in collected.attending_layers]
            clauses.append(f"{float(torch.stack(weights).mean()):.3f} of the attention on memory slots")
        if collected.mixing_layers:
            ages = [collected.mixing.by_age(layer, collected.segment_length) for layer in collected.mixing_layers]
            values = ", ".join(f"{value:.3f}" for value in torch.stack(ages).mean(0).tolist())
            clauses.append(f"alpha by age {values}")
        for length, losses in sorted(collected.curves.items()):
            mean = losses.by_class()[ALL]
            error = "" if mean.error is None else f" ± {mean.error:.4f}"
            clauses.append(f"{mean.loss:.4f}{error} with {length} slots, {mean.documents:,} {units}")
        lines.append("; ".join(clauses))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
