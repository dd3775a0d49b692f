"""A folder that cannot be made or written to is refused in one line, with the remedy."""

import errno
import os
from pathlib import Path

import pytest

from lamemo_fairseq.core import LanguageModel
from lamemo_fairseq.core.folder import make_folder


def refusal(folder, option="--out"):
    with pytest.raises(OSError) as refused:
        make_folder(folder, option)
    return str(refused.value)


def test_a_folder_that_cannot_be_made():
    assert refusal(Path("/proc/x/y")) == "--out /proc/x/y: no folder can be made in /proc, pass another folder"
    assert refusal(Path("/proc/x"), "") == "/proc/x: no folder can be made in /proc, pass another folder"


def test_a_folder_that_is_read_only(tmp_path, monkeypatch):
    """As on a file system that is mounted so, also for root."""
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == tmp_path and mode & os.W_OK))
    assert refusal(tmp_path) == f"--out {tmp_path}: nothing can be written to it, pass another folder"
    make_folder(tmp_path / "other", "--out")


def test_what_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    assert refusal(tmp_path / "file" / "x") == f"--out {tmp_path}/file/x: {tmp_path}/file is a file, pass a folder"
    assert refusal(tmp_path / "link") == f"--out {tmp_path}/link is a link to nothing, pass a folder"


def test_a_full_disk_is_told_as_such(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "mkdir", full)
    assert "No space left" in refusal(tmp_path / "new")


def test_a_misspelt_folder(tmp_path):
    (tmp_path / "lamemo").mkdir()
    with pytest.raises(FileNotFoundError, match=f"^there is no folder {tmp_path}/lameno: did you mean .*/lamemo\\?$"):
        LanguageModel.load(tmp_path / "lameno")
