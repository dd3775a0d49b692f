"""Bad input gets an error that names the option and says what to do."""

import argparse
import contextlib
import sys
import types

import numpy as np
import pytest
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq_cli import eval_lm, train

from lamemo_fairseq.core.registry import Registry
from lamemo_fairseq.models.config import MemoryLanguageModelConfig
from lamemo_fairseq.models.decoder import FairseqMemoryDecoder
from lamemo_fairseq.models.language_models import MemoryLanguageModel
from lamemo_fairseq.tasks.segment_language_modeling import SegmentLanguageModelingConfig, SegmentLanguageModelingTask

from .helpers import TASK, USER_DIR, dictionary_of, run_command, tiny_decoder, write_data

MODEL = ["--decoder-layers", 2, "--decoder-embed-dim", 8, "--decoder-attention-heads", 2, "--decoder-ffn-embed-dim", 8]
OPTIMIZER = ["--optimizer", "adam", "--lr", 1e-3, "--max-update", 2]


def train_on(data, folder, *options, task=TASK, arch="lamemo_lm", sizes=("--tokens-per-sample", 8, "--batch-size", 4)):
    run_command(train.cli_main, data, *task, "--arch", arch, *MODEL, *OPTIMIZER, *sizes, "--save-dir", folder, *options)


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data", train=200, valid=60, test=30)


@pytest.fixture
def checkpoint(data, tmp_path):
    train_on(data, tmp_path / "run", "--disable-validation")
    return tmp_path / "run" / "checkpoint_last.pt"


def test_missing_split(data, tmp_path):
    for split, option in (("valid", "--valid-subset"), ("train", "--train-subset")):
        with pytest.raises(
            FileNotFoundError, match=r"no split 'other' in .*holds test, train, valid.*fairseq-preprocess"
        ):
            train_on(data, tmp_path / split, option, "other")


def test_missing_dictionary(data, tmp_path):
    (data / "dict.txt").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"no dictionary at .*python -m (lamemo_fairseq\.)?preprocess own --source .*or with fairseq-preprocess",
    ):
        train_on(data, tmp_path / "run")


def test_no_data():
    with pytest.raises(ValueError, match="no data: pass the folder"):
        SegmentLanguageModelingTask.setup_task(SegmentLanguageModelingConfig(tokens_per_sample=8))


@pytest.mark.parametrize(
    ("options", "module", "message"),
    [
        (
            ["--write-checkpoints-asynchronously"],
            "iopath",
            "asynchronously is refused: it writes neither checkpoint_last.pt",
        ),
        (["--ddp-backend", "fully_sharded"], "fairscale", "fully_sharded cuts checkpoints up.* pass pytorch_ddp"),
    ],
)
def test_training_that_could_not_be_resumed(options, module, message, data, tmp_path, monkeypatch):
    """Without the packages that fairseq itself asks for, so that it gets as far as with them."""
    monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    monkeypatch.setattr(train, "fsdp_enable_wrap", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(train, "fsdp_wrap", lambda model: model)
    with pytest.raises(ValueError, match=message):
        train_on(data, tmp_path / "run", *options)
    assert not list((tmp_path / "run").glob("*.pt"))


def test_empty_split(data, tmp_path):
    write_data(data, valid=0)
    with pytest.raises(ValueError, match="valid holds no tokens"):
        train_on(data, tmp_path / "run")


def test_too_little_text_for_the_streams(data, tmp_path):
    sizes = ("--tokens-per-sample", 8, "--batch-size", 26)
    with pytest.raises(
        ValueError,
        match=r"'train' has 200 tokens.*26 streams.*at most 25 streams fit; pass a smaller --batch-size or --tok",
    ):
        train_on(data, tmp_path / "run", "--disable-validation", sizes=sizes)
    sizes = ("--tokens-per-sample", 8, "--batch-size", 25, "--batch-size-valid", 61)
    with pytest.raises(
        ValueError, match=r"'valid' has 60 tokens.*at most 60 streams fit; pass a smaller --batch-size-valid, or"
    ):
        train_on(data, tmp_path / "run", sizes=sizes)
    train_on(data, tmp_path / "run", sizes=(*sizes[:-1], 60))


def test_text_that_fills_no_segment(data, tmp_path):
    with pytest.raises(ValueError, match="even one stream does not fit"):
        train_on(data, tmp_path / "run", sizes=("--tokens-per-sample", 201, "--batch-size", 1))


def test_no_number_of_streams(data, tmp_path):
    with pytest.raises(ValueError, match=r"pass --batch-size.*--max-tokens 7 .*segment of 8"):
        train_on(data, tmp_path / "run", sizes=("--tokens-per-sample", 8, "--max-tokens", 7))


def opened(data, split="train"):
    config = SegmentLanguageModelingConfig(data=str(data), tokens_per_sample=8, train_subset="train", dataset_impl=None)
    return SegmentLanguageModelingTask.setup_task(config).load_dataset(split)


@pytest.mark.parametrize(("word", "named"), [(40, 40), (-1, -1)])
def test_a_word_that_the_dictionary_does_not_have_is_found_before_training(data, word, named):
    """Although only the last token is wrong, which would be read at the end of the first epoch."""
    stored = np.fromfile(data / "train.bin", dtype=np.int32)
    stored[-1] = word
    stored.tofile(data / "train.bin")
    with pytest.raises(ValueError, match=rf"train holds the word id {named}, but dict.txt has 40 words"):
        opened(data)


def test_numbers_that_are_no_ids(data):
    index = bytearray((data / "train.idx").read_bytes())
    index[17] = 6  # of floating point
    (data / "train.idx").write_bytes(index)
    with pytest.raises(ValueError, match=r"train holds numbers of type float64, not word ids"):
        opened(data)


@pytest.mark.parametrize("end", [".idx", ".bin"])
def test_half_a_split(data, end):
    (data / f"train{end}").unlink()
    with pytest.raises(ValueError, match=rf"train is damaged: {end} is missing"):
        opened(data)


def test_a_split_joined_from_parts_is_looked_over_in_all_of_them(data):
    write_data(data, train1=50)
    assert len(opened(data).tokens) == 200
    with (data / "train1.bin").open("ab") as file:
        file.write(b"?")
    config = SegmentLanguageModelingConfig(data=str(data), tokens_per_sample=8, train_subset="train", dataset_impl=None)
    task = SegmentLanguageModelingTask.setup_task(config)
    task.load_dataset("train")
    with pytest.raises(ValueError, match=r"train1 is damaged: .bin has 201 bytes, of 200"):
        task.load_dataset("train", combine=True)


@pytest.mark.parametrize("words", [48, 40], ids=["other size", "other words"])
def test_a_dictionary_that_does_not_match_the_checkpoint(data, checkpoint, words):
    (data / "dict.txt").write_text("".join(f"v{i} 1\n" for i in range(words - 4)))
    with pytest.raises(
        ValueError,
        match=rf"another dictionary, of 40 words, than .* {words} words.*preprocess own --srcdict.* another --save-dir",
    ):
        run_command(eval_lm.cli_main, data, *TASK, "--path", checkpoint, "--gen-subset", "test")


@pytest.mark.parametrize(
    ("trained", "asked_for"),
    [
        ({"memory": "continuous"}, {"memory": "none"}),
        ({"memory": "compressive"}, {"memory": "compressive", "compression_rate": 3}),
        ({"memory": "token"}, {"memory": "token", "memory_tokens": 3}),
        ({"memory": "associative"}, {"memory": "associative", "associative_dim": 3}),
    ],
    ids=str,
)
def test_options_that_do_not_go_with_the_checkpoints_weights(trained, asked_for):
    """Those of --model-overrides, say."""
    options = {"position_encoding": "transformer-xl", "compression": "conv"}
    one, other = (MemoryLanguageModel(tiny_decoder(**{**options, **given})) for given in (trained, asked_for))
    with pytest.raises(ValueError, match=r"(?s)another --arch or other options.*--model-overrides.*size mismatch"):
        other.load_state_dict(one.state_dict())


def test_context_window(data, checkpoint):
    with pytest.raises(ValueError, match=r"--context-window is refused: .*mem_len"):
        run_command(
            eval_lm.cli_main, data, *TASK, "--path", checkpoint, "--gen-subset", "test", "--context-window", 4,
            "--tokens-per-sample", 8,
        )  # fmt: skip


def test_another_task_names_this_one(data, tmp_path):
    other = ["--user-dir", USER_DIR, "--task", "language_modeling", "--cpu"]
    with pytest.raises(ValueError, match="--task segment_language_modeling"):
        train_on(data, tmp_path / "run", task=other)


def test_another_model_under_this_task(data, tmp_path):
    with pytest.raises(ValueError, match=r"LSTMLanguageModel does not have: pass --arch lamemo_lm"):
        run_command(
            train.cli_main, data, *TASK, "--arch", "lstm_lm", *OPTIMIZER, "--tokens-per-sample", 8,
            "--batch-size", 2, "--save-dir", tmp_path / "run",
        )  # fmt: skip


@pytest.mark.parametrize("length", [0, -3])
def test_segment_length(data, tmp_path, length):
    with pytest.raises(ValueError, match=rf"--tokens-per-sample is {length}, it must be at least 1"):
        train_on(data, tmp_path / "run", sizes=("--tokens-per-sample", length, "--batch-size", 2))


def test_no_segment_length(data, tmp_path):
    with pytest.raises(ValueError, match="pass --tokens-per-sample"):
        train_on(data, tmp_path / "run", sizes=("--batch-size", 2))


@pytest.mark.parametrize(
    ("option", "known"),
    [
        ("--memory", "lookahead"),
        ("--position-encoding", "disentangled"),
        ("--attention-backend", "eager"),
        ("--lookahead-window", "right"),
    ],
)
def test_unknown_names_on_the_command_line(data, tmp_path, option, known):
    with pytest.raises(ValueError, match=rf"{option} nothing is not known: pass one of .*{known}"):
        train_on(data, tmp_path / "run", option, "nothing")


SEGATRON = {"position_encoding": "segatron", "memory": "recurrent"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "nothing"}, r"unknown memory 'nothing'; the known ones are .*lookahead, .*recurrent"),
        ({"position_encoding": "nothing"}, r"unknown position encoding 'nothing'; .* disentangled, .*transformer-xl"),
        ({"attention_backend": "nothing"}, r"unknown attention backend 'nothing'; .* auto, blocked, eager"),
        ({"lookahead_window": "nothing"}, r"unknown --lookahead-window 'nothing'; .* right, full"),
        ({"mem_len": 0}, r"--mem-len is 0, .*--memory none"),
        ({"mem_len": -5}, r"--mem-len is -5, .*positive"),
        ({"decoder_embed_dim": 10, "decoder_attention_heads": 4}, r"10 does not divide into 4.*--decoder-head-dim"),
        ({"decoder_embed_dim": 9, "decoder_attention_heads": 3}, r"--decoder-embed-dim 9 is odd"),
        ({"decoder_layers": 0}, r"--decoder-layers is 0"),
        ({"decoder_head_dim": -1}, r"--decoder-head-dim is -1"),
        ({"dropout": 1.0}, r"--dropout is 1.0"),
        ({"attention_dropout": -0.1}, r"--attention-dropout is -0.1"),
        ({"clamp_len": -1}, r"--clamp-len is -1: pass 0"),
        ({"position_encoding": "absolute"}, r"absolute numbers the tokens of one segment.*--memory none"),
        ({"position_encoding": "shaw"}, r"shaw has no distances to the right.*disentangled"),
        ({"memory": "recurrent"}, r"nothing attends to its right: take transformer-xl"),
        ({**SEGATRON, "sentence_ends": "w1 ."}, r"--sentence-ends: '.' is not in the dictionary of 17 words: pass tok"),
        ({**SEGATRON, "sentence_ends": "w1", "paragraph_ends": "</p>"}, r"--paragraph-ends: '</p>' is not in the dic"),
        (SEGATRON, r"none of \. \? ! is in the dictionary of 17 words: pass .* --sentence-ends, or ''"),
        ({**SEGATRON, "sentence_ends": "", "paragraph_ends": ""}, r"no word ends one: pass --sentence-ends"),
        ({**SEGATRON, "sentence_ends": "w1", "memory": "compressive"}, r"are not tokens with --memory compressive"),
        ({"memory": "none", "position_encoding": "shaw", "same_length": True}, r"--same-length .*--memory none"),
        ({"adaptive_softmax_cutoff": "10,x"}, r"--adaptive-softmax-cutoff '10,x': pass whole numbers"),
        ({"adaptive_softmax_cutoff": "10,5"}, r"--adaptive-softmax-cutoff is 10,5: cutoffs must increase"),
        ({"adaptive_softmax_cutoff": "10,17"}, r"within the dictionary of 17 words"),
        ({"adaptive_softmax_cutoff": "5,10", "adaptive_softmax_factor": 2.0}, r"--adaptive-input.*--untie-output"),
        ({"adaptive_softmax_cutoff": "5", "adaptive_softmax_factor": 0.5}, r"--adaptive-softmax-factor is 0.5"),
        ({"adaptive_softmax_cutoff": "5", "adaptive_softmax_factor": 9.0, "untie_output": True}, r"leaves nothing"),
        ({"adaptive_input": True}, r"--adaptive-softmax-cutoff: pass it"),
        ({"decoder_output_dim": 6}, r"cannot share the embeddings' weights.*--untie-output"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_decoder(**options)


def test_options_that_do():
    """The refusals above are narrow: each has a neighbour that works."""
    for options in (
        {"decoder_embed_dim": 10, "decoder_attention_heads": 4, "decoder_head_dim": 3},
        {"decoder_output_dim": 6, "untie_output": True},
        {"adaptive_softmax_cutoff": "5,10", "adaptive_softmax_factor": 2.0, "adaptive_input": True},
        {"adaptive_softmax_cutoff": "5,10", "adaptive_softmax_factor": 2.0, "untie_output": True},
    ):
        assert isinstance(tiny_decoder(**options), FairseqMemoryDecoder)


def test_a_registry_refuses_doubles_and_lists_names():
    registry = Registry("thing")
    registry.register("b")(1)
    registry.register("a")(2)
    registry.register("c")(Registry)
    message = r"^thing 'c' is registered already: lamemo_fairseq\.core\.registry\.Registry and .*\.Other have the same "
    with pytest.raises(ValueError, match=message):
        registry.register("c")(type("Other", (), {}))
    with pytest.raises(ValueError, match=r"^thing 'a' is registered already: 2 and 3 have the same name"):
        registry.register("a")(3)
    with pytest.raises(ValueError, match="unknown thing 'd'; the known ones are a, b, c"):
        registry["d"]
    assert registry["b"] == 1


def test_the_help_names_every_option():
    """The options are fairseq arguments, each with a help text."""
    parser = argparse.ArgumentParser()
    gen_parser_from_dataclass(parser, MemoryLanguageModelConfig())
    undocumented = [a.dest for a in parser._actions if not a.help and a.dest != "help"]
    assert undocumented == [] and "--mem-len" in parser.format_help()
    assert len(dictionary_of(9)) == 9
