"""Compare full and adaptive softmax on this machine: tokens/s and peak memory of training steps.

    python examples/benchmarks/softmax.py 50000 267735

Each measurement is a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.tables.arguments import ArgumentParser

SIZES = {
    "decoder_layers": 2,
    "decoder_embed_dim": 256,
    "decoder_attention_heads": 4,
    "decoder_ffn_embed_dim": 512,
    "mem_len": 150,
    "tokens_per_sample": 150,
}
STREAMS, STEPS = 8, 4
CUTOFFS = (20_000, 40_000, 200_000)


def measure(words: int, kind: str) -> dict[str, float]:
    """Train a small LaMemo for some steps on random words, more frequent ones first."""
    import torch
    from fairseq.data import Dictionary

    from lamemo_fairseq.models.config import MemoryLanguageModelConfig
    from lamemo_fairseq.models.decoder import FairseqMemoryDecoder

    dictionary = Dictionary()
    for i in range(words - len(dictionary)):
        dictionary.add_symbol(f"w{i}")
    cutoffs = ",".join(str(c) for c in CUTOFFS if c < words)
    adaptive = {"adaptive_softmax_cutoff": cutoffs} if kind == "adaptive" else {}
    torch.manual_seed(0)
    model = FairseqMemoryDecoder(MemoryLanguageModelConfig(**SIZES, **adaptive), dictionary)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    state, seconds = None, []
    for _ in range(STEPS + 1):
        # Zipf's law: word ranks are uniform in their logarithm.
        tokens = (words ** torch.rand(STREAMS, SIZES["tokens_per_sample"] + 1)).long().clamp(max=words - 1)
        start = time.perf_counter()
        features, state, _ = model.read_segment(tokens[:, :-1], state)
        target = tokens[:, 1:].reshape(-1)
        if kind == "adaptive":
            softmaxes = zip(*model.adaptive_softmax(features, target), strict=True)
            loss = sum(torch.nn.functional.cross_entropy(s, t, reduction="sum") for s, t in softmaxes if t is not None)
        else:
            scores = model.output_layer(features).flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(scores, target, reduction="sum")
        optimizer.zero_grad()
        (loss / len(target)).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"tokens/s": len(target) / statistics.median(seconds[1:]), "peak GiB": peak}


def main() -> None:
    parser = ArgumentParser(description="full against adaptive softmax on this machine")
    parser.add_argument(
        "words",
        nargs="*",
        type=int,
        default=[50_000, 267_735],
        help=f"sizes of the dictionary, each above the first cutoff of {CUTOFFS[0]:,} (default: 50000 267735)",
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.words) <= CUTOFFS[0]:
        parser.error(
            f"words: {min(args.words)} is too few, the adaptive softmax begins above {CUTOFFS[0]:,}: pass more, "
            "such as 50000"
        )
    if args.one:
        print(json.dumps(measure(args.words[0], args.one)))
        return
    print(f"{platform.processor() or platform.machine()}, {STREAMS} x {SIZES['tokens_per_sample']} tokens a step")
    print("| words | softmax | tokens/s | peak memory |")
    print("|---|---|---|---|")
    for words in args.words:
        for kind in ("full", "adaptive"):
            command = [sys.executable, __file__, str(words), "--one", kind]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            measured = json.loads(printed.splitlines()[-1])
            print(f"| {words:,} | {kind} | {measured['tokens/s']:,.0f} | {measured['peak GiB']:.1f} GiB |", flush=True)


if __name__ == "__main__":
    main()
