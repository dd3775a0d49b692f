"""Commands other than fairseq's propose the nearest known name for a misspelt one, of an option or a file."""

from pathlib import Path

import pytest

from examples.tables import table
from examples.tables.__main__ import parser as tables
from examples.tables.folder import data_identity
from lamemo_fairseq import convert_checkpoint
from lamemo_fairseq.analysis.__main__ import parser as analysis
from lamemo_fairseq.convert_checkpoint import _parser as convert
from lamemo_fairseq.core.names import nearest_path
from lamemo_fairseq.data.folders import data_folders
from lamemo_fairseq.data.text import check_input
from lamemo_fairseq.host.named_checkpoints import check_files
from lamemo_fairseq.score import parser as score
from lamemo_fairseq.tasks.config import SegmentLanguageModelingConfig
from preprocess.__main__ import main as prepare
from preprocess.__main__ import parser as preprocess


@pytest.mark.parametrize(
    ("parser", "command", "message"),
    [
        (
            preprocess,
            "own --destdir d --tokeniser words",
            "unrecognized arguments: --tokeniser words: did you mean --to",
        ),
        (preprocess, "own --destdir d --tokenizer wrods", "did you mean words?"),
        (preprocess, "wikitext-13 --destdir d", "did you mean wikitext-103 or wikitext-2?"),
        (preprocess, "enwik8 --destdir d --tokenizer words", "unrecognized arguments: --tokenizer words\n"),
        (score, "data x.pt --mem_len=3", "unrecognized arguments: --mem_len=3: did you mean --mem-len?"),
        (score, "data x.pt --documents seperator", "did you mean separator?"),
        (analysis, "data x.pt --out o --subst valid", "did you mean --subset?"),
        (convert, "core x.pt o --dictionary d --tokeniser moses", "did you mean --tokenizer?"),
        (convert, "exprot x.pt o", "did you mean export"),
        (tables, "table.yaml --pritn row", "did you mean --print"),
        (preprocess, "", "the following arguments are required: DATASET: --help describes them\n"),
        (preprocess, "own --destdir d --workers many", "argument --workers: invalid int value: 'many'\n"),
        (tables, "--render", "the following arguments are required: table: --help describes them\n"),
    ],
)
def test_the_nearest_name_is_proposed_in_one_line(parser, command, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(command.split())
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and message in told and told.count("\n") == 1, "the usage hides the message"


@pytest.mark.parametrize(
    ("read", "wrong", "meant"),
    [
        (lambda path: prepare(["own", "--destdir", "d", "--source", path]), "tain.txt", "train.txt"),
        (lambda path: prepare(["own", "--destdir", "d", "--srcdict", path]), "data-bin/dct.txt", "data-bin/dict.txt"),
        (lambda path: prepare(["count", "data-bin", f"train={path}"]), "tain.txt", "train.txt"),
        (data_folders, "databin", "data-bin"),
        (data_folders, "databin/own", "data-bin/own"),
        (lambda path: check_input(SegmentLanguageModelingConfig(input=path)), "tain.txt", "train.txt"),
        (lambda path: check_files(".", "x.pt", path, {}), "databin", "data-bin"),
        (lambda path: convert_checkpoint.main(["core", "x.pt", "o", "--dictionary", path]), "tain.txt", "train.txt"),
        (lambda path: table.load(Path(path)), "tabel.yaml", "table.yaml"),
        (data_identity, "databin", "data-bin"),
    ],
)
def test_the_nearest_path_is_proposed(read, wrong, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data-bin" / "own").mkdir(parents=True)
    for name in ("train.txt", "table.yaml", "data-bin/dict.txt", "x.pt"):
        (tmp_path / name).touch()
    with pytest.raises((SystemExit, OSError, table.TableError), match=rf"{wrong}\b.*: did you mean {meant}\?$"):
        read(wrong)


def test_no_path_is_proposed_where_none_is_near(tmp_path):
    (tmp_path / "text").touch()
    for path in (tmp_path / "other", tmp_path / "text" / "text", tmp_path / "texts" / "inside", tmp_path / "text", ""):
        assert nearest_path(path) == ""
