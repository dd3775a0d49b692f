"""Reading one text: segment after segment, or with segments and layers on the anti-diagonal, in one run.

    python examples/benchmarks/reading.py                                  # on a GPU: enwik8's and WikiText-103's sizes
    python examples/benchmarks/reading.py enwik8 --memory compressive      # another memory
    python examples/benchmarks/reading.py --device cpu --layers 3 --length 8 --segments 20 --words 50   # runs, no more

Both orders run from CUDA graphs and have to agree to the last bit before anything is measured. A prompt is read for its
memory alone; in evaluation every token is scored as well, and the host asks for the loss of each segment. `chunks` is
the way into the cache of token-by-token decoding, which is not recorded. Weights and tokens are random: speed does not
depend on them. GPUs hardly compute the same rate twice: each figure is a median.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from examples.benchmarks.devices import check_device
from examples.tables.arguments import ArgumentParser, one_of
from lamemo_fairseq.core import MEMORIES, LanguageModel, ModelConfig
from lamemo_fairseq.core.decoding.state import DecodingState
from lamemo_fairseq.core.segments import Piece

SIZES = {
    "enwik8": {
        "words": 208, "decoder_layers": 12, "decoder_embed_dim": 512, "decoder_attention_heads": 8,
        "decoder_head_dim": 64, "decoder_ffn_embed_dim": 2048, "length": 512,
    },
    "wt103": {
        "words": 267_740, "decoder_layers": 16, "decoder_embed_dim": 410, "decoder_attention_heads": 10,
        "decoder_head_dim": 41, "decoder_ffn_embed_dim": 2100, "length": 150,
        "adaptive_softmax_cutoff": "20000,40000,200000", "adaptive_input": True,
    },
    "tiny": {
        "words": 208, "decoder_layers": 4, "decoder_embed_dim": 64, "decoder_attention_heads": 2,
        "decoder_head_dim": 32, "decoder_ffn_embed_dim": 128, "length": 32,
    },
}  # fmt: skip
POSITIONS = {"lookahead": "disentangled", "block-recurrent": "t5"}
ORDERS = ("plain", "diagonal")


def build(args: argparse.Namespace, size: str, memory: str) -> dict[str, LanguageModel]:
    """A model for each order; they share their weights."""
    options = dict(SIZES[size])
    length = args.length or options.pop("length")
    options.pop("length", None)
    words = args.words or options.pop("words")
    options.pop("words", None)
    if args.layers:
        options["decoder_layers"] = args.layers
    if args.words:
        options.pop("adaptive_softmax_cutoff", None)
        options.pop("adaptive_input", None)
    slots = length if MEMORIES[memory].has_slots else 0
    models = {}
    for order in ORDERS:
        torch.manual_seed(1)
        config = ModelConfig(
            words,
            length,
            memory=memory,
            position_encoding=POSITIONS.get(memory, "transformer-xl"),
            mem_len=slots,
            cuda_graphs=True,
            reading_order=order,
            memory_options=args.options.get(memory),
            **options,
        )
        with torch.device(args.device):  # weights of many words take seconds to draw on a host
            models[order] = LanguageModel(config)
        models[order] = models[order].to(args.device, getattr(torch, args.dtype)).eval()
    return models


def pieces_of(model: LanguageModel, tokens: Tensor) -> list[Piece]:
    return [Piece(segment) for segment in tokens.split(model.segment_length, dim=1)]


def read(model: LanguageModel, tokens: Tensor) -> None:
    """Read a prompt for its memory."""
    for _ in model.segments().features(pieces_of(model, tokens)):
        pass


def evaluate(model: LanguageModel, tokens: Tensor) -> None:
    """Score every token; the host asks for each segment's loss."""
    targets = tokens[:, 1:].split(model.segment_length, dim=1)
    for features, target in zip(model.segments().features(pieces_of(model, tokens[:, :-1])), targets, strict=True):
        float(model.target_log_probs(features, target).double().sum())


def read_in_chunks(model: LanguageModel, tokens: Tensor) -> None:
    """Read a prompt into the cache of decoding."""
    DecodingState(model, len(tokens)).read(tokens)


def disagreement(models: dict[str, LanguageModel], tokens: Tensor) -> str:
    """Return how many tensors differ between the orders, and by how much; an empty string if none does."""
    made = []
    for order in ORDERS:
        reader = models[order].segments()
        made.append([*reader.features(pieces_of(models[order], tokens)), *reader.state.tensors()])
    unlike = [(one, other) for one, other in zip(*made, strict=True) if not torch.equal(one, other)]
    if not unlike:
        return ""
    most = max(float((one.double() - other.double()).abs().max()) for one, other in unlike)
    return f"{len(unlike)} of {len(made[0])} tensors, by {most:.1e} at most"


def seconds_of(task: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter()
    task()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measured(models: dict[str, LanguageModel], tokens: Tensor, repeats: int) -> dict[str, dict[str, float]]:
    """Tokens/s of every task in both orders, which take turns so that what else the machine does meets both."""
    rates: dict[str, dict[str, float]] = {}
    for task in (read, evaluate):
        for order in ORDERS:
            task(models[order], tokens)  # compiles kernels and records graphs
        seconds: dict[str, list[float]] = {order: [] for order in ORDERS}
        for _ in range(repeats):
            for order, taken in seconds.items():
                taken.append(seconds_of(partial(task, models[order], tokens)))
        rates[task.__name__] = {order: tokens.numel() / statistics.median(taken) for order, taken in seconds.items()}
    short = tokens[:, : 8 * models["plain"].segment_length]
    read_in_chunks(models["plain"], short)
    rates["chunks"] = {"plain": short.numel() / seconds_of(partial(read_in_chunks, models["plain"], short))}
    return rates


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", type=one_of(SIZES), default=["enwik8", "wt103"], help=", ".join(SIZES))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument("--memory", nargs="+", type=one_of(MEMORIES.names()), default=["lookahead", "recurrent"])
    parser.add_argument("--streams", type=int, nargs="+", default=[1])
    parser.add_argument("--segments", type=int, default=96, help="of the text")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, help="instead of the size's")
    parser.add_argument("--length", type=int, help="memory M and segment N, instead of the size's")
    parser.add_argument("--words", type=int, help="instead of the size's")
    parser.add_argument("--check", action="store_true", help="compare the orders, and measure nothing")
    parser.add_argument("--result", help="file for a line of JSON a row")
    args = parser.parse_args()
    check_device(args.device)
    args.options = {
        "memorizing": MEMORIES["memorizing"].options(store_len=64),
        "compressive": MEMORIES["compressive"].options(compressed_len=8, compression_rate=4),
        "continuous": MEMORIES["continuous"].options(num_basis_functions=16),
        "block-recurrent": MEMORIES["block-recurrent"].options(recurrent_states=16),
    }
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    print(f"{machine}, torch {torch.__version__}, {args.dtype}", flush=True)
    for size in args.sizes:
        for memory in args.memory:
            models = build(args, size, memory)
            for streams in args.streams:
                row(args, machine, size, memory, streams, models)


def row(
    args: argparse.Namespace, machine: str, size: str, memory: str, streams: int, models: dict[str, LanguageModel]
) -> None:
    words, length = models["plain"].config.vocabulary_size, models["plain"].segment_length
    tokens = torch.randint(4, words, (streams, args.segments * length + 1), device=args.device)
    unlike = disagreement(models, tokens[:, : (len(models["plain"].layers) + 10) * length + length // 2])
    graph = models["diagonal"].diagonals.graph
    made = "eager" if graph is None else f"graph of {graph.memory / 2**20:.0f} MiB"
    print(f"{size} {memory} {streams} x {length} ({made}): {unlike or 'bits are the same'}", flush=True)
    rates = {} if args.check or unlike else measured(models, tokens, args.repeats)
    for task, rate in rates.items():
        plain, diagonal = rate["plain"], rate.get("diagonal")
        faster = "" if diagonal is None else f", diagonal {diagonal:,.0f}, {diagonal / plain:.2f} times"
        print(f"  {task}: plain {plain:,.0f} tokens/s{faster}", flush=True)
    if args.result:
        with open(args.result, "a") as file:
            shape = {"size": size, "memory": memory, "streams": streams, "dtype": args.dtype}
            file.write(json.dumps({"machine": machine, **shape, "made": made, "unlike": unlike, "rates": rates}) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        main()
