"""Checkpoints replace the former one only when complete, show every damage, and stay readable by other tools."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from argparse import Namespace
from unittest import mock

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq_cli import eval_lm, train
from hypothesis import given, settings
from hypothesis import strategies as st

from lamemo_fairseq import convert_checkpoint
from lamemo_fairseq.checkpoints.convert import load_plain
from lamemo_fairseq.host import checkpoints
from lamemo_fairseq.host.checkpoints import DamagedCheckpointError, verify
from lamemo_fairseq.host.configuration import read_ours
from lamemo_fairseq.host.seals import seal

from .helpers import TASK, run_command, write_data

TRAIN = [
    *TASK, "--arch", "lamemo_lm", "--decoder-layers", 2, "--decoder-embed-dim", 8, "--decoder-attention-heads", 2,
    "--decoder-ffn-embed-dim", 8, "--tokens-per-sample", 8, "--mem-len", 8, "--batch-size", 2, "--optimizer", "adam",
    "--lr", 1e-3, "--disable-validation", "--num-workers", 0,
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), train=400, valid=60)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Checkpoints of the third, sixth and last update."""
    folder = tmp_path_factory.mktemp("run")
    run_command(train.cli_main, data, *TRAIN, "--save-dir", folder, "--max-update", 8, "--save-interval-updates", 3)
    return folder


@pytest.fixture(scope="module")
def original(run):
    return (run / "checkpoint_last.pt").read_bytes()


def refused(path, content) -> bool:
    path.write_bytes(content)
    try:
        verify(path)
    except DamagedCheckpointError as error:
        assert str(path) in str(error) and "No other one beside it is whole" in str(error)
        return True
    return False


@settings(max_examples=400, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_any_changed_byte_is_refused(original, tmp_path_factory, where, flip):
    content = bytearray(original)
    content[int(where * len(content))] ^= flip
    assert refused(tmp_path_factory.getbasetemp() / "changed.pt", content)


def test_any_changed_byte_of_the_seal_is_refused(original, tmp_path):
    for position in range(len(original) - 200, len(original)):
        content = bytearray(original)
        content[position] ^= 1
        assert refused(tmp_path / "changed.pt", content), position


@settings(max_examples=200, deadline=None)
@given(where=st.one_of(st.floats(0, 1, exclude_max=True), st.integers(-200, -1)))
def test_any_cut_is_refused(original, tmp_path_factory, where):
    length = int(where * len(original)) if isinstance(where, float) else len(original) + where
    assert refused(tmp_path_factory.getbasetemp() / "cut.pt", original[:length])


def test_files_without_a_seal_are_held_to_the_checksums_of_torch(original, tmp_path):
    path = tmp_path / "plain.pt"
    weight = torch.arange(1000.0)
    torch.save({"weight": weight}, path)
    content = path.read_bytes()
    assert not refused(path, content)
    middle = content.index(weight.numpy().tobytes()) + 2000
    assert refused(path, content[:middle] + b"?" + content[middle + 1 :])
    assert refused(path, content[:-1])


def test_only_files_of_torch_are_sealed(tmp_path):
    path = tmp_path / "text.pt"
    path.write_text("a text that is longer than the end of an archive")
    with pytest.raises(ValueError, match=r"text.pt is not a file that torch.save wrote"):
        seal(path)


@pytest.mark.parametrize("damage", ["cut", "changed", "emptied", "replaced"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_loads(damage, data, run, tmp_path):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    last = tmp_path / "checkpoint_last.pt"
    content = last.read_bytes()
    half = len(content) // 2
    last.write_bytes(
        {
            "cut": content[:half],
            "changed": content[:half] + bytes([content[half] ^ 64]) + content[half + 1 :],
            "emptied": b"",
            "replaced": b"no checkpoint at all, but something that is long enough to be one",
        }[damage]
    )
    command = [data, *TRAIN, "--save-dir", tmp_path, "--max-update", 8]
    with pytest.raises(ValueError, match=r"checkpoint_last.pt (is damaged|is no checkpoint)") as refusal:
        run_command(train.cli_main, *command)
    if damage != "replaced":
        assert "checkpoint_1_6.pt" in str(refusal.value)
    run_command(train.cli_main, *command, "--restore-file", tmp_path / "checkpoint_1_6.pt")
    assert_same_weights(last, run / "checkpoint_last.pt")


def assert_same_weights(one, other):
    expected = torch.load(other, weights_only=False)["model"]
    for name, weight in torch.load(one, weights_only=False)["model"].items():
        assert torch.equal(weight, expected[name]), name


def cut_short(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(("damaged", "newest"), [([], 6), (["checkpoint_1_6.pt"], 3)])
def test_the_same_command_goes_on_once_the_advice_is_followed(damaged, newest, data, run, tmp_path):
    """From the newest whole checkpoint, and to the same weights; a runner may not let its options be changed."""
    names = {"checkpoint_1_3.pt", "checkpoint_1_6.pt", "checkpoint_last.pt"}
    for name in names:
        shutil.copy2(run / name, tmp_path)
    shutil.copy(run / "checkpoint_last.pt", tmp_path / "crash.pt")  # fairseq's, between updates or inside one
    for name in ("checkpoint_last.pt", *damaged):
        cut_short(tmp_path / name)
    command = [data, *TRAIN, "--save-dir", tmp_path, "--max-update", 8, "--save-interval-updates", 1]
    with pytest.raises(DamagedCheckpointError) as refusal:
        run_command(train.cli_main, *command)
    source, target = re.search(r"copy (\S+) over (\S+)$", str(refusal.value)).groups()
    assert (source, target) == (f"checkpoint_1_{newest}.pt", "checkpoint_last.pt")
    for name in names - {source, target}:
        (tmp_path / name).unlink()
    shutil.copy(tmp_path / source, tmp_path / target)
    run_command(train.cli_main, *command)
    saved = {path.name for path in tmp_path.glob("checkpoint_1_*.pt")}
    assert saved == {f"checkpoint_1_{update}.pt" for update in range(newest, 9)}
    assert_same_weights(tmp_path / "checkpoint_last.pt", run / "checkpoint_last.pt")


def test_what_to_do_where_nothing_can_be_copied(run, tmp_path, monkeypatch):
    """Training begins at update 0 without a last checkpoint; another name is not read unless it is given."""
    last, best = tmp_path / "checkpoint_last.pt", tmp_path / "checkpoint_best.pt"
    for path in (last, best):
        shutil.copy(run / "checkpoint_last.pt", path)
        cut_short(path)
    for trains, path, advice in (
        (True, last, "move it away to train from the start"),
        (True, best, "name another"),
        (False, last, "name another"),
    ):
        monkeypatch.setattr(checkpoints, "restores", lambda trains=trains: trains)
        with pytest.raises(DamagedCheckpointError, match=rf"No other one beside it is whole: {advice}$"):
            verify(path)
    for damaged, whole in ((last, best), (best, last)):
        shutil.copy(run / "checkpoint_last.pt", whole)
        cut_short(damaged)
        with pytest.raises(
            DamagedCheckpointError, match=rf"The newest whole one .* is {whole.name}: name that instead$"
        ):
            verify(damaged)


def test_the_newest_checkpoint_is_that_of_the_latest_update(run, tmp_path):
    """Copies have the times of copying, and a name need not say the update."""
    for seconds, (name, source) in enumerate({"checkpoint7.pt": "1_6", "checkpoint_1_3.pt": "1_3"}.items()):
        shutil.copy(run / f"checkpoint_{source}.pt", tmp_path / name)
        os.utime(tmp_path / name, (seconds, seconds))
    (tmp_path / "checkpoint9.pt").write_bytes(b"no checkpoint")
    last = tmp_path / "checkpoint_last.pt"
    shutil.copy(run / "checkpoint_last.pt", last)
    cut_short(last)
    with pytest.raises(DamagedCheckpointError, match=r"is checkpoint7\.pt: name that instead$"):
        verify(last)


def test_a_cut_file_that_is_mapped_is_refused_in_one_line(run, tmp_path):
    path = tmp_path / "copy.pt"
    shutil.copy(run / "checkpoint_last.pt", path)
    cut_short(path)
    with pytest.raises(
        ValueError, match=r"copy\.pt is no checkpoint of fairseq, or a damaged one \(.*\): pass another"
    ) as refusal:
        read_ours(str(path))
    assert refusal.value.__suppress_context__


def test_an_empty_file_is_said_to_be_empty(tmp_path):
    (tmp_path / "empty.pt").touch()
    with pytest.raises(ValueError, match=r"empty\.pt is no checkpoint of .* \(it is empty\): pass another, or copy it"):
        read_ours(str(tmp_path / "empty.pt"))
    with pytest.raises(ValueError, match=r"nothing in it was run \(it is empty\)\. If it is cut short, fetch it again"):
        load_plain(str(tmp_path / "empty.pt"))


def test_documents_of_training_are_named_if_eval_lm_reads_one_text(data, run, tmp_path, caplog):
    """Those of any model, of several."""
    for documents in ("none", "recorded"):
        state = torch.load(run / "checkpoint_last.pt", weights_only=False)
        state["cfg"]["task"]["documents"] = documents
        torch.save(state, tmp_path / f"{documents}.pt")
    for names in (["none"], ["recorded"], ["recorded", "none"]):
        paths = ":".join(str(tmp_path / f"{name}.pt") for name in names)
        caplog.clear()
        run_command(eval_lm.cli_main, data, *TASK, "--path", paths, "--gen-subset", "valid", "--num-workers", 0)
        assert ("trained with --documents recorded, but without" in caplog.text) == ("recorded" in names)


def test_a_full_disk_leaves_the_former_checkpoint(data, run, tmp_path):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    save = torch.save

    def full(obj, path):
        save(obj, path)
        os.truncate(path, 1000)
        raise OSError(28, "No space left on device", str(path))

    with mock.patch.object(torch, "save", full), pytest.raises(OSError, match="No space left"):
        run_command(train.cli_main, data, *TRAIN, "--save-dir", tmp_path, "--max-update", 10)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_tools_read_a_sealed_checkpoint(run):
    """torch without this package, with its safe loading; fairseq; anything that reads zip files."""
    path = run / "checkpoint_last.pt"
    code = f"import torch; print(sorted(torch.load({str(path)!r}, weights_only=True, mmap=True)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert "'extra_state', 'last_optimizer_state', 'model'" in printed.stdout
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    assert sum(p.numel() for p in model.parameters()) > 0
    assert zipfile.ZipFile(path).testzip() is None


def test_a_file_of_something_else_is_named(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"weights.pt is no checkpoint of fairseq"):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))


@pytest.mark.parametrize("kept", ["cfg", "args"])
def test_the_checkpoint_of_another_model_has_a_remedy_that_works(kept, tmp_path):
    """convert_checkpoint imports it as little as this package reads it."""
    path = str(tmp_path / "other.pt")
    other = {"cfg": {"model": {"_name": "transformer_lm"}, "task": {"_name": "language_modeling"}}}
    other["args"] = None if kept == "cfg" else Namespace(arch="transformer_lm", task="language_modeling")
    torch.save({**other, "model": {}}, path)
    remedy = "train with this package; fairseq's own commands read this one with --task language_modeling$"
    with pytest.raises(ValueError, match=f"of the model 'transformer_lm' .* not one of this package: {remedy}"):
        read_ours(path)
    with pytest.raises(SystemExit, match=f"not one of this package, nor of the authors' code: {remedy}"):
        convert_checkpoint.main(["import", path, str(tmp_path / "imported")])
    assert not (tmp_path / "imported").exists()
