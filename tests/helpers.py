"""Small dictionaries, decoders and binarized data for the tests."""

import re
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from fairseq.data import data_utils
from fairseq.data.indexed_dataset import MMapIndexedDataset, MMapIndexedDatasetBuilder

from lamemo_fairseq.core.memory.position import SegmentPosition
from lamemo_fairseq.data.dictionary import TextDictionary
from lamemo_fairseq.data.segments import SegmentDataset
from lamemo_fairseq.data.streams import TokenSequence
from lamemo_fairseq.models.config import MemoryLanguageModelConfig
from lamemo_fairseq.models.decoder import FairseqMemoryDecoder

from . import configuration
from .core.helpers import ENDS, VARIANTS, enlarge, random_tokens, tiny_options

__all__ = ["VARIANTS", "random_tokens"]

configuration.quicken()

USER_DIR = str(Path(__file__).parent.parent / "lamemo_fairseq")
# One rank whatever the machine: fairseq counts its GPUs also for --cpu.
TASK = ["--user-dir", USER_DIR, "--task", "segment_language_modeling", "--cpu", "--distributed-world-size", "1"]
ON_GPU = [option for option in TASK if option != "--cpu"]


def noise(text: str) -> list:
    """Return the lines of a log that no user of a command can do anything about.

    But for Python's remarks on fairseq's source, which it makes on each start where it keeps no compiled files.
    """
    told = r"hydra|(?<!Syntax)Warning|'_name'|shared param|can_reuse"
    return [line for line in text.splitlines() if re.search(told, line)]


def dictionary_of(words: int) -> TextDictionary:
    dictionary = TextDictionary()
    for i in range(words - len(dictionary)):
        dictionary.add_symbol(f"w{i}")
    assert len(dictionary) == words
    return dictionary


def tiny_decoder(variant=VARIANTS[0], words=17, seed=0, dtype=torch.float64, **options) -> FairseqMemoryDecoder:
    """A decoder small enough for hundreds of examples, in evaluation mode, without dropout."""
    chosen = tiny_options(variant, {})
    chosen["tokens_per_sample"] = chosen.pop("segment_length")
    symbols = dictionary_of(words).symbols
    chosen.update({name: " ".join(symbols[word] for word in chosen[name]) for name in ENDS if name in chosen})
    torch.manual_seed(seed)
    decoder = FairseqMemoryDecoder(MemoryLanguageModelConfig(**{**chosen, **options}), dictionary_of(words))
    enlarge(decoder)
    return decoder.to(dtype).eval()


def read_streams(
    decoder: FairseqMemoryDecoder, tokens: torch.Tensor, split="valid", streams=None, lengths=None
) -> torch.Tensor:
    """Scores of ``tokens [B, T]``, of each row as many as *lengths* says, read through the memory of streams."""
    scores = []
    for position, segment in segments_of(decoder, tokens, split, streams, lengths):
        scores.append(decoder(segment, lengths_within(position, segment, lengths), position)[0])
    return torch.cat(scores, dim=1)


def lengths_within(position: SegmentPosition, segment: torch.Tensor, lengths=None):
    """How much of each row of a segment is not padding, for rows of *lengths* in all; None if they have no padding."""
    start = position.index * position.segment_length
    return None if lengths is None else (torch.as_tensor(lengths) - start).clamp(0, segment.size(1)).to(segment.device)


def segments_of(decoder: FairseqMemoryDecoder, tokens: torch.Tensor, split="valid", streams=None, lengths=None):
    """The positions and tokens of all segments, in order."""
    parts = tokens.split(decoder.segment_length, dim=1)
    for index, segment in enumerate(parts):
        position = SegmentPosition(
            split=split,
            epoch=1,
            num_streams=100,
            segment_length=decoder.segment_length,
            streams=tuple(streams if streams is not None else range(len(tokens))),
            index=index,
            last=index == len(parts) - 1,
            ragged=lengths is not None and index * decoder.segment_length + segment.size(1) > min(lengths),
        )
        yield position, segment


def split_of(lines, segment_length, words=17, name="train", roll_seed=None) -> SegmentDataset:
    """A dataset over lines given as lists of word ids."""

    class Lines(list):
        sizes = np.array([len(line) for line in lines], dtype=np.int64)

    tensors = Lines(torch.tensor(line, dtype=torch.int64) for line in lines)
    return SegmentDataset(TokenSequence(tensors, words, name), name, segment_length, eos=2, roll_seed=roll_seed)


def write_data(folder: Path, words=40, seed=0, **sizes: int) -> Path:
    """A binarized corpus as fairseq-preprocess leaves it, its words following one another predictably.

    Args:
        sizes: tokens of each split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dictionary = dictionary_of(words)
    dictionary.save(str(folder / "dict.txt"))
    generator = np.random.default_rng(seed)
    for split, size in sizes.items():
        builder = MMapIndexedDatasetBuilder(str(folder / f"{split}.bin"), dtype=np.int32)
        left = size
        while left > 0:
            length = min(left, int(generator.integers(1, 30)))
            steps = generator.integers(1, 3, length - 1)
            line = 4 + (int(generator.integers(words)) + np.cumsum(steps)) % (words - 4)
            builder.add_item(torch.from_numpy(np.append(line, dictionary.eos())))
            left -= length
        builder.finalize(str(folder / f"{split}.idx"))
        if size == 0:  # fairseq cannot map an empty file
            continue
        written = data_utils.load_indexed_dataset(str(folder / split), dictionary)
        assert sum(written.sizes) == size
    return folder


def record_documents(folder: Path, *splits: str) -> Path:
    """Record documents of one to five lines for splits of a corpus."""
    for split in splits:
        left, counts = len(MMapIndexedDataset(str(folder / split))), []
        while sum(counts) < left:
            counts.append(min(left - sum(counts), 1 + len(counts) * 3 % 5))
        (folder / f"{split}.documents").write_text("".join(f"{count}\n" for count in counts))
    return folder


def run_command(main, *arguments) -> None:
    """Call the main of a fairseq command, such as ``fairseq_cli.train.cli_main``, with arguments."""
    with mock.patch.object(sys, "argv", ["fairseq", *map(str, arguments)]):
        main()
