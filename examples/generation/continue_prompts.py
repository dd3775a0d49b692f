"""Continue the same prompts with LaMemo and Transformer-XL in the paper's setting, and measure repetition.

    python examples/generation/continue_prompts.py DATA lamemo_lm=FOLDER transformer_xl_lm=FOLDER --text test.txt

Each model continues passages of the text by 256 tokens, with memory 512, clamp 400, top-p .95 and temperature 1. Tokens
are bytes here, and words are counted in the decoded text. `--new-tokens` generates more.
"""

import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from lamemo_fairseq.arguments import ArgumentParser
from lamemo_fairseq.core.decoding.drawing import Draw
from lamemo_fairseq.core.decoding.sampler import Sampler
from lamemo_fairseq.core.decoding.state import DecodingState
from lamemo_fairseq.models.language_models import MODELS
from preprocess.byte_lines import decode, encode


def passages(text: bytes, count: int, length: int) -> list[bytes]:
    """Return evenly spaced passages."""
    stride = (len(text) - length) // count
    return [text[i * stride : i * stride + length] for i in range(count)]


def ngrams(words: list[str], n: int) -> Counter:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def repetition(texts: list[str]) -> dict[str, float]:
    """Return percentages: of different n-grams in all texts, and of 4-grams that a text repeats."""
    split = [re.findall(r"\w+|[^\w\s]", text) for text in texts]
    percentages = {}
    for n in (1, 2, 3):
        counts: Counter = sum((ngrams(words, n) for words in split), Counter())
        percentages[f"distinct-{n}"] = 100 * len(counts) / max(1, counts.total())
    fours = [ngrams(words, 4) for words in split]
    percentages["repeated 4-grams"] = 100 * (1 - sum(map(len, fours)) / max(1, sum(c.total() for c in fours)))
    return percentages


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder of dict.txt")
    parser.add_argument("models", nargs="+", metavar="ARCH=FOLDER")
    parser.add_argument("--text", required=True, help="file that the prompts are taken from")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-length", type=int, default=1024, help="in bytes")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--show", type=int, default=1, help="how many texts to print")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.new_tokens > args.prompt_length:
        parser.error(
            f"--new-tokens {args.new_tokens} is more than --prompt-length {args.prompt_length}: the book's texts are "
            "ends of prompts, and shorter ones have more different n-grams. Pass a larger --prompt-length"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompts = passages(Path(args.text).read_bytes(), args.prompts, args.prompt_length)
    results = {"the book": repetition([p[-args.new_tokens :].decode("utf-8", "replace") for p in prompts])}
    for entry in args.models:
        arch, folder = entry.split("=")
        hub = MODELS[arch][0].from_pretrained(
            folder, "checkpoint_last.pt", str(Path(args.data).resolve()), mem_len=512, clamp_len=400
        )
        hub.to(device)
        model = hub.models[0]
        # Line feeds are end-of-sentence tokens: the prompts are full of them, and generation goes on past them. A
        # passage may begin and end within a letter, so it is bytes and no text.
        texts = [torch.cat([hub.binarize(line) for line in encode(p.split(b"\n"))])[:-1] for p in prompts]
        tokens = torch.stack([torch.cat([text.new_tensor([hub.src_dict.eos()]), text]) for text in texts]).to(device)
        torch.manual_seed(args.seed)
        with torch.no_grad():
            state = DecodingState(model.decoder, len(tokens))
            state.read(tokens[:, :-1])
            words = Sampler(state, choose=Draw(top_p=0.95))(tokens[:, -1], args.new_tokens)
        symbols = [
            " ".join(hub.tgt_dict[i] if i != hub.tgt_dict.eos() else "\n" for i in text) for text in words.tolist()
        ]
        written = [b"".join(decode(s.split("\n")))[:-1].decode("utf-8", "replace") for s in symbols]
        results[arch] = repetition(written)
        for i in range(args.show):
            print(f"--- {arch} continues: ...{prompts[i][-200:].decode('utf-8', 'replace')}\n--- with:\n{written[i]}\n")
    names = list(results["the book"])
    print("| | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    for name, of_model in results.items():
        print(f"| {name} | " + " | ".join(f"{of_model[n]:.1f}" for n in names) + " |")


if __name__ == "__main__":
    main()
