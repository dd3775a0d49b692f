"""Released checkpoints become fairseq's, give the released losses, and come back bit by bit."""

import argparse
import math
import re
import sys
import types
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder
from fairseq_cli import eval_lm, generate, interactive, train, validate

from lamemo_fairseq.analysis.__main__ import main as analyse
from lamemo_fairseq.checkpoints.convert import load_plain
from lamemo_fairseq.convert_checkpoint import main
from lamemo_fairseq.core import LanguageModel, TextEncoding
from lamemo_fairseq.core.memory.compressive.options import CompressiveOptions
from lamemo_fairseq.models.language_models import LaMemoLanguageModel, TransformerXLLanguageModel

from .core.test_golden import FOLDER
from .helpers import TASK, USER_DIR, random_tokens, run_command, segments_of, write_data
from .released import SQUARE, export, import_released, released, trained_here
from .test_commands import printed

CASES = [pytest.param(p, id=p.name) for p in sorted(FOLDER.glob("*.npz"))]


def fits(words, config):
    return not config["cutoffs"] or words.index("<eos>") < config["cutoffs"][0]


@pytest.mark.parametrize("path", CASES)
def test_an_imported_model_has_the_released_loss_and_comes_back(path, tmp_path):
    case, words, checkpoint = released(path)
    if not fits(words, checkpoint["model_config"]):
        case, words, checkpoint = released(path, row=1)
    row = words.index("<eos>") == case["tokens"][1, 0] and words.index("<eos>") != case["tokens"][0, 0]
    if not fits(words, checkpoint["model_config"]):
        pytest.skip("both rows begin with a word outside the first band")
    import_released(checkpoint, tmp_path)

    dictionary = Dictionary.load(str(tmp_path / "dict.txt"))
    tokens = [dictionary.index("</s>" if words[t] == "<eos>" else words[t]) for t in case["tokens"][int(row), 1:]]
    builder = MMapIndexedDatasetBuilder(str(tmp_path / "test.bin"), dtype=np.int32)
    builder.add_item(torch.tensor(tokens))
    builder.finalize(str(tmp_path / "test.idx"))
    text = printed(
        eval_lm.cli_main, tmp_path, *TASK, "--path", tmp_path / "checkpoint.pt", "--batch-size", 1, "--num-workers", 0
    )
    segments = len(case["seg_lens"])
    nll = np.concatenate([case[f"nll/{k}"][int(row)] for k in range(segments)])
    assert float(text.split("Loss (base 2): ")[1].split(",")[0]) == pytest.approx(nll.mean() / math.log(2), abs=1e-4)

    back = export(tmp_path, "checkpoint.pt", "back.pt")
    assert back["model_config"] == checkpoint["model_config"] and back["vocab"] == words
    assert set(back["model_state"]) == set(checkpoint["model_state"])
    for name, weight in checkpoint["model_state"].items():
        assert torch.equal(back["model_state"][name], weight), name


@pytest.mark.parametrize(
    "options",
    [{}, {"position_encoding": "disentangled-normal"}, {"adaptive_softmax_cutoff": "6,11"},
     {"adaptive_softmax_cutoff": "6,11", "adaptive_softmax_factor": 2.0, "adaptive_input": True}],
)  # fmt: skip
def test_a_model_trained_here_can_be_exported_and_imported_again(options, tmp_path):
    decoder = trained_here(tmp_path, **options)
    exported = export(tmp_path)
    assert exported["model_config"]["attn_type"] == 3 and exported["model_config"]["n_token"] == 17
    assert torch.equal(exported["model_state"]["r_r_bias_future"], decoder.positions.ahead_position_bias)
    frequencies = exported["model_state"]["pos_emb.inv_freq"]
    torch.testing.assert_close(frequencies, 1 / 10000 ** (torch.arange(0, 8, 2) / 8))
    main(["import", str(tmp_path / "released.pt"), str(tmp_path / "again")])
    assert (tmp_path / "again" / "dict.txt").read_text() == (tmp_path / "dict.txt").read_text()
    weights = load_plain(tmp_path / "again" / "checkpoint.pt")["model"]
    for name, weight in decoder.state_dict().items():
        assert torch.equal(weights[f"decoder.{name}"], weight), name


@pytest.mark.parametrize(("rate", "told"), [(None, 0), (0.0, 0), (0.25, 1)])
def test_an_activation_dropout_that_the_released_code_lacks_is_told(rate, told, tmp_path, caplog):
    trained_here(tmp_path, activation_dropout=rate)
    export(tmp_path)
    assert (
        caplog.text.count("--activation-dropout 0.25 is left out: the released code trains on with dropout 0") == told
    )


class Vocab:
    """Looks like the released code's vocabulary once it is saved under that name."""

    def __init__(self, words):
        self.idx2sym = words


def test_the_released_vocabulary_object_is_read_without_its_code(tmp_path, monkeypatch):
    _, words, checkpoint = released(SQUARE)
    monkeypatch.setattr(Vocab, "__module__", "utils.vocabulary")
    module = types.ModuleType("utils.vocabulary")
    module.Vocab = Vocab
    monkeypatch.setitem(sys.modules, "utils", types.ModuleType("utils"))
    monkeypatch.setitem(sys.modules, "utils.vocabulary", module)
    saved = {**checkpoint, "vocab": Vocab(words), "args": argparse.Namespace(lr=1.0)}
    torch.save(saved, tmp_path / "released.pt")
    monkeypatch.delitem(sys.modules, "utils.vocabulary")
    main(["import", str(tmp_path / "released.pt"), str(tmp_path / "out")])
    assert (tmp_path / "out" / "checkpoint.pt").exists()


def test_an_imported_checkpoint_serves_every_command(tmp_path, capsys):
    """With the figures of the one that was exported; resumed and finetuned from; in Python by any class."""
    model = ["--decoder-layers", 1, "--decoder-embed-dim", 8, "--decoder-attention-heads", 2]
    model += ["--arch", "transformer_xl_lm", "--decoder-ffn-embed-dim", 8, "--mem-len", 8, "--tokens-per-sample", 8]
    run = [*TASK, *model, "--batch-size", 2, "--optimizer", "adam", "--lr", 0.01, "--num-workers", 0, "--max-update", 4]
    data = write_data(tmp_path / "data", train=300, valid=60)
    run_command(train.cli_main, data, *run, "--disable-validation", "--save-dir", tmp_path / "trained")
    trained, imported = tmp_path / "trained" / "checkpoint_last.pt", tmp_path / "imported" / "checkpoint.pt"
    main(["export", str(trained), str(tmp_path / "released.pt"), "--dictionary", str(data / "dict.txt")])
    main(["import", str(tmp_path / "released.pt"), str(imported.parent)])
    assert (imported.parent / "dict.txt").read_text() == (data / "dict.txt").read_text()
    saved, again = (torch.load(path, weights_only=True)["model"] for path in (trained, imported))
    assert saved.keys() == again.keys() and all(torch.equal(saved[name], again[name]) for name in saved)

    no_task = ["--user-dir", USER_DIR, "--cpu", "--num-workers", 0]
    split = ["--gen-subset", "valid", "--batch-size", 2]
    (tmp_path / "prompt").write_text("w3 w4\n")
    commands = {
        "eval-lm": (eval_lm.cli_main, split, r"Loss \(base 2\): (\S+),"),
        "validate": (validate.cli_main, ["--valid-subset", "valid", "--batch-size", 2], r" loss (\S+) "),
        "generate": (generate.cli_main, [*split, "--max-len-b", 3, "--prefix-size", 2], r"(?m)^H-\d+\t(.*)$"),
        "interactive": (
            interactive.cli_main,
            ["--input", tmp_path / "prompt", "--max-len-b", 3, "--beam", 2],
            r"(?m)^H-\d+\t(.*)$",
        ),
    }
    for name, (command, options, figures) in commands.items():
        found = []
        for path in (trained, imported):
            text = printed(command, data, *no_task, "--path", path, *options)
            found.append(re.findall(figures, text)[-1:])
        assert found[0] == found[1] and found[0], name
    scores = []
    for path, kind in ((trained, TransformerXLLanguageModel), (imported, TransformerXLLanguageModel),
                       (imported, LaMemoLanguageModel)):  # fmt: skip
        scores.append(kind.from_pretrained(path.parent, path.name, data).score("w3 w4 w5")["positional_scores"])
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])
    assert analyse([str(data), f"A={trained}", f"B={imported}", "--out", str(tmp_path / "figures"), "--cpu"]) == 0
    one, other = re.findall(r"^[AB]: (loss .*)$", capsys.readouterr().out, flags=re.MULTILINE)
    assert one == other
    for option in ("--restore-file", "--finetune-from-model"):
        folder = tmp_path / option
        run_command(train.cli_main, data, *run, "--disable-validation", "--save-dir", folder, option, imported)
        assert not torch.equal(last(folder)["model"]["decoder.layers.0.self_attn.qkv_proj.weight"],
                               saved["decoder.layers.0.self_attn.qkv_proj.weight"])  # fmt: skip


def last(folder):
    return torch.load(folder / "checkpoint_last.pt", weights_only=False)


def test_a_released_vocabulary_with_odd_words(tmp_path):
    """Words that no text has, fairseq's own symbols among them, keep their rows."""
    _, words, checkpoint = released(SQUARE)
    odd = ["<s>", "<pad>", "", "two words", " ", "a\u2028b", "#fairseq:overwrite", "madeupword0000", "\ufeff"]
    for word in odd:
        words[next(i for i, w in enumerate(words) if w.startswith("word"))] = word
    import_released(checkpoint, tmp_path)
    dictionary = Dictionary.load(str(tmp_path / "dict.txt"))
    table = load_plain(tmp_path / "checkpoint.pt")["model"]["decoder.embed_tokens.tables.0.weight"]
    theirs = checkpoint["model_state"]["word_emb.emb_layers.0.weight"]
    for place, word in enumerate(words):
        assert torch.equal(table[dictionary.symbols.index({"<eos>": "</s>"}.get(word, word))], theirs[place]), word
    back = export(tmp_path, "checkpoint.pt", "back.pt")
    assert back["vocab"] == words and torch.equal(back["model_state"]["word_emb.emb_layers.0.weight"], theirs)


@pytest.mark.parametrize("softmax", [{}, {"adaptive_softmax_cutoff": "8,12", "adaptive_input": True}], ids=str)
def test_a_trained_model_becomes_one_of_the_core(tiny_data, tmp_path, softmax, capsys):
    options = [word for name, value in softmax.items() for word in ("--" + name.replace("_", "-"), value)]
    options = [word for word in options if word is not True]
    run_command(
        train.cli_main,
        *(tiny_data, *TASK, "--arch", "compressive_transformer_lm", "--decoder-layers", 2, "--decoder-embed-dim", 16),
        *("--decoder-attention-heads", 2, "--mem-len", 6, "--compressed-len", 4, "--compression-rate", 2, *options),
        *("--batch-size", 4, "--tokens-per-sample", 8, "--max-update", 3, "--optimizer", "adam", "--lr", 0.01),
        *("--disable-validation", "--save-dir", tmp_path),
    )
    checkpoint = str(tmp_path / "checkpoint_last.pt")
    main(["core", checkpoint, str(tmp_path / "core"), "--dictionary", str(tiny_data / "dict.txt")])
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path / 'core'}, for LanguageModel.load\n")
    assert (tmp_path / "core/dict.txt").read_text() == (tiny_data / "dict.txt").read_text()

    core = LanguageModel.load(tmp_path / "core")
    assert core.config.own_options == CompressiveOptions(compressed_len=4, compression_rate=2)
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([checkpoint])
    decoder = model.eval().decoder
    text, state, seen = random_tokens(3, 24, words=40), None, []
    with torch.no_grad():
        for position, segment in segments_of(decoder, text):
            scores = decoder.get_normalized_probs(decoder(segment, position=position), log_probs=True)
            features, state, _ = core(segment, state)
            assert torch.equal(core.log_probs(features), scores)
            seen.append(position.index)
    assert seen == [0, 1, 2]

    assert core.tokenizer.encoding == TextEncoding() and len(core.tokenizer) == core.config.vocabulary_size

    if find_spec("transformers"):
        options = ["--format", "transformers", "--dictionary", str(tiny_data / "dict.txt")]
        main(["export", checkpoint, str(tmp_path / "hf"), *options])
        exported = LanguageModel.load(tmp_path / "hf")
        assert exported.tokenizer.symbols == core.tokenizer.symbols and exported.config == core.config
        assert all(map(torch.equal, exported.state_dict().values(), core.state_dict().values()))

    pieces = ["--tokenizer", "moses", "--bpe", "subword_nmt"]
    main(["core", checkpoint, str(tmp_path / "core"), "--dictionary", str(tiny_data / "dict.txt"), *pieces])
    assert LanguageModel.load(tmp_path / "core").tokenizer.encoding == TextEncoding("moses", "subword_nmt")
    for given, message in (
        (["--bpe-codes", "codes"], "--bpe-codes is for --bpe subword_nmt: pass that too"),
        ([*pieces, "--bpe-codes", str(tmp_path / "lost")], "lost: there is no such file"),
        (["--bpe", "sentencepiece"], "needs a file: pass --sentencepiece-model"),
        (["--source-lang", "de"], "--source-lang is for --tokenizer moses"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["core", checkpoint, str(tmp_path / "no"), "--dictionary", str(tiny_data / "dict.txt"), *given])
    for given in (["core", "CHECKPOINT", "no", "--dictionary", "d"], ["import", "CHECKPOINT", "no"]):
        lost = str(tmp_path / "checkpoint_lats.pt")
        with pytest.raises(SystemExit, match=f"there is no checkpoint {lost}: did you mean {checkpoint}"):
            main([lost if word == "CHECKPOINT" else word for word in given])

    other = tmp_path / "other.txt"
    other.write_text("x 1\n")
    with pytest.raises(SystemExit, match=r"another dictionary.*--dictionary"):
        main(["core", checkpoint, str(tmp_path / "no"), "--dictionary", str(other)])
    assert not (tmp_path / "no").exists()
