"""Compare decoding with a cached memory and recomputing the memory for every token, in one run.

    python examples/benchmarks/decoding.py                            # on the CPU
    python examples/benchmarks/decoding.py --device cuda --batch 1 64 # in bfloat16, steps replayed as graphs
    python examples/benchmarks/decoding.py --through generator        # as fairseq-interactive and the hub go

The results of both ways must agree first. Recomputing is measured in two ways. The memory alone is recomputed with M +
1 rows a token, as the authors' code generates. Memory and segment are recomputed with M + N/2 rows in the mean, which
gives the very outputs of the cache. The model has the released enwik8 sizes and random weights: speed does not depend
on the weights. The generator's rate counts the new tokens alone, without the time that reading the prompt takes, beside
that of fairseq's loop. Its first call is not counted: on a GPU it compiles kernels and records the graphs that further
calls replay.
"""

import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from fairseq.data import Dictionary
from fairseq.search import Sampling

from examples.benchmarks.devices import check_device
from lamemo_fairseq.arguments import ArgumentParser
from lamemo_fairseq.core.decoding.drawing import Draw, draw
from lamemo_fairseq.core.decoding.sampler import Sampler
from lamemo_fairseq.core.decoding.state import DecodingState
from lamemo_fairseq.generation import PromptGenerator
from lamemo_fairseq.generation.generator import read_prompts
from lamemo_fairseq.models.config import MemoryLanguageModelConfig
from lamemo_fairseq.models.decoder import FairseqMemoryDecoder
from lamemo_fairseq.models.language_models import MemoryLanguageModel
from lamemo_fairseq.models.presets import SETTINGS

WORDS = 208
MEMORIES = {"lookahead": "disentangled", "recurrent": "transformer-xl"}


def build(memory: str, length: int) -> MemoryLanguageModel:
    sizes = {**SETTINGS["enwik8"], "mem_len": length, "preset_tokens_per_sample": length}
    dictionary = Dictionary()
    for i in range(WORDS - len(dictionary)):
        dictionary.add_symbol(str(i))
    torch.manual_seed(1)
    cfg = MemoryLanguageModelConfig(
        memory=memory, position_encoding=MEMORIES[memory], tokens_per_sample=length, **sizes
    )
    return MemoryLanguageModel(FairseqMemoryDecoder(cfg, dictionary)).eval()


def synchronized() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def filled(model: MemoryLanguageModel, tokens: torch.Tensor) -> DecodingState:
    state = DecodingState(model.decoder, len(tokens))
    state.read(tokens)
    return state


def disagreement(model: MemoryLanguageModel, tokens: torch.Tensor) -> float:
    """Return the largest difference of features over the next segment between decoding and one pass."""
    length = model.decoder.segment_length
    state, memory = filled(model, tokens[:, : 2 * length]), None
    for segment in tokens.split(length, dim=1):
        expected, memory, _ = model.decoder.read_segment(segment, memory)
    features = [state.read(tokens[:, i : i + 1]) for i in range(2 * length, 3 * length)]
    return float((torch.cat(features, dim=1) - expected).abs().max())


def recomputing(model: MemoryLanguageModel, tokens: torch.Tensor, count: int, again: int) -> float:
    """Return the tokens/s of a batch where each token refreshes the whole memory, and passes again with *again* tokens.

    With ``again=0``, M + 1 rows a token pass through all layers, as the authors' code generates. With the segment's
    tokens so far, the outputs are those of the cached way.
    """
    memory = None
    for segment in tokens.split(model.decoder.segment_length, dim=1):
        _, memory, _ = model.decoder.read_segment(segment, memory)
    seconds = []
    for _ in range(count + 1):
        start = synchronized()
        features, _, _ = model.decoder.read_segment(tokens[:, : again + 1], memory)
        scores = model.decoder.output_layer(features[:, -1:])
        draw(model.get_normalized_probs((scores, None), True)[:, 0], top_p=0.95)
        seconds.append(synchronized() - start)
    return len(tokens) / statistics.median(seconds[1:])


def cached(model: MemoryLanguageModel, tokens: torch.Tensor, segments: int, compiled: bool) -> list[float]:
    """Return the tokens/s of a batch in each of some successive segments, the refresh included."""
    state = filled(model, tokens[:, :-1])
    sampler = Sampler(state, choose=Draw(top_p=0.95), compiled=compiled)
    length, last, rates = model.decoder.segment_length, tokens[:, -1], []
    last = sampler(last, length)[:, -1]  # records the graphs
    size = state.cache.size()
    for _ in range(segments):
        start = synchronized()
        last = sampler(last, length)[:, -1]
        rates.append(len(tokens) * length / (synchronized() - start))
    assert state.cache.size() == size
    print(f"  cache: {size / 2**20 / len(tokens):.1f} MiB a sequence, the same after {segments} more segments")
    return rates


class SamplingInTheLoop(Sampling):
    """Sampling by fairseq's own loop, which plain sampling would bypass."""


def generating(model: MemoryLanguageModel, search: type[Sampling], tokens: torch.Tensor, count: int) -> float:
    """Return the tokens/s of a batch through the generator of the commands, on texts of *count* new tokens."""
    words = model.decoder.dictionary
    options = {
        "beam_size": 1,
        "max_len_b": count,
        "min_len": count,
        "search_strategy": search(words, sampling_topp=0.95),
    }
    generator = PromptGenerator([model], words, **options)
    lengths = [tokens.size(1)] * len(tokens)
    start = synchronized()
    read_prompts(model, tokens, lengths)
    begin = synchronized()
    hypotheses = generator.generate([model], {"net_input": {"src_tokens": tokens}})
    seconds = synchronized() - begin - (begin - start)
    assert all(len(text[0]["tokens"]) == tokens.size(1) + count for text in hypotheses)
    return len(tokens) * (count + 1) / seconds


def through_the_generator(model: MemoryLanguageModel, tokens: torch.Tensor, count: int, repeats: int) -> None:
    """Measure both ways in turn, so that other work of the machine affects both."""
    ways = (Sampling, SamplingInTheLoop)
    for way in ways:
        generating(model, way, tokens, 2)  # compiles kernels and records graphs
    rates = [[generating(model, way, tokens, count) for way in ways] for _ in range(repeats)]
    fast, loop = (statistics.median(column) for column in zip(*rates, strict=True))
    print(
        f"    through the generator, {count} new tokens: {fast:,.1f} tokens/s; in fairseq's loop {loop:,.1f}, "
        f"ratio {fast / loop:.2f} (medians of {repeats})",
        flush=True,
    )


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--length", type=int, default=512, help="memory M and segment N")
    parser.add_argument("--segments", type=int, default=4)
    parser.add_argument("--compile", action="store_true", help="compile the layers as well")
    parser.add_argument("--through", nargs="+", choices=["sampler", "generator"], default=["sampler"])
    parser.add_argument("--new-tokens", type=int, default=256, help="of a text, through the generator")
    parser.add_argument("--repeats", type=int, default=3, help="through the generator")
    parser.add_argument("--memory", nargs="+", choices=list(MEMORIES), default=list(MEMORIES))
    args = parser.parse_args()
    check_device(args.device)
    on_gpu = args.device == "cuda"
    machine = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}, enwik8 sizes, M = N = {args.length}", flush=True)
    for memory in args.memory:
        model = build(memory, args.length).to(args.device)
        tokens = torch.randint(4, WORDS, (2, 3 * args.length), device=args.device)
        error = disagreement(model, tokens)
        assert error < 1e-3, f"{memory}: cached and recomputed features differ by {error}"
        print(f"{memory}: both ways agree to {error:.1e} in float32", flush=True)
        model = model.bfloat16() if on_gpu else model
        for batch in args.batch:
            tokens = torch.randint(4, WORDS, (batch, 2 * args.length), device=args.device)
            if "generator" in args.through:
                print(f"  batch {batch}:", flush=True)
                through_the_generator(model, tokens, args.new_tokens, args.repeats)
            if "sampler" not in args.through:
                continue
            count = 20 if on_gpu else 5
            slow = recomputing(model, tokens, count, 0), recomputing(model, tokens, count, args.length // 2)
            rates = cached(model, tokens, args.segments, args.compile)
            rate = statistics.median(rates)
            print(
                f"  batch {batch}: cached {rate:,.0f} tokens/s ({', '.join(f'{r:,.0f}' for r in rates)} by segment)\n"
                f"    recomputing the memory: {slow[0]:,.1f} tokens/s, ratio {rate / slow[0]:.1f}\n"
                f"    and the half segment before: {slow[1]:,.1f} tokens/s, ratio {rate / slow[1]:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    with torch.no_grad():
        main()
