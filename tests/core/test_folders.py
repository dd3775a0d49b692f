"""A folder that cannot be made or written to is refused in one line, with the remedy."""

import errno
import os
import tempfile
from pathlib import Path

import pytest

from lamemo_fairseq.core import LanguageModel
from lamemo_fairseq.core.folder import make_folder


def refusal(folder, option="--out"):
    with pytest.raises(OSError) as refused:
        make_folder(folder, option)
    return str(refused.value)


def test_a_folder_that_cannot_be_made():
    why = "cannot be written to (No such file or directory), pass another folder"
    assert refusal(Path("/proc/x/y")) == f"--out /proc/x/y: /proc {why}"
    assert refusal(Path("/proc/x"), "") == f"/proc/x: /proc {why}"
    assert refusal(Path("/proc"), "") == f"/proc {why}"


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
def test_nothing_is_left_where_nothing_can_be_written(number, tmp_path, monkeypatch):
    """Also for root, to whom rights say nothing."""

    def refuses(**options):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "TemporaryFile", refuses)
        why = f"cannot be written to ({os.strerror(number)}), pass another folder"
        assert refusal(tmp_path) == f"--out {tmp_path} {why}"
        assert refusal(tmp_path / "new" / "folder") == f"--out {tmp_path}/new/folder: {tmp_path} {why}"
    assert list(tmp_path.iterdir()) == []
    make_folder(tmp_path / "new" / "folder", "--out")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_no_folder_is_left_above_one_that_cannot_be_made(tmp_path):
    message = refusal(tmp_path / "new" / ("long" * 100))
    assert message.endswith("long: no folder can be made (File name too long), pass another one")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    assert refusal(tmp_path / "file" / "x") == f"--out {tmp_path}/file/x: {tmp_path}/file is a file, pass a folder"
    assert refusal(tmp_path / "link") == f"--out {tmp_path}/link is a link to nothing, pass a folder"


def test_a_misspelt_folder(tmp_path):
    (tmp_path / "lamemo").mkdir()
    with pytest.raises(FileNotFoundError, match=f"^there is no folder {tmp_path}/lameno: did you mean .*/lamemo\\?$"):
        LanguageModel.load(tmp_path / "lameno")
