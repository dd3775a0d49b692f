"""Tokens that end sentences and paragraphs, from options to ids."""

from types import SimpleNamespace

import pytest
import torch
from fairseq_cli import train

from lamemo_fairseq.core import LanguageModel
from lamemo_fairseq.data.dictionary import TextDictionary
from lamemo_fairseq.host import restoring
from lamemo_fairseq.models.config import MemoryLanguageModelConfig, model_config

from .helpers import TASK, random_tokens, run_command, tiny_decoder, write_data

SEGATRON = {"memory": "recurrent", "position_encoding": "segatron", "tokens_per_sample": 5}


def dictionary_with(*tokens):
    dictionary = TextDictionary()
    for token in tokens:
        dictionary.add_symbol(token)
    return dictionary


@pytest.mark.parametrize(
    ("options", "sentences", "paragraphs"),
    [
        ({}, ".!", ["</s>"]),
        ({"sentence_ends": "! ; ."}, "!;.", ["</s>"]),
        ({"sentence_ends": "", "paragraph_ends": "; </s>"}, "", [";", "</s>"]),
        ({"paragraph_ends": ""}, ".!", []),
    ],
    ids=str,
)
def test_ids_of_tokens(options, sentences, paragraphs):
    """Without --sentence-ends, those of the usual ones that there are."""
    dictionary = dictionary_with("a", ";", ".", "!")
    config = model_config(MemoryLanguageModelConfig(**SEGATRON, **options), dictionary)
    assert config.sentence_ends == tuple(map(dictionary.index, sentences))
    assert config.paragraph_ends == tuple(map(dictionary.index, paragraphs))


def test_the_core_reads_as_fairseqs_model_does():
    decoder = tiny_decoder(("recurrent", "segatron", "right"))
    core = LanguageModel(decoder.config).double().eval()
    core.load_state_dict({name: p for name, p in decoder.state_dict().items() if name != "dictionary_version"})
    words = random_tokens(2, 10)
    with torch.no_grad():
        assert torch.equal(core.read_text(words), decoder.read_text(words))


def test_training_goes_on_with_the_same_ends(tmp_path):
    """Other ends make another model of the same weights; with other positions they mean nothing."""
    data = write_data(tmp_path / "data", train=200)

    def trained(ends, updates):
        sizes = ["--decoder-layers", 1, "--decoder-embed-dim", 8, "--decoder-attention-heads", 2, "--mem-len", 4]
        run_command(
            train.cli_main, data, *TASK, "--arch", "transformer_xl_lm", *sizes, "--decoder-ffn-embed-dim", 8,
            "--tokens-per-sample", 8, "--batch-size", 4, "--optimizer", "adam", "--lr", 1e-3, "--disable-validation",
            "--num-workers", 0, "--position-encoding", "segatron", "--sentence-ends", ends, "--max-update", updates,
            "--save-dir", tmp_path,
        )  # fmt: skip

    trained("w1 w2", 1)
    with pytest.raises(ValueError, match=r"--sentence-ends is w1, the checkpoint was trained with w1 w2\. Go on with"):
        trained("w1", 2)
    cfg = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)["cfg"]
    for positions, told in (("segatron", ["sentence_ends"]), ("alibi", [])):
        then, now = (
            {"model": {**cfg["model"], "position_encoding": positions, "sentence_ends": e}} for e in ("a", "b")
        )
        differences = restoring._differences(SimpleNamespace(cfg={**cfg, **now}), {"cfg": {**cfg, **then}})
        assert [difference.name for difference in differences] == told
