"""Memories with options of their own, trained by one command and evaluated by another with other sizes."""

import re

import pytest
import torch
from fairseq_cli import eval_lm, train

from lamemo_fairseq.core.memory.recurrent import RecurrentMemory

from .helpers import TASK, run_command, write_data
from .test_commands import TRAIN, evaluate, printed


def test_commands_train_the_compression_and_evaluate_with_other_sizes(tmp_path):
    data = write_data(tmp_path / "data", train=1200, valid=100, test=301)
    sizes = ["--mem-len", 10, "--compressed-len", 6, "--compression-rate", 4]
    log = printed(
        train.cli_main, data, *TASK, "--arch", "compressive_transformer_lm", *TRAIN, *sizes, "--update-freq", 2,
        "--max-update", 6, "--save-dir", tmp_path,
    )  # fmt: skip
    assert float(re.search(r"memory_compression=?\W*([\d.]+)", log).group(1)) > 0
    path = tmp_path / "checkpoint_last.pt"
    biases = {k: v for k, v in torch.load(path, weights_only=False)["model"].items() if k.endswith("conv.bias")}
    assert len(biases) == 2 and all(bias.count_nonzero() for bias in biases.values())  # they were 0
    (tokens, loss), other = (
        evaluate(data, path, "--batch-size", 2, "--model-overrides", str(overrides))
        for overrides in ({}, {"mem_len": 30, "compressed_len": 20})
    )
    assert tokens == other[0] == 301 and loss != other[1]


def test_commands_with_another_segment_length_at_test_time(tmp_path):
    data = write_data(tmp_path / "data", train=600, valid=60, test=301)
    run_command(
        train.cli_main, data, *TASK, "--arch", "recurrent_memory_transformer_lm", "--decoder-layers", 2,
        "--decoder-embed-dim", 8, "--decoder-attention-heads", 2, "--decoder-ffn-embed-dim", 8, "--batch-size", 4,
        "--tokens-per-sample", 16, "--bptt-segments", 2, "--memory-tokens", 3, "--mem-len", 5, "--optimizer", "adam",
        "--lr", 0.03, "--max-update", 12, "--save-dir", tmp_path, "--disable-validation", "--num-workers", 0,
    )  # fmt: skip
    path = tmp_path / "checkpoint_last.pt"
    usual = evaluate(data, path, "--batch-size", 2)
    assert usual[0] == 301

    def other(length, overrides):
        options = ["--tokens-per-sample", length, "--model-overrides", str(overrides)]
        return evaluate(data, path, "--batch-size", 2, *options)

    assert other(8, {"bptt_segments": 1}) == usual  # the same segments, one at a time
    tokens, loss = other(10, {"bptt_segments": 1, "mem_len": 40})
    assert tokens == 301 and loss != usual[1]
    with pytest.raises(ValueError, match=r"--tokens-per-sample 5 .*--bptt-segments 2 .*--model-overrides"):
        run_command(eval_lm.cli_main, data, *TASK, "--path", path, "--gen-subset", "test", "--tokens-per-sample", 5)


def test_commands_with_a_memory_that_has_no_slots(tmp_path):
    """Its gradient crosses segments in training; in evaluation only their length can be chosen."""
    data = write_data(tmp_path / "data", train=600, valid=60, test=301)
    run_command(
        train.cli_main, data, *TASK, "--arch", "infini_attention_lm", "--decoder-layers", 2, "--decoder-embed-dim", 8,
        "--decoder-attention-heads", 2, "--decoder-ffn-embed-dim", 8, "--batch-size", 4, "--tokens-per-sample", 16,
        "--bptt-segments", 2, "--optimizer", "adam", "--lr", 0.03, "--max-update", 12, "--save-dir", tmp_path,
        "--disable-validation", "--num-workers", 0,
    )  # fmt: skip
    path = tmp_path / "checkpoint_last.pt"
    gates = torch.load(path, weights_only=False)["model"]["decoder.layers.0.self_attn.memory_gate"]
    assert gates.count_nonzero() == 2  # they were 0

    def evaluated(length, overrides):
        options = ["--tokens-per-sample", length, "--model-overrides", str(overrides)]
        return evaluate(data, path, "--batch-size", 2, *options)

    usual = evaluate(data, path, "--batch-size", 2)
    assert usual[0] == 301 and evaluated(8, {"bptt_segments": 1}) == usual
    tokens, loss = evaluated(50, {"bptt_segments": 1})
    assert tokens == 301 and loss != usual[1]
    with pytest.raises(ValueError, match=r"--model-overrides: mem_len belongs to --memory .* leave it out"):
        evaluated(16, {"mem_len": 40})


def test_a_weight_that_nothing_trains_is_told(tmp_path, monkeypatch):
    """As the gate of a new memory that detaches what it gates; weights that wait for their gradient are not."""
    made = RecurrentMemory.__init__

    def with_gate(memory, config):
        made(memory, config)
        memory.gate = torch.nn.Parameter(torch.zeros(3))

    data = write_data(tmp_path / "data", train=600, valid=60, test=301)
    command = [
        data,
        *TASK,
        "--arch",
        "transformer_xl_lm",
        *TRAIN,
        "--max-update",
        3,
        "--save-dir",
        tmp_path,
        "--no-save",
    ]
    assert "no gradient" not in printed(train.cli_main, *command)
    monkeypatch.setattr(RecurrentMemory, "__init__", with_gate)
    told = "memory.gate: no gradient in the first update; it may never be trained, and several ranks would wait for"
    assert printed(train.cli_main, *command).count(told) == 1
