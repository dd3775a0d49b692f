"""Preprocessing again, with other options, over other data, and killed at any moment."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from preprocess.__main__ import main
from preprocess.prepare import RECORD

from .preprocessing import SPLITS, TEXTS, contents, own, write


def test_a_second_time_nothing_is_done(texts, tmp_path, capsys):
    first = own(texts, tmp_path / "data")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir() if path.name != ".lock"}
    capsys.readouterr()
    assert own(texts, tmp_path / "data", workers=2) == first
    assert "complete already: nothing to do" in capsys.readouterr().err
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir() if path.name != ".lock"}
    assert after == before


def test_other_options_other_text_or_damage_make_it_anew(texts, tmp_path, capsys):
    first = own(texts, tmp_path / "data")
    told = f"{tmp_path / 'data' / 'dict.txt'} changes: models trained on the former data do not fit the new one"
    assert told not in capsys.readouterr().err
    other = own(texts, tmp_path / "data", "--threshold", "5")
    assert other["dict.txt"] != first["dict.txt"] and told in capsys.readouterr().err
    assert own(texts, tmp_path / "data") == first
    capsys.readouterr()
    write(tmp_path / "data" / "valid.bin", first["valid.bin"][:-2] + b"xx")
    assert own(texts, tmp_path / "data") == first
    (tmp_path / "data" / "dict.txt").unlink()
    assert own(texts, tmp_path / "data") == first
    write(texts / "test.txt", TEXTS["valid"])
    assert own(texts, tmp_path / "data")["test.bin"] == first["valid.bin"]
    assert told not in capsys.readouterr().err


def test_a_file_in_two_places_is_other_text_in_other_places(texts, tmp_path):
    train, valid = str(texts / "train.txt"), str(texts / "valid.txt")
    made = []
    for sources in (train, valid, valid), (train, train, valid):
        main(["own", "--destdir", str(tmp_path / "data"), "--source", *sources])
        made.append(contents(tmp_path / "data"))
    first, second = made
    assert first["valid.bin"] == first["test.bin"] == second["test.bin"]
    assert second["valid.bin"] == second["train.bin"] == first["train.bin"]


@pytest.mark.parametrize(
    "name, after_a_failure", [("dict.txt", False), ("dict.txt", True), ("train.bin", False), ("original.json", False)]
)
def test_data_of_another_origin_is_left_alone(texts, tmp_path, name, after_a_failure):
    folder = tmp_path / "data"
    folder.mkdir()
    if after_a_failure:
        bad = write(tmp_path / "bad.txt", b"fine\n\xff\n")
        with pytest.raises(SystemExit, match="not UTF-8"):
            own(bad, folder, "--shares", "1")
        assert (folder / "unfinished").exists()
    write(folder / name, b"word 1\n")
    with pytest.raises(SystemExit, match=f"data holds {name}, which this command did not make"):
        own(texts, folder)
    assert (folder / name).read_bytes() == b"word 1\n"


def test_other_files_in_the_folder_stay(texts, tmp_path):
    other = own(texts, texts)
    assert {split: other[f"{split}.txt"] for split in SPLITS} == TEXTS and "dict.txt" in other


def test_a_damaged_record_is_named(texts, tmp_path):
    made = own(texts, tmp_path / "data")
    record = write(tmp_path / "data" / RECORD, made[RECORD][:100])
    with pytest.raises(SystemExit, match=rf"{record} is damaged"):
        own(texts, tmp_path / "data")


def test_two_at_once_are_refused(texts, tmp_path):
    command = [sys.executable, "-c", "import sys, fcntl; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
               "print('locked', flush=True); sys.stdin.read()"]  # fmt: skip
    (tmp_path / "data").mkdir()
    with subprocess.Popen(
        [*command, str(tmp_path / "data" / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(SystemExit, match="another run is at work"):
            own(texts, tmp_path / "data")
        other.communicate()
    own(texts, tmp_path / "data")


STEPS = ("replace", "unlink", "rmdir", "mkdir")  # of os: what changes which files there are


def dies_at_step(step, run, before):
    """Run in a process that is killed right before or after its n-th step. Returns whether it came that far."""
    child = os.fork()
    if child == 0:
        taken = 0

        def counted(function):
            def call(*arguments, **options):
                nonlocal taken
                taken += 1
                mine = taken == step
                if mine and before:
                    os.kill(os.getpid(), signal.SIGKILL)
                try:
                    return function(*arguments, **options)
                finally:
                    if mine:
                        os.kill(os.getpid(), signal.SIGKILL)

            return call

        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 2)
        try:
            run()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_killed_at_every_step(texts, tmp_path, before):
    """Over data with other options and one more split, so that those have to go."""
    text, options = texts / "train.txt", ("--bpe", "bytes", "--shares", "1", "1")
    expected = own(text, tmp_path / "expected", *options)
    folder = tmp_path / "data"
    former = own(texts, folder, "--paragraphs")
    assert set(former) - set(expected) == {"test.bin", "test.idx"}
    step = 1
    while dies_at_step(step, lambda: own(text, folder, *options), before):
        found = contents(folder)
        if "dict.txt" in found:  # what fairseq could open
            assert found in (former, expected)
        if step % 5 == 0:  # otherwise the next one goes on from what this one left
            assert own(text, folder, *options) == expected
            assert own(texts, folder, "--paragraphs") == former
        step += 1
    assert step > 15
    assert contents(folder) == expected
    assert {path.name for path in folder.iterdir()} == {".lock", *expected}


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_other_splits_after_a_kill_at_any_step(texts, tmp_path, before):
    text, options = texts / "train.txt", ("--shares", "1", "1")
    expected = own(text, tmp_path / "expected", *options)
    folder, step = tmp_path / "data", 1
    while dies_at_step(step, lambda: own(texts, folder), before):
        assert own(text, folder, *options) == expected
        shutil.rmtree(folder)
        step += 1
    assert step > 15


def test_killed_with_its_workers_running(texts, tmp_path):
    write(texts / "train.txt", TEXTS["train"] * 20)
    options = ("--tokenizer", "moses")
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        own(texts, tmp_path / "data", *options, workers=2)
        os._exit(0)
    deadline = time.monotonic() + 60
    while len(encoded := list(tmp_path.glob("data/unfinished/*/chunks/*.npz"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    workers = Path(f"/proc/{child}/task/{child}/children").read_text().split()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while outliving := [worker for worker in workers if is_alive(worker)]:
        if time.monotonic() > deadline:
            for worker in outliving:
                os.kill(int(worker), signal.SIGKILL)
            pytest.fail("workers outlive their parent")
        time.sleep(0.005)
    assert {path.name for path in (tmp_path / "data").iterdir()} == {".lock", "unfinished"}
    before = {path: path.stat().st_mtime_ns for path in encoded}
    with pytest.MonkeyPatch.context() as patch:  # keep the chunks, to see that they were not made again
        patch.setattr("preprocess.prepare.shutil.rmtree", lambda folder, **options: None)
        resumed = own(texts, tmp_path / "data", *options, workers=2)
    assert before == {path: path.stat().st_mtime_ns for path in encoded}
    assert resumed == own(texts, tmp_path / "whole", *options)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_worker_that_dies_is_told_of(texts, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("preprocess.chunks._encode", lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(SystemExit, match=r"a worker died.*--workers"):
            own(texts, tmp_path / "data", workers=2)
    own(texts, tmp_path / "data", workers=2)
