"""Whatever the input, there is a right answer or an error of ours that names it, and no file is left half written.

``pytest -rP -k fuzz`` says how many inputs were tried; ``LAMEMO_FUZZ=20`` tries twenty times as many.
"""

import os
import random
import shutil
import struct
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq_cli import train
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import lamemo_fairseq
from lamemo_fairseq.core.memory import MEMORIES
from lamemo_fairseq.core.positions import POSITIONS
from lamemo_fairseq.models.config import MemoryLanguageModelConfig
from lamemo_fairseq.models.decoder import FairseqMemoryDecoder
from lamemo_fairseq.tasks.segment_language_modeling import SegmentLanguageModelingConfig, SegmentLanguageModelingTask

from .helpers import TASK, dictionary_of, random_tokens, run_command, write_data

# How many times as many inputs to try.
MORE = int(os.environ.get("LAMEMO_FUZZ", "1"))
OURS = str(Path(lamemo_fairseq.__file__).parent)
TRIED: Counter = Counter()
bounded = settings(max_examples=150 * MORE, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    print("inputs tried:", dict(sorted(TRIED.items())))


def outcome(kind, action, *names):
    """Run it. An error has to be raised by this package, and to say one of the names."""
    try:
        result = action()
    except (ValueError, FileNotFoundError) as error:
        frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        assert frames[-1].startswith(OURS), f"raised in {frames[-1]}: {error}"
        assert any(name in str(error) for name in names), error
        TRIED[f"{kind}: refused"] += 1
        return None
    TRIED[f"{kind}: right"] += 1
    return result


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("sound"), train=300)


def damaged(content: bytes, how: str, number: random.Random) -> bytes:
    place = number.randrange(len(content) + 1)
    garbage = number.randbytes(number.randrange(1, 9))
    return {
        "cut": content[:place],
        "empty": b"",
        "changed": content[:place] + garbage + content[place + len(garbage) :],
        "longer": content[:place] + garbage + content[place:],
        "doubled": content + content,
        "other": number.randbytes(number.randrange(200)),
    }[how]


HOW = ["cut", "empty", "changed", "longer", "doubled", "other"]


@bounded
@given(end=st.sampled_from([".idx", ".bin"]), how=st.sampled_from(HOW), seed=st.integers(0, 10**6))
@example(end=".idx", how="changed", seed=9052)  # the last byte of the index's first nine
def test_fuzz_binarized_data(end, how, seed, sound, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(sound, folder, dirs_exist_ok=True)
    file = folder / f"train{end}"
    content = (sound / f"train{end}").read_bytes()
    file.write_bytes(damaged(content, how, random.Random(seed)))

    dataset = outcome("binarized data", lambda: read_all(folder), str(folder / "train"))
    if dataset is not None:
        # Then what it reads is what is there: every id is one of a word.
        assert len(dataset) == 300 and 0 <= dataset.min() <= dataset.max() < 40


def read_all(folder):
    task = SegmentLanguageModelingTask.setup_task(
        SegmentLanguageModelingConfig(data=str(folder), tokens_per_sample=8, train_subset="train", dataset_impl=None)
    )
    dataset = task.load_dataset("train")
    return dataset.tokens.read(0, len(dataset.tokens))


@bounded
@given(
    ids=st.lists(st.integers(-5, 60), min_size=1, max_size=30),
    dtype=st.sampled_from([np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64, np.float32, np.float64]),
    declared=st.sampled_from([None, 1, 2, 3, 4, 5, 6, 7, 8, 99]),
)
def test_fuzz_ids_and_their_type(ids, dtype, declared, tmp_path):
    folder = write_data(tmp_path / "data", train=30)
    codes = {np.uint8: 1, np.int8: 2, np.int16: 3, np.int32: 4, np.int64: 5}
    codes |= {np.float32: 6, np.float64: 7, np.uint16: 8}
    code = codes[dtype] if declared is None else declared
    stored = np.array(ids).astype(dtype)
    (folder / "train.bin").write_bytes(stored.tobytes())
    header = struct.pack("<9sQBQ", b"MMIDIDX\0\0", 1, code, 1)
    (folder / "train.idx").write_bytes(header + struct.pack("<iq", len(ids), 0))
    tokens = outcome("ids and types", lambda: read_all(folder), str(folder / "train"))
    if tokens is not None:
        assert tokens.min() >= 0 and tokens.max() < 40
        if declared is None:
            assert tokens.tolist() == ids


@bounded
@given(
    lines=st.lists(
        st.one_of(
            st.text(max_size=12),
            st.builds("{} {}".format, st.text("abc", min_size=1, max_size=2), st.integers(-3, 10**6)),
        ),
        max_size=12,
    ),
    encoding=st.sampled_from(["utf-8", "utf-16", "latin-1"]),
)
def test_fuzz_dictionaries(lines, encoding, tmp_path):
    path = tmp_path / "dict.txt"
    path.write_bytes("\n".join(lines).encode(encoding, errors="replace"))
    config = SegmentLanguageModelingConfig(data=str(tmp_path), tokens_per_sample=8)
    task = outcome("dictionaries", lambda: SegmentLanguageModelingTask.setup_task(config), str(path))
    if task is not None:
        assert len(task.dictionary) >= 4


numbers = st.one_of(st.integers(-2, 12), st.just(None))
OPTIONS = {
    "memory": st.sampled_from([*MEMORIES.names(), "other", ""]),
    "position_encoding": st.sampled_from([*POSITIONS.names(), "other"]),
    "lookahead_window": st.sampled_from(["right", "full", "left"]),
    "lookahead_from_layer": st.integers(-1, 4),
    "lookahead_every": st.integers(-1, 4),
    "attention_backend": st.sampled_from(["auto", "eager", "other"]),
    "mem_len": st.integers(-2, 9),
    "memory_tokens": st.integers(-1, 3),
    "memory_reads_cache": st.booleans(),
    "memory_update_rule": st.sampled_from(["linear", "delta", "other"]),
    "memory_gate_lr_scale": st.sampled_from([-1.0, 0.5, 1.0, 100.0]),
    "associative_tokens": st.integers(-1, 3),
    "associative_dim": st.integers(-1, 3),
    "associative_decay": st.sampled_from([-0.5, 0.0, 0.9, 1.0, 1.5]),
    "associative_value_lr_scale": st.sampled_from([-1.0, 0.05, 1.0]),
    "recurrent_states": st.integers(-1, 3),
    "recurrent_scale": st.sampled_from([-1.0, 0.0, 4.0, float("inf")]),
    "recurrent_layers": st.sampled_from([None, "1", "2,1", "3", "", "top"]),
    "state_gate": st.sampled_from(["fixed", "lstm", "other"]),
    "bptt_segments": st.integers(-1, 3),
    "clamp_len": st.integers(-2, 9),
    "same_length": st.booleans(),
    "decoder_layers": st.integers(-1, 3),
    "decoder_embed_dim": st.integers(-1, 12),
    "decoder_attention_heads": st.integers(-1, 5),
    "decoder_ffn_embed_dim": st.integers(-1, 9),
    "decoder_head_dim": numbers,
    "decoder_input_dim": numbers,
    "decoder_output_dim": numbers,
    "dropout": st.sampled_from([-0.5, 0.0, 0.3, 1.0, 7.0, float("nan")]),
    "attention_dropout": st.sampled_from([0.0, 0.3, 1.0]),
    "activation_dropout": st.sampled_from([None, 0.0, -1.0]),
    "adaptive_softmax_cutoff": st.sampled_from([None, "", "5", "5,9", "9,5", "5,5", "a", "5,,9", "0", "17", "5,99"]),
    "adaptive_softmax_factor": st.sampled_from([0.0, 1.0, 2.0, 4.0, float("nan"), float("inf")]),
    "adaptive_input": st.booleans(),
    "untie_output": st.booleans(),
    "tokens_per_sample": numbers,
}


@settings(max_examples=400 * MORE, deadline=None)
@given(
    options=st.lists(st.sampled_from(sorted(OPTIONS)), unique=True, max_size=6).flatmap(
        lambda names: st.fixed_dictionaries({name: OPTIONS[name] for name in names})
    )
)
def test_fuzz_options(options):
    small = {
        "mem_len": 4, "tokens_per_sample": 3, "decoder_layers": 2, "decoder_embed_dim": 8,
        "decoder_attention_heads": 2, "decoder_ffn_embed_dim": 12,
    }  # fmt: skip

    def build_and_read():
        decoder = FairseqMemoryDecoder(MemoryLanguageModelConfig(**{**small, **options}), dictionary_of(17))
        scores = decoder(random_tokens(2, 7))
        return decoder.get_normalized_probs(scores, log_probs=True)

    names = ["--", "unknown", "cutoffs", "bands", "segment length"]
    log_probs = outcome("options", build_and_read, *names)
    if log_probs is not None:
        torch.testing.assert_close(log_probs.logsumexp(-1), torch.zeros(2, 7), rtol=0, atol=1e-4)


RUN = [
    *TASK, "--arch", "lamemo_lm", "--decoder-layers", 1, "--decoder-embed-dim", 4, "--decoder-attention-heads", 1,
    "--decoder-ffn-embed-dim", 4, "--tokens-per-sample", 8, "--mem-len", 8, "--batch-size", 2, "--optimizer", "adam",
    "--lr", 1e-3, "--disable-validation", "--num-workers", 0, "--no-save",
]  # fmt: skip
RUN_AND_SAVE = [option for option in RUN if option != "--no-save"]


@pytest.fixture(scope="module")
def saved_checkpoint(sound, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run_command(train.cli_main, sound, *RUN_AND_SAVE, "--save-dir", folder, "--max-update", 2)
    return folder / "checkpoint_last.pt"


@settings(max_examples=25 * MORE, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(how=st.sampled_from(HOW), seed=st.integers(0, 10**6))
def test_fuzz_checkpoints(how, seed, sound, saved_checkpoint, tmp_path):
    path = tmp_path / "checkpoint_last.pt"
    path.write_bytes(damaged(saved_checkpoint.read_bytes(), how, random.Random(seed)))
    command = [sound, *RUN, "--save-dir", tmp_path, "--max-update", 3]
    outcome("checkpoints", lambda: run_command(train.cli_main, *command), str(path))
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint_last.pt"]
