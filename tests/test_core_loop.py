"""The code in docs/core.md and docs/transformers.md runs; the loop of the core equals fairseq-train to the last bit."""

import importlib.util
import re
import shlex
import shutil
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import List, Tuple

import pytest
import torch
from fairseq.data import data_utils
from fairseq_cli import train

from lamemo_fairseq import convert_checkpoint
from lamemo_fairseq.core import MEMORIES, LanguageModel, ModelConfig
from lamemo_fairseq.criterions.chunked_cross_entropy import ChunkedCrossEntropyCriterion
from lamemo_fairseq.data.dictionary import TextDictionary

from .helpers import TASK, run_command


def blocks_of(page: str) -> List[Tuple[str, str]]:
    """Return the language and the text of every block of code of a page."""
    text = (Path(__file__).parent.parent / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"```(\w+)\n(.*?)```", text, re.S)


BLOCKS = [block for language, block in blocks_of("core.md") if language == "python"]
SIZES = {"mem_len": 8, "decoder_layers": 2, "decoder_embed_dim": 16, "decoder_attention_heads": 2}
SIZES |= {"decoder_ffn_embed_dim": 24, "attention_dropout": 0.1}
STREAMS, LENGTH, UPDATES = 4, 8, 12


@pytest.fixture(scope="module")
def docs() -> SimpleNamespace:
    """Names that the training block of the page defines."""
    names: dict = {}
    exec(next(block for block in BLOCKS if "def train(" in block), names)
    return SimpleNamespace(**names)


def text_of(folder: Path) -> torch.Tensor:
    """A training split as the loop takes it: the end-of-sentence token, which stands before the first word, leads."""
    dictionary = TextDictionary.load(str(folder / "dict.txt"))
    lines = data_utils.load_indexed_dataset(str(folder / "train"), dictionary)
    return torch.cat([torch.tensor([dictionary.eos()]), *(lines[i].long() for i in range(len(lines)))])


@pytest.mark.parametrize("memory", MEMORIES.names())
def test_the_loop_equals_fairseq_train(memory, docs, tiny_data, tmp_path, monkeypatch):
    positions = "disentangled" if memory == "lookahead" else "transformer-xl"
    architecture = MEMORIES[memory].architecture.name
    logged = []

    def noted(criterion, model, sample, reduce=True, forward=ChunkedCrossEntropyCriterion.forward):
        loss, size, outputs = forward(criterion, model, sample, reduce)
        if model.training:
            logged.append(loss.item() / size)
        return loss, size, outputs

    monkeypatch.setattr(ChunkedCrossEntropyCriterion, "forward", noted)
    taken = {name: value for name, value in SIZES.items() if name != "mem_len" or MEMORIES[memory].has_slots}
    sizes = [word for name, value in taken.items() for word in ("--" + name.replace("_", "-"), value)]
    run_command(
        train.cli_main,
        *(tiny_data, *TASK, "--arch", architecture, "--position-encoding", positions, *sizes, "--batch-size", STREAMS),
        *("--tokens-per-sample", LENGTH, "--max-update", UPDATES, "--criterion", "chunked_cross_entropy"),
        *("--optimizer", "adam", "--lr", 1e-3, "--clip-norm", 0.25, "--seed", 1, "--disable-validation"),
        *("--save-dir", tmp_path),
    )
    saved = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)["model"]

    text = text_of(tiny_data)
    words = len(TextDictionary.load(str(tiny_data / "dict.txt")))
    defaults, own = MEMORIES[memory].architecture.defaults, {f.name for f in fields(MEMORIES[memory].options)}
    taken["memory_options"] = {name: value for name, value in defaults.items() if name in own}
    segments = defaults.get("bptt_segments", 1)
    config = ModelConfig(words, LENGTH, memory=memory, position_encoding=positions, bptt_segments=segments, **taken)
    model, losses = docs.train(config, text, STREAMS, UPDATES)
    assert losses == logged
    assert losses[-1] < losses[0]
    weights = model.state_dict()
    assert set(saved) == {f"decoder.{name}" for name in weights} | {"decoder.dictionary_version"}
    for name, weight in weights.items():
        assert torch.equal(weight, saved[f"decoder.{name}"]), name


@pytest.mark.parametrize(("length", "updates", "most"), [(65, 3, 2), (69, 4, 3), (4, 1, 0), (0, 1, 0), (65, 0, 2)])
def test_a_text_too_short_for_the_updates(docs, length, updates, most):
    """The last segment may be shorter, and none may be empty."""
    config = ModelConfig(9, LENGTH, memory="none", position_encoding="alibi", **{**SIZES, "mem_len": 0})
    text = torch.randint(4, 9, (length,))
    message = f"^updates is {updates}, and a text of {length} words in {STREAMS} streams of segments of 8 has {most}: "
    with pytest.raises(ValueError, match=message):
        docs.train(config, text, STREAMS, updates)
    if most:
        assert len(docs.train(config, text, STREAMS, most)[1]) == most


def run_in_shell(block: str) -> None:
    """Run the conversions of a block of commands, in this process; what it installs is there."""
    for line in block.splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] != ["pip", "install"]:
            assert words[:3] == ["python", "-m", "lamemo_fairseq.convert_checkpoint"], line
            convert_checkpoint.main(words[3:])


def test_the_pages_run(tmp_path, tiny_data, monkeypatch, capsys):
    """All blocks in order, and nothing else: no folder that a block reads is written over by one before it.

    The files have another number of words than the page's first model, and so has the checkpoint that is converted.
    """
    monkeypatch.chdir(tmp_path)
    for file, count in (("train.txt", 300), ("valid.txt", 50)):
        Path(file).write_text("".join(f"w{i}{' ' if i % 10 else chr(10)}" for i in range(count)))
    shutil.copytree(tiny_data, "data-bin/DATA")
    sizes = [word for name, value in SIZES.items() for word in ("--" + name.replace("_", "-"), value)]
    run_command(
        train.cli_main,
        *(tiny_data, *TASK, "--arch", "lamemo_lm", *sizes, "--tokens-per-sample", LENGTH, "--batch-size", STREAMS),
        *("--max-update", 1, "--optimizer", "sgd", "--lr", 1e-3, "--disable-validation", "--save-dir", tmp_path),
    )
    Path("checkpoint_last.pt").rename("checkpoint_best.pt")
    names: dict = {}
    for language, block in blocks_of("core.md"):
        capsys.readouterr()
        if language == "bash":
            run_in_shell(block)
            continue
        small = block.replace("segment_length=150", "segment_length=8, decoder_layers=1, decoder_embed_dim=16")
        exec(small.replace("(8, 150)", "(8, 8)"), names)
        if "math.exp" in block:
            assert 30 < float(capsys.readouterr().out) < 3_000  # of 304 words, hardly trained
            assert names["model"].config.vocabulary_size == 304 and len(names["losses"]) == 2
        if "reader = " in block:
            assert names["words"].shape == (1, 5) and len(names["score"].words) == 5 and len(names["losses"]) == 2
            _, sample, streamed = capsys.readouterr().out.split("\n")  # none of these words is the end of a line
            assert sample.startswith("w1 w2 ") and len(sample.split()) == 22 and len(streamed.split()) == 20
        if "model.generate(" in block:
            assert names["words"].shape == names["log_probs"].shape == (2, 50)
        if "score_documents(" in block:
            assert [len(scores) for scores in names["log_probs"]] == [3, 1]
    assert "num_streams=8, cleared" in BLOCKS[-1]
    assert LanguageModel.load("trained-model").config.segment_length == LENGTH

    if importlib.util.find_spec("transformers") is None:
        return
    names = {}
    for language, block in blocks_of("transformers.md"):
        run_in_shell(block) if language == "bash" else exec(block, names)
    models = [LanguageModel.load(folder) for folder in ("words-model", "words-model-again")]
    assert all(map(torch.equal, *(model.state_dict().values() for model in models)))
    assert models[0].config.vocabulary_size == 1000
