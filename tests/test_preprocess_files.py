"""Files that are there whole or not at all."""

import builtins
import errno
import os
import signal

import pytest

from preprocess.__main__ import main
from preprocess.files import Identity, Span, replacing

from .preprocessing import write


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"ne")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    child = os.fork()
    if child == 0:
        with replacing(path) as file:
            file.write(b"ne")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert path.read_bytes() == b"old"


def test_what_tells_files_apart(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"hello\n")
    # From coreutils' sha256sum.
    identity = Identity("file", 6, "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03")
    assert Identity.of(path) == identity
    assert identity.is_at(path)
    path.write_bytes(b"Hello\n")
    assert not identity.is_at(path)
    assert not identity.is_at(tmp_path / "none")
    assert Span(path, 1, 3).read() == b"el"


def test_a_text_that_may_not_be_read_is_told_with_the_remedy(tmp_path, monkeypatch):
    """The system's message has none."""
    text = write(tmp_path / "text.txt", b"a\n" * 20)
    able = builtins.open

    def refuse(path, *args, **kwargs):
        if str(path) == str(text):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return able(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(SystemExit, match=f"^preprocess: {text}: you have no permission to read or write it: change"):
        main(["own", "--source", str(text), "--destdir", str(tmp_path / "data")])
