"""Figure 1 of the LaMemo paper and its like, from checkpoints: numbers as CSV, pictures as SVG and PNG.

python -m lamemo_fairseq.analysis data-bin/wikitext-103 LaMemo=checkpoints/lamemo/checkpoint_best.pt \\
    Transformer-XL=checkpoints/transformer_xl/checkpoint_best.pt --subset valid --out figures
"""

import argparse
import itertools
import logging
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
from fairseq import checkpoint_utils
from tqdm import tqdm

from ..host.configuration import read_ours
from . import report
from .collect import Collected, collect


def main(arguments: Optional[List[str]] = None) -> int:
    args = parser().parse_args(arguments)
    logging.getLogger().setLevel(logging.INFO)
    try:
        paths = checkpoints(args.models)
        report.check_writable(args.out)
        models = {name: analyse(name, path, args) for name, path in paths.items()}
        print(summary(models))
        files = report.save(report.tabulate(models), args.out)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(map(str, files)))
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lamemo_fairseq.analysis",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", help="folder of fairseq-preprocess")
    parser.add_argument("models", nargs="+", metavar="NAME=CHECKPOINT")
    parser.add_argument("--subset", default="valid")
    parser.add_argument("--out", type=Path, required=True, help="folder for CSV files and pictures")
    parser.add_argument("--batch-size", type=int, default=8, help="streams read side by side")
    parser.add_argument("--segments", type=positive, help="read so many segments of every stream only")
    parser.add_argument("--mem-len", type=int, help="another memory length than in training")
    parser.add_argument("--tokens-per-sample", type=int, help="another segment length than in training")
    parser.add_argument("--cpu", action="store_true")
    return parser


def named(given: str) -> Tuple[str, str]:
    """Parse ``NAME=CHECKPOINT``; the default name is the checkpoint's folder, whose path may hold the sign too."""
    name, separator, path = given.partition("=")
    unnamed = not separator or (Path(given).exists() and not Path(path).exists())
    return (Path(given).resolve().parent.name, given) if unnamed else (name, path)


def checkpoints(models: List[str]) -> Dict[str, str]:
    """Paths by name, before any of them takes its time.

    Raises:
        ValueError: two have one name.
        FileNotFoundError: one is not there.
    """
    paths: Dict[str, str] = {}
    for name, path in map(named, models):
        if name in paths:
            raise ValueError(f"two models are called '{name}': pass NAME=CHECKPOINT")
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no checkpoint {path}")
        paths[name] = path
    return paths


def positive(text: str) -> int:
    """Parse a number of segments."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def analyse(name: str, path: str, args: argparse.Namespace) -> Collected:
    """Read the split with a model.

    Raises:
        FileNotFoundError: there is no such checkpoint, or no such split.
        ValueError: it is not one of this package.
    """
    overrides: Dict[str, Any] = {"data": args.data}
    for option in ("mem_len", "tokens_per_sample"):
        if getattr(args, option) is not None:
            overrides[option] = getattr(args, option)
    read_ours(path)
    models, _, task = checkpoint_utils.load_model_ensemble_and_task([path], arg_overrides=overrides)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    model = models[0].to(device).eval()
    dataset = task.load_dataset(args.subset)
    batches = task.get_batch_iterator(dataset, max_sentences=args.batch_size, as_streams=True)
    iterator = batches.next_epoch_itr(shuffle=False)
    total = len(iterator) if args.segments is None else min(args.segments, len(iterator))
    shown = tqdm(itertools.islice(iterator, total), total=total, desc=name, unit="segment")
    collected = collect(model, shown, device)
    if collected.slots < model.decoder.memory.slots:
        print(
            f"{name}: the memory of {model.decoder.memory.slots} slots was never full when a whole segment was read; "
            f"attention is that of {collected.slots}: read more segments, or more of them with a smaller --batch-size, "
            "unless the lengths never let it fill up (a compressive memory whose rate does not divide them)",
            file=sys.stderr,
        )
    return collected


def summary(models: Dict[str, Collected]) -> str:
    """Return a line a model."""
    lines = []
    for name, collected in models.items():
        clauses = [
            f"{name}: loss {collected.losses.mean():.4f} bits over {int(collected.losses.counts.sum()):,} tokens"
        ]
        if collected.attending_layers:
            weights = [collected.attention.by_slot(layer).sum() for layer in collected.attending_layers]
            clauses.append(f"{float(torch.stack(weights).mean()):.3f} of the attention on memory")
        if collected.mixing_layers:
            ages = [collected.mixing.by_age(layer, collected.segment_length) for layer in collected.mixing_layers]
            values = ", ".join(f"{value:.3f}" for value in torch.stack(ages).mean(0).tolist())
            clauses.append(f"alpha by age {values}")
        lines.append("; ".join(clauses))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
