"""Measure training through fairseq-train: tokens/s, peak memory, share of peak, time by part; and evaluation.

    python examples/benchmarks/training.py enwik8            # on a GPU; --device cpu on a CPU
    python examples/benchmarks/training.py wt103-adaptive wt103-full

Every path runs in a process of its own on the same synthetic tokens. A path's losses and gradients are first compared
with the eager path's in float32; a path that is off is not measured.
"""

import argparse
import contextlib
import io
import json
import logging
import math
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from steps import profiled

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.tables.arguments import ArgumentParser, one_of

# As docs/speed.md recommends for training: freed memory can then be used for tensors of any size.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
ROOT = Path(__file__).resolve().parents[2]

FORK = multiprocessing.get_context("fork")
CUTOFFS = "20000,40000,200000"
QUICKSTART = (
    "--decoder-layers 4 --decoder-embed-dim 128 --decoder-attention-heads 4 --decoder-head-dim 32 "
    "--decoder-ffn-embed-dim 256 --mem-len 64 --tokens-per-sample 64"
)
COLUMNS = ("size", "path", "tok/s", "evaluation", "peak GiB", "share of peak", "error (allowed)")
# name: preset, words, streams, options
SIZES: dict[str, tuple[str, int, int, list[str]]] = {
    "enwik8": ("enwik8", 208, 20, []),
    "enwik8-2": ("enwik8", 208, 2, []),
    "enwik8-2048": ("enwik8", 208, 20, ["--mem-len", "2048"]),
    "enwik8-8192": ("enwik8", 208, 20, ["--mem-len", "8192"]),
    "enwik8-80": ("enwik8", 208, 80, []),
    "enwik8-320": ("enwik8", 208, 320, []),
    "wt103-adaptive": ("wt103", 267_735, 64, ["--adaptive-softmax-cutoff", CUTOFFS]),
    "wt103-full": ("wt103", 267_735, 64, []),
    "wt103-adaptive-32": ("wt103", 267_735, 32, ["--adaptive-softmax-cutoff", CUTOFFS]),  # half of the paper's batch
    "wt103-adaptive-256": ("wt103", 267_735, 256, ["--adaptive-softmax-cutoff", CUTOFFS]),
    "wt103-adaptive-768": ("wt103", 267_735, 768, ["--adaptive-softmax-cutoff", CUTOFFS]),
    "quickstart": ("enwik8", 208, 16, QUICKSTART.split()),
}
PLAIN = ["--position-encoding", "absolute"]
# name: architecture, options
PATHS: dict[str, tuple[str, list[str]]] = {
    "lamemo-eager": ("lamemo_lm", ["--attention-backend", "eager"]),
    "lamemo-blocked": ("lamemo_lm", ["--attention-backend", "blocked"]),
    "lamemo-fused": ("lamemo_lm", ["--attention-backend", "fused"]),
    "lamemo-graphs": ("lamemo_lm", ["--attention-backend", "fused", "--cuda-graphs"]),
    "txl-eager": ("transformer_xl_lm", ["--attention-backend", "eager"]),
    "txl-blocked": ("transformer_xl_lm", ["--attention-backend", "blocked"]),
    "txl-fused": ("transformer_xl_lm", ["--attention-backend", "fused"]),
    "txl-graphs": ("transformer_xl_lm", ["--attention-backend", "fused", "--cuda-graphs"]),
    "plain": ("relative_transformer_lm", ["--attention-backend", "auto", *PLAIN]),
    "plain-graphs": ("relative_transformer_lm", ["--attention-backend", "auto", "--cuda-graphs", *PLAIN]),
}
ELSEWHERE = {"cpu": ("-fused", "-graphs"), "cuda": ("-blocked",)}  # ends of paths that a device does not have
TRAINING = (
    "--task segment_language_modeling --criterion chunked_cross_entropy --optimizer adam --lr 2.5e-4 --clip-norm 0.25 "
    "--disable-validation --no-save --no-progress-bar --log-format json --num-workers 2 --max-epoch 1"
)
PROFILED = 4  # updates after those that are timed
OVERFLOWS = 16  # segments that updates in half precision may skip


def write_data(folder: Path, words: int, tokens: int) -> None:
    """Write random words, more frequent ones first (their ranks uniform in the logarithm)."""
    import numpy as np
    import torch
    from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder

    folder.mkdir(parents=True, exist_ok=True)
    count = words - 4  # fairseq adds its four symbols, and no padding at a multiple of 8
    (folder / "dict.txt").write_text("".join(f"w{i} {count - i}\n" for i in range(count)))
    ranks = (words - 4) ** np.random.default_rng(0).random(tokens)
    builder = MMapIndexedDatasetBuilder(str(folder / "train.bin"), dtype=np.int32)
    for line in np.array_split(4 + ranks.astype(np.int64).clip(0, words - 5), max(1, tokens // 1000)):
        builder.add_item(torch.from_numpy(line))
    builder.finalize(str(folder / "train.idx"))


def segment_length(size: str) -> int:
    return 64 if size == "quickstart" else 150 if "wt103" in size else 512


def speeds(log: str) -> list[float]:
    """Return fairseq's own words per second, interval by interval; the last line is about the epoch."""
    rates = [float(s) for s in re.findall(r'"wps": "([\d.e+]+)"', log)]
    if len(rates) < 3:
        raise RuntimeError(log[-3000:])
    return rates


def peak_gib(log: str, capacity: float) -> float:
    """Return the peak of allocated memory: fairseq resets it at every step, and logs the memory that was left."""
    return capacity - min(float(s) for s in re.findall(r'"gb_free": "([\d.]+)"', log))


def gpus() -> list[str]:
    """Return the GPUs' names, from another program: a process that has used CUDA cannot be forked."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        sys.exit("--device cuda: nvidia-smi finds no GPU here, pass --device cpu")


def model_options(size: str, path: str) -> list[str]:
    preset, _, streams, options = SIZES[size]
    arch, more = PATHS[path]
    if arch == "relative_transformer_lm" and "--mem-len" in options:
        at = options.index("--mem-len")
        options = options[:at] + options[at + 2 :]
    return ["--arch", f"{arch}_{preset}", "--batch-size", str(streams), *options, *more]


def train(
    size: str, path: str, steps: int, device: str, folder: str, extra: list[str], profile: bool = False
) -> dict[str, Any]:
    """Run fairseq-train on the size; return words per second once the memory is full, peak memory, and time by part."""
    import torch
    from fairseq import utils
    from fairseq_cli import train as fairseq_train

    sys.argv = ["fairseq-train", folder, "--user-dir", str(ROOT / "lamemo_fairseq"), *TRAINING.split()]
    sys.argv += [
        "--max-update",
        str(steps + PROFILED * profile),
        "--log-interval",
        "10" if steps >= 40 else "1",
        *model_options(size, path),
    ]
    sys.argv += ["--cpu"] if device == "cpu" else ["--fp16"]
    sys.argv += extra
    log = io.StringIO()
    utils.import_user_module(argparse.Namespace(user_dir=str(ROOT / "lamemo_fairseq")))
    logging.getLogger().addHandler(logging.StreamHandler(log))
    breakdown: dict[str, Any] = {}
    watch = profiled(PROFILED, breakdown, at=steps) if profile else contextlib.nullcontext()
    with contextlib.redirect_stdout(sys.stderr), watch:
        fairseq_train.cli_main()
    rates = speeds(log.getvalue())
    measured: dict[str, Any] = {"tok/s": statistics.median(rates[len(rates) // 2 : -1] or rates[-1:])}
    if profile:
        tokens = float(re.findall(r'"wpb": "([\d.]+)"', log.getvalue())[-1])
        measured["parts"] = {**breakdown, "a step": tokens / measured["tok/s"] * 1e3}
    if device == "cuda":
        measured["peak GiB"] = peak_gib(log.getvalue(), torch.cuda.get_device_properties(0).total_memory / 2**30)
        if "--cuda-graphs" in sys.argv:  # memory that a graph owns counts as reserved only
            measured["peak GiB"] = torch.cuda.memory_reserved() / 2**30
    return measured


def build(size: str, path: str, dtype: Any, device: str, layers: int | None = None) -> tuple[Any, Any, int]:
    """Return a decoder of the size, its streams' tokens and the segment length."""
    import torch
    from fairseq import options, utils
    from fairseq.data import Dictionary

    utils.import_user_module(argparse.Namespace(user_dir=str(ROOT / "lamemo_fairseq")))
    from lamemo_fairseq.models.decoder import FairseqMemoryDecoder

    _, words, streams, _ = SIZES[size]
    parser = options.get_training_parser("segment_language_modeling")
    arguments = ["none", *TRAINING.split(), *model_options(size, path), "--dropout", "0", "--batch-size", str(streams)]
    args = options.parse_args_and_arch(parser, arguments)
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    cfg = convert_namespace_to_omegaconf(args).model
    cfg.decoder_layers = layers or cfg.decoder_layers
    length = args.tokens_per_sample or cfg.preset_tokens_per_sample
    cfg.tokens_per_sample = length
    dictionary = Dictionary()
    for i in range(words - len(dictionary)):
        dictionary.add_symbol(f"w{i}")
    torch.manual_seed(0)
    with torch.device(device):
        model = FairseqMemoryDecoder(cfg, dictionary).to(device=device, dtype=dtype)
    segments = 3 + max(1, cfg.mem_len // length)
    tokens = torch.randint(4, words, (streams, 1 + segments * length), device=device)
    return model, tokens, length


def pass_segment(model: Any, tokens: Any, start: int, length: int, state: Any, scale: float = 1.0) -> tuple[Any, Any]:
    output = model.adaptive_softmax if model.output is None else model.output
    target = tokens[:, start + 1 : start + length + 1]
    plan = output.plan(target)
    source = tokens[:, start : start + length]
    if model.graphs is None:
        features, state, _ = model.read_segment(source, state)
    else:
        features, state, _ = model.graphs(model.read_segment, model, source, state)
    loss = output.loss(features, target, plan)
    if loss.requires_grad:
        (loss * scale).backward()
    return loss.detach() / target.numel(), state


def check(size: str, path: str, device: str) -> dict[str, Any]:
    """Compare the last segment's loss and gradients, with a full memory, with eager attention in float32."""
    import torch

    half = torch.float16 if device == "cuda" else torch.float32
    results: dict[str, list[Any]] = {}
    scale = 1.0
    for name, of, dtype in (("exact", "eager", torch.float32), ("plain", "eager", half), ("path", "", half)):
        model, tokens, length = build(size, path, dtype, device, layers=2)
        if of:
            for module in model.modules():
                if hasattr(module, "config") and hasattr(module.config, "backend"):
                    object.__setattr__(module.config, "backend", of)
            model.graphs = None
        state = None
        for index in range(tokens.size(1) // length):
            model.zero_grad()
            loss, state = pass_segment(model, tokens[:4], index * length, length, state, scale)
        results[name] = [loss.float(), *(p.grad.float() / scale for p in model.parameters())]
        if name == "exact":  # half precision needs a scale for the loss: the largest with which no gradient overflows
            largest = max(float(g.abs().max()) for g in results[name])
            scale = 2.0 ** math.floor(math.log2(2**14 / largest))

    def error(name: str) -> float:
        return max(
            float((a - b).norm() / b.norm().clamp(min=1e-6))
            for a, b in zip(results[name], results["exact"], strict=True)
        )

    off, allowed = error("path"), 2 * error("plain") + 1e-3
    return {"error": off, "allowed": allowed, "ok": off <= allowed}


def evaluate(size: str, path: str, device: str, segments: int = 5) -> float:
    """Return the tokens per second of reading with a full memory and computing the loss."""
    import torch

    model, tokens, length = build(size, path, torch.float16 if device == "cuda" else torch.float32, device)
    model.eval()
    state, seconds = None, []
    with torch.no_grad(), model.positions.unchanged():  # as fairseq-eval-lm reads
        full = tokens.size(1) // length - 1
        for index in range(full + segments):
            started = time.perf_counter()
            _, state = pass_segment(model, tokens, min(index, full) * length, length, state)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    return tokens.size(0) * length / statistics.median(seconds[full:])


def work_per_token(size: str, path: str, streams: int) -> float:
    """Return the operations of a training step per token: those of matrix products, without the dead memory branch."""
    model, _, length = build(size, path, None, "meta")
    cfg, lookahead = model.layers[0].self_attn.config, PATHS[path][0] == "lamemo_lm"
    layers, width, inner = len(model.layers), cfg.embed_dim, cfg.heads * cfg.head_dim
    ffn, memory = model.layers[0].feed_forward.fc1.out_features, cfg.mem_len
    per_row = 2 * (2 * width * inner + 2 * width * ffn)  # query, output, feed-forward
    key_value, pairs = 2 * 2 * width * inner, memory + length / 2
    position = 0 if PATHS[path][1][-1] == "absolute" else 1
    total = layers * (per_row + key_value * (1 + memory / length) + 2 * inner * pairs * (2 + position))
    if lookahead:
        slots, keys = memory / length, min(memory, length)
        total += (layers - 1) * slots * (per_row + 2 * inner * 3 * (keys if memory > length else keys / 2))
    words = SIZES[size][1] if model.output is not None else model.adaptive_softmax.bands.ends[0]
    return 3 * (total + 2 * width * words)


def main() -> None:
    parser = ArgumentParser(description="training steps of every path, side by side")
    parser.add_argument("sizes", nargs="*", type=one_of(SIZES), default=["enwik8"], help=", ".join(SIZES))
    parser.add_argument(
        "--paths", nargs="*", type=one_of(PATHS), help=f"by default those of the device; {', '.join(PATHS)}"
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--peak", type=float, default=790, help="TFLOP/s of the device in large products")
    parser.add_argument("--result", type=Path, help="a JSON file to write")
    parser.add_argument("--options", default="", help="more options of fairseq-train")
    parser.add_argument("--no-parts", action="store_true")
    args = parser.parse_args()
    if args.steps < 3:
        sys.exit(f"--steps {args.steps}: pass 3 or more, of which the later ones are timed")
    args.paths = args.paths or [path for path in PATHS if not path.endswith(ELSEWHERE[args.device])]
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import fairseq_cli.train  # noqa: F401  (once, for all processes)
    import torch

    device = platform.processor() or platform.machine()
    if args.device == "cuda":
        device = gpus()[0]
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{device}, {versions}")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    results: dict[str, Any] = {"device": device, "versions": versions, "command": sys.argv[1:]}
    unmeasured = 0
    for size in args.sizes:
        _, words, streams, _ = SIZES[size]
        with tempfile.TemporaryDirectory() as folder:
            segments = args.steps + PROFILED + OVERFLOWS
            write_data(Path(folder), words, streams * segment_length(size) * segments)
            for path in args.paths:
                process = FORK.Process(target=one, args=(args, size, path, folder))
                process.start()
                process.join()
                if process.exitcode:
                    log = (Path(folder) / "log").read_text()
                    print(f"| {size} | {path} | failed |\n{log[-1500:]}", flush=True)
                    unmeasured += 1
                    continue
                measured = json.loads((Path(folder) / "measured").read_text())
                results[f"{size} {path}"] = measured
                off = f"{measured['check']['error']:.1e} ({measured['check']['allowed']:.1e})"
                if not measured["check"]["ok"]:
                    print(f"| {size} | {path} | off | | | | {off} |", flush=True)
                    unmeasured += 1
                    continue
                share = measured["tok/s"] * measured["work"] / args.peak / 1e12
                peak = f"{measured['peak GiB']:.1f}" if "peak GiB" in measured else ""
                share_text = f"{share:.1%}" if args.device == "cuda" else ""
                rates = f"{measured['tok/s']:,.0f} | {measured['evaluation tok/s']:,.0f}"
                print(f"| {size} | {path} | {rates} | {peak} | {share_text} | {off} |", flush=True)
                for name, value in measured.get("parts", {}).items():
                    print(f"    {name}: {value if isinstance(value, list) else round(value, 2)}", flush=True)
    if args.result:
        args.result.write_text(json.dumps(results, indent=1) + "\n")
    if unmeasured:
        sys.exit(f"{unmeasured} of {len(args.sizes) * len(args.paths)} not measured")


class Progress(logging.Handler):
    """Tells the updates of a training, whose output goes to a file: on a CPU they take minutes."""

    def __init__(self, tell: Callable[[str], None], steps: int):
        super().__init__()
        self.tell, self.steps = tell, steps

    def emit(self, record: logging.LogRecord) -> None:
        done = re.search(r'"num_updates": "(\d+)"', record.getMessage())
        if done and record.name == "train_inner":
            self.tell(f"update {done[1]} of {self.steps}")


def one(args: argparse.Namespace, size: str, path: str, folder: str) -> None:
    """Measure one path in a process of its own, and write its output to a file."""
    log = os.open(f"{folder}/log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    tell = partial(print, f"{size} {path}:", file=os.fdopen(os.dup(2), "w"), flush=True)
    logging.getLogger().addHandler(Progress(tell, args.steps))
    os.dup2(log, 1)
    os.dup2(log, 2)
    tell("comparing with eager attention")
    measured: dict[str, Any] = {"check": check(size, path, args.device)}
    if measured["check"]["ok"]:
        measured["work"] = work_per_token(size, path, SIZES[size][2])
        tell("evaluating")
        measured["evaluation tok/s"] = evaluate(size, path, args.device)
        if args.device == "cuda":
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        profile = args.device == "cuda" and not args.no_parts
        measured |= train(size, path, args.steps, args.device, folder, args.options.split(), profile)
    (Path(folder) / "measured").write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
