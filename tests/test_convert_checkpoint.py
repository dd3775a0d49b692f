"""Released checkpoints become fairseq's, give the released losses, and come back bit by bit."""

import argparse
import json
import math
import os
import re
import sys
import types
from importlib.util import find_spec
from pathlib import Path

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
from .helpers import TASK, USER_DIR, random_tokens, run_command, segments_of, tiny_decoder, write_data
from .test_commands import printed

SQUARE = Path(__file__).parent / "core/golden" / "attn3_square.npz"
CASES = [pytest.param(p, id=p.name) for p in sorted(FOLDER.glob("*.npz"))]


def released(path, row=0):
    """A case as its authors' code would save it, the first token of a row being the end of a sentence."""
    case = np.load(path)
    config = json.loads(str(case["config"]))
    words = [f"word{i}" for i in range(config["vocab"])]
    words[case["tokens"][row, 0]] = "<eos>"
    state = {k[len("param/") :]: torch.from_numpy(case[k]) for k in case.files if k.startswith("param/")}
    config = {**config, "n_token": config["vocab"], "tie_weight": True, "dropout": 0.0}
    return case, words, {"model_config": config, "model_state": state, "vocab": words}


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
    torch.save(checkpoint, tmp_path / "released.pt")
    main(["import", str(tmp_path / "released.pt"), str(tmp_path)])

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

    main(
        [
            "export",
            str(tmp_path / "checkpoint.pt"),
            str(tmp_path / "back.pt"),
            "--dictionary",
            str(tmp_path / "dict.txt"),
        ]
    )
    back = load_plain(tmp_path / "back.pt")
    assert back["model_config"] == checkpoint["model_config"] and back["vocab"] == words
    assert set(back["model_state"]) == set(checkpoint["model_state"])
    for name, weight in checkpoint["model_state"].items():
        assert torch.equal(back["model_state"][name], weight), name


def trained_here(folder, **options):
    """A checkpoint as fairseq-train leaves it, as far as exporting it goes, with its dict.txt."""
    decoder = tiny_decoder(dtype=torch.float32, **options)
    decoder.dictionary.save(str(folder / "dict.txt"))
    defaults = {
        **{"memory": "lookahead", "position_encoding": "disentangled", "lookahead_window": "right", "mem_len": 4},
        **{"decoder_layers": 2, "decoder_embed_dim": 8, "decoder_attention_heads": 2, "decoder_head_dim": None},
        **{"decoder_ffn_embed_dim": 12, "decoder_input_dim": None, "adaptive_softmax_cutoff": None},
        **{"adaptive_softmax_factor": 1.0, "untie_output": False, "decoder_normalize_before": False, "dropout": 0.0},
        **{"attention_dropout": 0.0, "same_length": False, "clamp_len": 0, "tokens_per_sample": 3},
    }
    weights = {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    cfg = {
        "model": {"_name": "lamemo_lm", **defaults, **options},
        "task": {"_name": "segment_language_modeling", "tokens_per_sample": 3},
    }
    rest = {"optimizer_history": [{"num_updates": 1}], "extra_state": {"train_iterator": {"epoch": 1}}}
    torch.save({"model": weights, "cfg": cfg, **rest}, folder / "trained.pt")
    return decoder


def export(folder):
    main(
        [
            "export",
            *(str(folder / name) for name in ("trained.pt", "released.pt")),
            "--dictionary",
            str(folder / "dict.txt"),
        ]
    )
    return load_plain(folder / "released.pt")


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_fn": "gelu"}, "--activation-fn gelu"),
        ({"lookahead_from_layer": 2}, "--lookahead-from-layer 2"),
        ({"lookahead_every": 3}, "--lookahead-every 3"),
        ({"decoder_output_dim": 6, "untie_output": True}, "--decoder-output-dim 6"),
        ({"adaptive_softmax_cutoff": "6", "adaptive_softmax_factor": 1.5, "adaptive_input": True}, "-factor 1.5"),
        ({"adaptive_softmax_cutoff": "6", "adaptive_softmax_factor": 2.0, "untie_output": True}, "-factor 2.0"),
    ],
)
def test_what_the_released_code_lacks_is_not_exported(options, message, tmp_path):
    trained_here(tmp_path, **options)
    with pytest.raises(SystemExit, match=f"the released code has no model with .*{message}"):
        export(tmp_path)
    assert not (tmp_path / "released.pt").exists()


@pytest.mark.parametrize(("rate", "told"), [(None, 0), (0.0, 0), (0.25, 1)])
def test_an_activation_dropout_that_the_released_code_lacks_is_told(rate, told, tmp_path, caplog):
    trained_here(tmp_path, activation_dropout=rate)
    export(tmp_path)
    assert (
        caplog.text.count("--activation-dropout 0.25 is left out: the released code trains on with dropout 0") == told
    )


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ([1, 2], "holds a list, so it is no checkpoint"),
        ({"model_state": {}, "model_config": None}, "model_config lacks attn_type, n_layer"),
        ("a weight", "lacks the weight 'layers.1.dec_attn.o_net.weight'"),
    ],
)
def test_a_released_checkpoint_that_lacks_something(broken, message, tmp_path):
    trained_here(tmp_path)
    exported = export(tmp_path)
    if broken == "a weight":
        del exported["model_state"]["layers.1.dec_attn.o_net.weight"]
        broken = exported
    elif isinstance(broken, dict):
        broken["vocab"] = exported["vocab"]
    torch.save(broken, tmp_path / "broken.pt")
    with pytest.raises(SystemExit, match=message):
        main(["import", str(tmp_path / "broken.pt"), str(tmp_path / "again")])


class Vocab:
    """Looks like the released code's vocabulary once it is saved under that name."""

    def __init__(self, words):
        self.idx2sym = words


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


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


def test_foreign_objects_are_refused_and_not_run(tmp_path):
    _, _, checkpoint = released(SQUARE)
    torch.save({**checkpoint, "vocab": Evil(tmp_path / "ran")}, tmp_path / "released.pt")
    with pytest.raises(SystemExit, match="not a checkpoint of tensors and plain containers; nothing in it was run"):
        main(["import", str(tmp_path / "released.pt"), str(tmp_path / "out")])
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("model_config"), r"released\.pt lacks 'model_config', so it is no checkpoint of the authors'"),
        (lambda c: [c.pop("model_state"), c.pop("vocab")], "lacks 'model_state', .*; it holds model_config$"),
        (lambda c: c.pop("vocab"), "pass --vocabulary FILE"),
        (lambda c: c["vocab"].pop(), "has 23 words, the vocabulary 22"),
        (lambda c: c["vocab"].__setitem__(0, c["vocab"][1]), "holds a word twice"),
        (
            lambda c: c["model_config"].update(attn_type=7),
            "attn_type 7 is not known here; the known ones are 0, 1, 2, 3",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message, tmp_path):
    _, _, checkpoint = released(SQUARE)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "released.pt")
    with pytest.raises(SystemExit, match=message):
        main(["import", str(tmp_path / "released.pt"), str(tmp_path / "out")])


def test_a_file_cut_short_is_named(tmp_path):
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(SystemExit, match="cut short"):
        main(["import", str(tmp_path / "cut.pt"), str(tmp_path / "out")])


def test_what_does_not_fit_an_imported_checkpoint_is_refused(tmp_path):
    _, _, checkpoint = released(SQUARE)
    torch.save(checkpoint, tmp_path / "released.pt")
    main(["import", str(tmp_path / "released.pt"), str(tmp_path)])
    ours = str(tmp_path / "checkpoint.pt")
    dictionary = ["--dictionary", str(tmp_path / "dict.txt")]
    for arguments, message in (
        (["import", ours, "out"], "is a checkpoint of this package already: pass it to the commands as it is"),
        (["import", str(tmp_path / "released.pt"), ours], "is a file, pass a folder"),
        (["core", ours, f"{ours}/out", *dictionary], f"{ours}/out: {ours} is a file, pass a folder"),
        (["export", ours, f"{ours}/out.pt", *dictionary], f"{ours} is a file, pass a folder"),
        (["export", ours, str(tmp_path), *dictionary], "is a folder: pass a file"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(arguments)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(SystemExit, match=r"latin\.txt is not text in UTF-8: line 1 has"):
        main(["import", str(tmp_path / "released.pt"), "out", "--vocabulary", str(tmp_path / "latin.txt")])
    (tmp_path / "dict.txt").write_text("other 1\n")
    with pytest.raises(SystemExit, match="trained with another dictionary"):
        run_command(
            lambda: main(["export", str(tmp_path / "checkpoint.pt"), "x", "--dictionary", str(tmp_path / "dict.txt")])
        )


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
    torch.save(checkpoint, tmp_path / "released.pt")
    main(["import", str(tmp_path / "released.pt"), str(tmp_path)])
    dictionary = Dictionary.load(str(tmp_path / "dict.txt"))
    table = load_plain(tmp_path / "checkpoint.pt")["model"]["decoder.embed_tokens.tables.0.weight"]
    theirs = checkpoint["model_state"]["word_emb.emb_layers.0.weight"]
    for place, word in enumerate(words):
        assert torch.equal(table[dictionary.symbols.index({"<eos>": "</s>"}.get(word, word))], theirs[place]), word
    main(
        [
            "export",
            str(tmp_path / "checkpoint.pt"),
            str(tmp_path / "back.pt"),
            "--dictionary",
            str(tmp_path / "dict.txt"),
        ]
    )
    back = load_plain(tmp_path / "back.pt")
    assert back["vocab"] == words and torch.equal(back["model_state"]["word_emb.emb_layers.0.weight"], theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["vocab"].__setitem__(c["vocab"].index("word5"), "a\nb"), r"a word a line, and .* 'a\\nb': rename"),
        (lambda c: c["vocab"].__setitem__(c["vocab"].index("word5"), "</s>"), r"holds </s> under two names"),
        (lambda c: c["model_config"].update(n_layer="2"), r"has n_layer '2', no whole number"),
        (lambda c: c["model_config"].update(mem_len=[3]), r"has mem_len \[3\], no whole number"),
        (lambda c: c["model_config"].update(clamp_len="x"), r"holds a value of another kind"),
        (lambda c: c["model_config"].update(dropout="x"), r"could not convert|another kind"),
        (lambda c: c["model_config"].update(d_inner=6), r"fc1.bias has the shape \(\d+,\), and by the config \(6,\)"),
        (lambda c: c["model_state"].update(more="__import__('os')"), r"holds something that is no tensor"),
    ],
)  # fmt: skip
def test_a_released_checkpoint_with_values_of_another_kind(change, message, tmp_path):
    _, _, checkpoint = released(SQUARE)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "released.pt")
    with pytest.raises(SystemExit, match=message) as refusal:
        main(["import", str(tmp_path / "released.pt"), str(tmp_path / "out")])
    assert "\n" not in str(refusal.value) and not (tmp_path / "out" / "checkpoint.pt").exists()


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
