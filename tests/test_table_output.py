"""The table runner: what --set changed is told wherever its figures are, and pages go to whoever reads them."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from examples.tables import folder, process, scale

from .tables import ROOT, fork, run


def test_a_shrunk_table_says_what_set_changed(tiny, monkeypatch, capsys):
    """Also the data. Its note said that sizes and data were those of the table."""
    monkeypatch.setattr(process, "run", fork)
    rates = {"lamemo": {"tokens_per_second": 640.0, "tokens_an_update": 64.0}}
    monkeypatch.setattr(scale, "measure", lambda *_: rates)
    data = next(line for line in tiny.read_text().splitlines() if line.startswith("data: ")).removeprefix("data: ")
    tiny.write_text(tiny.read_text().replace(f"data: {data}", "data: data-bin/absent"))
    changed = ["--set", "decoder-layers=1", f"data={data}"]
    for asked in (["--only", "lamemo", "--scale", 0.01, *changed], ["--render"], ["--render", *changed]):
        assert run(tiny, *asked) == 0
        text = capsys.readouterr().out
        assert "in lamemo/seed-1: --decoder-layers 1 (table: 2); data " in text
        assert "(table: data-bin/absent)." in text and "data are those" not in text
    assert "other options or data than the table's" in (tiny.parent / "out" / "curves.svg").read_text()

    (tiny.parent / "link").symlink_to(data)
    tiny.write_text(tiny.read_text().replace("data: data-bin/absent", f"data: {tiny.parent / 'link'}"))
    assert run(tiny, "--render") == 0
    assert "--decoder-layers 1 (table: 2)." in capsys.readouterr().out, "another path of the same data was told"


def test_reported_values_stand_in_no_recipe_of_other_options(tiny, capsys):
    for form in ("shell", "yaml"):
        for changed in ([], ["--set", "decoder-layers=1"]):
            assert run(tiny, "--print", "transformer_xl", "--as", form, *changed) == 0
            assert ("(reported " in capsys.readouterr().out) is (not changed)


def test_a_page_has_a_column_for_reported_values_if_there_are_some(tmp_path):
    shown = ROOT / "examples" / "novels" / "words-quarter"
    results, table = shutil.copytree(shown / "results", tmp_path / "results"), tmp_path / "table.yaml"
    for paper in ("", "\n    paper: {valid: 12.5, source: Somebody 2022}"):
        table.write_text(
            (shown / "table.yaml").read_text().replace("title: LaMemo, dropout .2", f"title: LaMemo{paper}")
        )
        assert run(table, "--render", "--results", results) == 0
        page = (results / "table.md").read_text()
        assert ("| reported valid / test |" in page) == ("12.5 / -" in page) == bool(paper)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_read_enough_is_no_error(unbuffered, tmp_path):
    """As by `| head`. What is rendered is written before."""
    results = shutil.copytree(ROOT / "examples" / "novels" / "words-quarter" / "results", tmp_path / "results")
    asked = (
        ["--render", "--results", str(results), "--out", str(tmp_path / "out")]
        if unbuffered
        else ["--print", "lamemo_dropout_2"]
    )
    reader, writer = os.pipe()
    os.close(reader)
    argv = [sys.executable, "-m", "examples.tables", "examples/novels/words-quarter/table.yaml", *asked]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    ended = subprocess.run(argv, cwd=ROOT, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert ended.returncode == 128 + signal.SIGPIPE and not ended.stderr
    assert not unbuffered or {"table.md", "summary.svg"} <= {path.name for path in results.iterdir()}


def test_new_files_of_the_package_are_changes(monkeypatch):
    """A commit does not hold an own memory that was never added to it."""
    memory = "?? lamemo_fairseq/core/memory/own/__init__.py"
    monkeypatch.setattr(folder, "_git", lambda *_: f"M README.md\n{memory}\n?? notes.txt")
    assert folder.environment(None)["changed_files"] == f"M README.md\n{memory}"
    monkeypatch.setattr(folder, "_git", lambda *_: None)  # an installed package
    assert folder.environment(None)["changed_files"] is None
