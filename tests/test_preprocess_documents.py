"""A source that was meant otherwise is told what counts as a document; a missing one makes no folder."""

import pytest

from preprocess.__main__ import main

from .preprocessing import SPLITS, own, write


@pytest.fixture
def source(tmp_path):
    """A folder for each split, with a file for each document."""
    for number, split in enumerate(SPLITS):
        folder = tmp_path / "source" / split
        folder.mkdir(parents=True)
        for name in ("a.txt", "b.txt"):
            write(folder / name, f"the {name} of {number}\n".encode())
    return tmp_path / "source"


def refused(*arguments):
    with pytest.raises(SystemExit) as end:
        main(["own", "--workers", "1", *map(str, arguments)])
    message = str(end.value)
    assert "\n" not in message
    return message


def test_folders_of_documents_without_the_option(source, tmp_path):
    remedy = "If every file in train, valid and test is a document, pass --documents"
    assert refused("--source", source, "--destdir", tmp_path / "data").endswith(f"train, valid. {remedy}")
    (source / "valid" / "a.txt").unlink()
    assert remedy in refused("--source", source, "--destdir", tmp_path / "data")
    (source / "valid").rename(source / "dev")
    assert "--documents" not in refused("--source", source, "--destdir", tmp_path / "data")


@pytest.mark.parametrize("option", [[], ["--documents"]])
def test_a_folder_for_each_split(source, tmp_path, option):
    folders = [source / split for split in SPLITS]
    message = refused("--source", *folders, "--destdir", tmp_path / "data", *option)
    assert message.startswith("preprocess: --source names 3 folders: name a file for each of train.txt, valid.txt, ")
    assert message.endswith("pass --documents and one folder that holds train, valid and test")


def test_a_single_document_is_told(source, tmp_path, capsys):
    own(source, tmp_path / "several", "--documents")
    assert "single document" not in capsys.readouterr().err
    (source / "test" / "b.txt").unlink()
    own(source, tmp_path / "single", "--documents")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "single document" in line]
    assert line.startswith("hint: test has a single document, as --documents takes every file as one: ")
    assert line.endswith("train with --documents separator")


def test_a_missing_source_leaves_no_folder_behind(tmp_path):
    data = tmp_path / "data"
    assert "there is no such file or folder" in refused("--source", tmp_path / "nowhere", "--destdir", data)
    assert not data.exists()
    message = refused("--source", __file__, "--destdir", "/proc/x", "--shares", "1")
    assert message == (
        "preprocess: --destdir /proc/x: /proc cannot be written to (No such file or directory), pass another folder"
    )
