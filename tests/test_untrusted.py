"""Nothing in a checkpoint is run, whichever command or call opens it."""

import argparse
import copy
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq_cli import eval_lm, generate, interactive, train, validate

from lamemo_fairseq import convert_checkpoint
from lamemo_fairseq.analysis.__main__ import main as analyse
from lamemo_fairseq.host.configuration import read_ours
from lamemo_fairseq.models.language_models import TransformerXLLanguageModel
from lamemo_fairseq.tasks.segment_language_modeling import SegmentLanguageModelingConfig, SegmentLanguageModelingTask

from .helpers import TASK, USER_DIR, run_command, write_data
from .test_commands import printed

SMALL = [
    "--arch", "transformer_xl_lm", "--decoder-layers", 1, "--decoder-embed-dim", 8, "--decoder-attention-heads", 2,
    "--decoder-ffn-embed-dim", 8, "--tokens-per-sample", 8, "--mem-len", 8, "--batch-size", 2, "--optimizer", "adam",
    "--lr", 1e-3, "--disable-validation", "--num-workers", 0,
]  # fmt: skip
NO_TASK = [option for option in TASK if option not in ("--task", "segment_language_modeling")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), train=300, valid=20)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A checkpoint with averages."""
    folder = tmp_path_factory.mktemp("trained")
    run_command(
        train.cli_main, data, *TASK, *SMALL, "--max-update", 2, "--store-ema", "--ema-decay", 0.5, "--save-dir", folder
    )
    return folder / "checkpoint_last.pt"


class Runs:
    """A pickled object whose loading calls a function."""

    def __init__(self, canary: str):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def hostile(good, kind: str, canary: Path):
    """A checkpoint that makes the folder *canary* when its configuration is built, or when it is unpickled."""
    code = f"__import__('os').mkdir({str(canary)!r})"
    state = copy.deepcopy(good)
    cfg = state["cfg"]
    audio = {"_name": "wav2vec2", "conv_feature_layers": code}
    if kind in ("another model", "another model and task"):
        cfg["model"] = audio
    if kind == "another model and task":
        cfg["task"] = {"_name": "language_modeling", "data": cfg["task"]["data"]}
    if kind == "a language model":
        characters = {"character_embeddings": True, "character_filters": code, "tokens_per_sample": 8}
        cfg["model"] = {"_name": "transformer_lm", **characters}
    if kind == "arguments of old":
        state["args"] = argparse.Namespace(arch="fconv_lm", task="language_modeling", decoder_layers=code)
    if kind == "criterion":
        wer = {"wer_kenlm_model": None, "wer_lexicon": None, "wer_lm_weight": 2.0, "wer_word_score": -1.0}
        cfg["criterion"] = {"_name": "ctc", "wer_args": code, "zero_infinity": False, "post_process": "letter", **wer}
    if kind == "pickle":
        state["extra_state"]["val_loss"] = Runs(str(canary))
    return state


KINDS = ["another model", "another model and task", "a language model", "arguments of old", "criterion", "pickle"]


def hub(data, path, folder):
    TransformerXLLanguageModel.from_pretrained(path.parent, f"good.pt:{path.name}", data)


def analysed(data, path, folder):
    if analyse([str(data), f"A={path}", "--out", str(folder / "figures"), "--cpu", "--batch-size", "2"]):
        raise SystemExit("told on the terminal")


def called(data, path, folder):
    """As the commands do, but without their look at the file."""
    config = SegmentLanguageModelingConfig(data=str(data), dataset_impl=None, update_freq=[1])
    task = SegmentLanguageModelingTask.setup_task(config)
    checkpoint_utils.load_model_ensemble_and_task([str(path)], task=task)


def exported(data, path, folder):
    dictionary = str(data / "dict.txt")
    convert_checkpoint.main(["export", str(path), str(folder / "released.pt"), "--dictionary", dictionary])


def command(main, *options, task=TASK):
    return lambda data, path, folder: run_command(main, data, *task, "--path", path, *options, "--num-workers", 0)


def training(*option):
    def run(data, path, folder):
        run_command(train.cli_main, data, *TASK, *SMALL, "--max-update", 2, "--no-save", *option, path)

    return run


EVALUATE = ["--gen-subset", "valid", "--batch-size", 2]
VALIDATE = ["--valid-subset", "valid", "--batch-size", 2]
PROMPT = ["--input", Path(__file__).parent / "__init__.py", "--beam", 1, "--max-len-b", 2]
WAYS = {
    "eval-lm": command(eval_lm.cli_main, *EVALUATE),
    "eval-lm, no task": command(eval_lm.cli_main, *EVALUATE, task=NO_TASK),
    "validate": command(validate.cli_main, *VALIDATE),
    "validate, no task": command(validate.cli_main, *VALIDATE, task=NO_TASK),
    "generate": command(generate.cli_main, *EVALUATE, "--max-len-b", 2),
    "generate, no task": command(generate.cli_main, *EVALUATE, "--max-len-b", 2, task=NO_TASK),
    "interactive": command(interactive.cli_main, *PROMPT),
    "interactive, no task": command(interactive.cli_main, *PROMPT, task=NO_TASK),
    "hub": hub,
    "analysis": analysed,
    "export": exported,
    "a task in Python": called,
    "restore": training("--restore-file"),
    "finetune": training("--finetune-from-model"),
    "averages": training("--store-ema", "--ema-seed-model"),
}
# A criterion is built by fairseq-validate alone.
ACCEPTED = {("criterion", way) for way in WAYS if not way.startswith("validate")}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_in_a_checkpoint_is_run(way, data, trained, tmp_path, capsys):
    good = torch.load(trained, weights_only=False)
    shutil.copy(trained, tmp_path / "good.pt")
    kinds = KINDS if way not in ("restore", "finetune", "averages") else ["another model", "arguments of old", "pickle"]
    for kind in kinds:
        canary, path = tmp_path / "ran", tmp_path / "hostile.pt"
        torch.save(hostile(good, kind, canary), path)
        refused = None
        try:
            WAYS[way](data, path, tmp_path)
        except (Exception, SystemExit) as error:
            refused = error
        assert not canary.exists(), f"{kind} ran code"
        if (kind, way) in ACCEPTED:
            assert refused is None, (kind, refused)
        else:
            assert isinstance(refused, (ValueError, SystemExit)), (kind, refused)
            told = str(refused) if way != "analysis" else capsys.readouterr().err.strip().split("\n")[-1]
            assert "\n" not in told and len(told) < 400, (kind, told)
            assert str(path) in told or kind == "criterion" or "feeds segments with memory" in told, (kind, told)


def change(*keys, to):
    def change_it(state):
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = to

    return change_it


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change("cfg", "model", "decoder_layers", to=[2]), r"--decoder-layers cannot be \[2\]"),
        (change("cfg", "model", "mem_len", to="many"), r"--mem-len cannot be 'many'"),
        (change("cfg", "model", "mem_len", to=None), r"--mem-len cannot be None"),
        (change("cfg", "model", "mem_len", to={"a": 1}), r"--mem-len cannot be \{'a': 1\}"),
        (change("cfg", "model", "mem_len", to=1.5), r"--mem-len cannot be 1.5"),
        (change("cfg", "model", "dropout", to="__import__('os')"), r"--dropout cannot be \"__import__"),
        (change("cfg", "model", "memory", to="wav2vec2"), r"--memory cannot be 'wav2vec2'"),
        (change("cfg", "model", "memory", to="${oc.env:HOME}"), r"cfg.model.memory.* stands for another value"),
        (
            change("cfg", "model", "position_encoding", to="linear"),
            r"--position-encoding cannot be 'linear': the known ones are absolute, .*; one of your own goes into ",
        ),
        (change("cfg", "model", "attention_backend", to="double"), r"'double', .*put its file back .*or pass --model-"),
        (change("cfg", "model", "attention_backend", to=3), r"--attention-backend cannot be 3"),
        (
            change("cfg", "model", "_name", to="fading_lm"),
            r"names the model 'fading_lm', .*; one of your own goes into",
        ),
        (change("cfg", "common", "user_dir", to="${oc.env:HOME}"), r"cfg.common.user_dir.* stands for another value"),
        (change("cfg", "model", "decoder_layers", to="???"), r"cfg.model.decoder_layers.* stands for another value"),
        (change("cfg", "model", "mem_len", to=torch.ones(1)), r"cfg.model.mem_len' is a Tensor, not a plain value"),
        (change("cfg", "model", to=argparse.Namespace(_name="lamemo_lm")), r"names the model None"),
        (change("cfg", "model", to="lamemo_lm"), r"names the model None"),
        (change("cfg", "model", "_name", to=["lamemo_lm"]), r"names the model None"),
        (change("cfg", "model", 3, to=4), r"cfg.model has names of options that are no words"),
        (change("cfg", "task", "_name", to="audio_pretraining"), r"names the task 'audio_pretraining'"),
        (change("cfg", "task", "update_freq", to="x"), r"--update-freq cannot be 'x'"),
        (change("cfg", "generation", "beam", to="x"), r"--beam cannot be 'x'"),
        (change("cfg", "dataset", "batch_size", to="x"), r"--batch-size cannot be 'x'"),
        (change("cfg", "dataset", to=[1]), r"options of DatasetConfig are a list"),
        (change("cfg", "interactive", "input", to=[1]), r"--input cannot be \[1\]"),
        (change("cfg", "model", "dropout", to=float("nan")), r"--dropout is nan"),
        (change("cfg", "model", "decoder_layers", to=-1), r"--decoder-layers is -1"),
        (change("cfg", to=[1]), r"holds args, cfg, .*, so it is no checkpoint of fairseq-train: train with"),
        (change("cfg", to=None), r"holds args, cfg, .*, so it is no checkpoint of fairseq-train: train with"),
        (change("args", to=argparse.Namespace(arch="lamemo_lm")), r"no configuration as this package saves it"),
        (change("model", to=[1]), r"weights under 'model'"),
        (change("model", "decoder.output", to="x"), r"weights under 'model'"),
        (change("optimizer_history", to=[]), r"'optimizer_history' is no list"),
        (change("optimizer_history", to=[{"num_updates": "x"}]), r"after how many updates"),
        (change("extra_state", to=None), r"'extra_state' does not say"),
    ],
)
def test_a_checkpoint_that_is_not_what_this_package_saves(spoil, message, data, trained, tmp_path):
    state = torch.load(trained, weights_only=False)
    spoil(state)
    path = tmp_path / "spoilt.pt"
    torch.save(state, path)
    with pytest.raises(ValueError, match=message) as refusal:
        TransformerXLLanguageModel.from_pretrained(tmp_path, "spoilt.pt", data)
    assert "\n" not in str(refusal.value)
    assert str(path) in str(refusal.value) or "--dropout" in message or "layers is" in message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            "Chapter 1",
            r"no checkpoint of .*; nothing in it was run \(torch cannot read it\): pass another, or if it is of",
        ),
        (
            "a book",
            r"no checkpoint of fairseq, or a damaged one \(IndexError: .*\): pass another, or copy it again",
        ),
        (
            Runs("ran"),
            r"no checkpoint of .*; nothing in it was run \(it holds the object [\w.]+\): pass another, or if",
        ),
        ([1], "holds no dictionary but a list, so it is no checkpoint of fairseq-train: train with"),
        ({}, "holds nothing, so it is no checkpoint of fairseq-train: train with"),
    ],
    ids=["text", "another text", "object", "list", "empty"],
)
def test_a_file_of_another_kind_is_told_without_torchs_advice(content, told, tmp_path):
    """Which is to run it."""
    path = tmp_path / "other.pt"
    path.write_text(content) if isinstance(content, str) else torch.save(content, path)
    with pytest.raises(ValueError, match=f"other.pt (is )?{told}") as refused:
        read_ours(str(path))
    with pytest.raises(SystemExit, match=r"other\.pt (holds|lacks|is not)") as unconverted:
        convert_checkpoint.main(["import", str(path), str(tmp_path / "out")])
    for message in (str(refused.value), str(unconverted.value)):
        assert "\n" not in message and "weights_only" not in message and "safe_globals" not in message


def test_a_model_is_used_without_the_backend_that_it_was_trained_with(data, trained, tmp_path, caplog):
    """By the remedies that the refusal names, by a run that goes on with another, and by a folder for the core."""
    state = torch.load(trained, weights_only=False)
    state["cfg"]["model"]["attention_backend"] = "double"
    torch.save(state, tmp_path / "checkpoint_last.pt")
    path = tmp_path / "checkpoint_last.pt"
    overrides = ["--model-overrides", "{'attention_backend': 'auto'}"]
    losses = []
    for file, options in ((trained, []), (path, overrides)):
        told = printed(eval_lm.cli_main, data, *TASK, *EVALUATE, "--path", file, "--num-workers", 0, *options)
        losses += re.findall(r"Loss.*Perplexity.*", told)
    assert len(losses) == 2 and losses[0] == losses[1]
    TransformerXLLanguageModel.from_pretrained(tmp_path, path.name, data, attention_backend="eager")
    run_command(train.cli_main, data, *TASK, *SMALL, "--max-update", 3, "--save-dir", tmp_path)
    assert "--attention-backend is auto, the checkpoint was trained with double" in caplog.text
    torch.save(state, path)
    convert_checkpoint.main(["core", str(path), str(tmp_path / "model"), "--dictionary", str(data / "dict.txt")])
    assert "--attention-backend double is not known here: the folder has auto" in caplog.text


@pytest.mark.parametrize(
    ("kind", "section", "message"),
    [
        ("bpe", {"_name": "gpt2"}, r"names the bpe 'gpt2'; .* pass bpe=NAME yourself"),
        ("tokenizer", {"_name": "nltk"}, r"names the tokenizer 'nltk'"),
        ("bpe", {"_name": "sentencepiece", "sentencepiece_model": "http://x/y"}, r"names 'http://x/y', and nothing is"),
        ("tokenizer", {"_name": "moses", "source_lang": [1]}, r"tokenizer moses: --source-lang cannot be \[1\]"),
    ],
)
def test_a_tokenizer_that_a_checkpoint_names(kind, section, message, data, trained, tmp_path):
    state = torch.load(trained, weights_only=False)
    state["cfg"][kind] = section
    torch.save(state, tmp_path / "named.pt")
    with pytest.raises(ValueError, match=message):
        TransformerXLLanguageModel.from_pretrained(tmp_path, "named.pt", data)
    own = {"bpe": "characters", "tokenizer": "space"}[kind]
    hub = TransformerXLLanguageModel.from_pretrained(tmp_path, "named.pt", data, **{kind: own})
    chosen = hub.cfg[kind]
    assert own == (chosen if isinstance(chosen, str) else chosen._name)


def test_other_models_are_opened_as_before(data, tmp_path):
    """With this package's --user-dir, a checkpoint of fairseq's own, for whom its task is named."""
    task = ["--user-dir", USER_DIR, "--task", "language_modeling", "--cpu", "--distributed-world-size", 1]
    run_command(
        train.cli_main, data, *task, "--arch", "transformer_lm", "--decoder-layers", 1, "--decoder-embed-dim", 8,
        "--decoder-attention-heads", 2, "--decoder-ffn-embed-dim", 8, "--tokens-per-sample", 8, "--batch-size", 2,
        "--optimizer", "adam", "--lr", 1e-3, "--max-update", 2, "--disable-validation", "--save-dir", tmp_path,
    )  # fmt: skip
    path = tmp_path / "checkpoint_last.pt"
    overrides = ["--model-overrides", "{'no_such_option': 1}"]
    run_command(eval_lm.cli_main, data, *task, "--path", path, *EVALUATE, "--tokens-per-sample", 8, *overrides)
    with pytest.raises(ValueError, match=r"model 'transformer_lm' and the task 'language_modeling', .* pass --task"):
        run_command(eval_lm.cli_main, data, *NO_TASK, "--path", path, *EVALUATE)
