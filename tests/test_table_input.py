"""Table files from anyone: right, or refused in one line that says what to change."""

import csv
import io
import json
import re
import shlex
import string
from contextlib import nullcontext
from xml.etree import ElementTree

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from examples.tables import commands, execute, plots, process, render, table, units

from .tables import content, load, result, run

HOSTILE = [
    "../../x", "/etc/x", "a/b", "a\\b", "..", ".", "-x", "--out", "", " ", "a\nb", "a\rb", "a\tb", "a\u2028b", "\x00",
    "\x1b[31m", "\u202eabc", "\ud800", "a|b", "`a`", "<script>x</script>", "[x](javascript:y)", "# x", "- x", "1. x",
    "---", "*a*", "_a_", "_a", "a_b", "a\\|b", "&amp;", "$\\frac{", "$x", "a$b$c", "=1+1", "+1", "@x", "-1+1", "'x",
    '"x"', "a,b", "x" * 5000, "é", "語", "$(touch x)", "$((1)); touch x", "table", "speed", "jobs", "%s", "{x}",
]  # fmt: skip
texts = st.sampled_from(HOSTILE) | st.text(max_size=20)
lines_of_text = st.sampled_from(HOSTILE) | st.text("aB1 _|`*#<>[]()\\$=+-@.:~&'\"é", min_size=1, max_size=20)
slow = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@slow
@given(st.sampled_from(["row", "subset", "option", "data"]), texts)
def test_hostile_names(tmp_path, kind, name):
    """Each is refused in one line, or names files of one folder and options of one word."""
    changes = {
        "row": {"rows": {name: {"title": "A"}}},
        "subset": {"evaluation": {"subsets": [name]}},
        "option": {"options": {name: 1}},
        "data": {"data": name},
    }[kind]
    try:
        loaded = load(tmp_path / "t.yaml", **changes)
    except table.TableError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000
        return
    (one,) = table.runs(loaded)
    plan = execute.Plan(loaded, tmp_path / "out")
    held = plan.folder(one).path.resolve()
    assert held.parent.parent == (tmp_path / "out").resolve()
    for evaluation in plan.evaluations(one):
        file = plan.folder(one).evaluated(evaluation.name).resolve()
        assert file.parent == held / "evaluations" and file.name != "jobs.json"
    words = commands.train(loaded, one, "saved", {})
    assert not words[0].startswith("-") and all(word.split() == [word] for word in words if word[:2] == "--")
    assert shlex.split(commands.shell("fairseq-train", words).replace("\\\n", ""))[1:] == words


@slow
@given(lines_of_text, lines_of_text, lines_of_text)
def test_hostile_titles(tmp_path, title, row_title, source):
    """Each is refused in one line, or stays in its line and cell and means itself."""
    rows = {"a": {"title": row_title, "paper": {"test": 1.0, "source": source}}}
    try:
        loaded = load(tmp_path / "t.yaml", title=title, rows=rows)
    except table.TableError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000
        return
    (one,) = table.runs(loaded)
    text = render.write(execute.Plan(loaded, tmp_path, kept={one.name: result()}), [one])
    lines = text.splitlines()
    grid = [line for line in lines if line.startswith("|")][:3]
    cells = [[cell.strip() for cell in CELLS.findall(line)] for line in grid]
    assert len({len(line) for line in cells}) == 1 and len(cells[0]) == 9
    assert plain(cells[2][0]) == row_title.strip()
    assert lines[0].startswith("# ") and plain(lines[0][2:]) == title.strip()
    told = [f"Reported: {source.strip()}."] if source else []
    assert [plain(line) for line in lines if line.startswith("Reported: ")] == told
    assert len([line for line in lines if line.startswith("#")]) == 2
    assert not re.search(r"(?<!\\)[<`]", text)
    (line,) = csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text()))
    assert line["title"] in (row_title, f"'{row_title}") and line["title"].strip()[:1] not in "=+-@"


CELLS = re.compile(r"(?<=\|)((?:[^\\|]|\\.)*)(?=\|)")  # a pipe behind a backslash is no end


def plain(markdown):
    """What a reader of CommonMark sees."""
    return re.sub(rf"\\([{re.escape(string.punctuation)}])", r"\1", markdown)


def test_hostile_titles_in_plots(tmp_path):
    """They are drawn as they stand, one that begins with an underscore too, and one without finite values."""
    titles = ["_first", "$\\frac{$", "a$b$ & <c>", "=1|2"]
    rows = {f"row{i}": {"title": title} for i, title in enumerate(titles)}
    loaded = load(tmp_path / "t.yaml", title="a $x$ <b>", rows=rows)
    lines = [result(row) for row in rows]
    lines[0]["training"] = {
        "parameters": 1,
        "curve": [[1, float("inf")], [2, float("nan")]],
        "tokens_per_second": float("inf"),
    }
    plan = execute.Plan(loaded, tmp_path, kept={f"{line['run']['row']}/seed-1": line for line in lines})
    files = plots.write(plan, table.runs(loaded))
    assert [file.stem for file in files] == ["summary", "curves", "memory"]
    for file in files:
        ElementTree.parse(file)
        drawn = file.read_text()
        assert all(f"<!-- {text} -->" in drawn for text in ("$\\frac{$", "a$b$ &amp; &lt;c&gt;"))
        assert "_first -->" in drawn


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": {"../x": {"title": "A"}}}, "'../x' cannot be the name of a row"),
        ({"rows": {"table": {"title": "A"}}}, "'table' cannot be the name of a row: the runner has files"),
        ({"rows": {"a": {"title": "A\nB"}}}, "title of row 'a' 'A.nB' holds '.n': write one line"),
        ({"rows": {"a": {"title": ""}}}, "title of row 'a' has 0 characters"),
        ({"rows": {"a": {"title": "A", "paper": {"source": "x\x1b"}}}}, "the source of row 'a'"),
        ({"rows": {"a": {"title": "A", "options": {"max-sentences": 3}}}}, "row 'a': --max-sentences is set by"),
        ({"rows": {"a": {"title": "A", "options": {"save-dir=/x": 3}}}}, "row 'a' names 'save-dir=/x'"),
        ({"rows": {"a": {"title": "A", "options": {"data": "--user-dir"}}}}, "would be taken for an option"),
        ({"data": "-x"}, "data '-x' would be taken for an option"),
        ({"evaluation": {"subsets": ["../test"]}}, "'../test' cannot be the name of a split"),
        ({"evaluation": {"subsets": ["jobs"]}}, "'jobs' cannot be the name of a split"),
        ({"evaluation": {"subsets": ["test", "test"]}}, "'test' is asked for twice"),
        ({"evaluation": {"memory": {"lengths": [8, 8]}}}, "'test-memory-8' is asked for twice"),
        ({"evaluation": {"memory": {"lengths": [-8]}}}, "evaluation.memory has the length -8"),
        ({"evaluation": {"segments": {"lengths": [0]}}}, "evaluation.segments has the length 0"),
        ({"evaluation": {"options": {"path": "x"}}}, "--path is set by the runner, from the run"),
        ({"evaluation": {"options": {"model-overrides": "{}"}, "memory": {"lengths": [1]}}}, "--model-overrides is"),
        ({"measure": "bits-per-byte", "evaluation": {"options": {"remove-bpe": "@@ "}}}, "of words, not bits-per-byte"),
        ({"seeds": [-1]}, "there is no seed -1"),
    ],
)  # fmt: skip
def test_what_a_table_must_not_say(changes, message, tmp_path):
    with pytest.raises(table.TableError, match=message):
        load(tmp_path / "t.yaml", **changes)


WRITTEN = yaml.safe_dump(content(title="é, x"), allow_unicode=True)


def test_options_that_fairseq_train_does_not_know_are_refused_before_any_training(tiny, capsys, monkeypatch):
    monkeypatch.setattr(process, "run", lambda *_: pytest.fail("a command was run"))
    assert run(tiny, "--set", "mem-lenn=3") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --set: option --mem-lenn is not known: did you mean --mem-len or ")
    assert run(tiny, "--set", "use-old-adam=true", "optimizer=sgd") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: --set: --use-old-adam belongs to --optimizer adam, which is not given"
    tiny.write_text(tiny.read_text().replace("{arch: lamemo_lm}", "{arch: lamemo_lm, drop-out: 0.1}"))
    assert run(tiny) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: row 'lamemo': option --drop-out is not known: did you mean --dropout")
    tiny.write_text(tiny.read_text().replace("{arch: lamemo_lm, drop-out: 0.1}", "{arch: lamemo_ml}"))
    assert run(tiny) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: row 'lamemo': --arch lamemo_ml is not known: did you mean lamemo_lm")
    assert run(tiny, "--set", "optimizer=adan") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --set: --optimizer adan is not known: did you mean adam")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("softmax-batches", "option --softmax-batches is not known: did you mean --softmax-batch"),
        ("mem-len", "--mem-len belongs to training: change a trained model with --model-overrides"),
    ],
)
def test_options_that_fairseq_eval_lm_does_not_know_are_refused_before_any_training(
    option, message, tiny, capsys, monkeypatch
):
    monkeypatch.setattr(process, "run", lambda *_: pytest.fail("a command was run"))
    tiny.write_text(tiny.read_text().replace("{batch-size: 2}", f"{{batch-size: 2, {option}: 8}}"))
    assert run(tiny) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: evaluation.options: {message}")


def test_a_row_that_is_trained_on_documents_says_how_it_is_evaluated(tiny, capsys, monkeypatch):
    """fairseq-eval-lm would read one text, and only its log would tell."""
    monkeypatch.setattr(process, "run", lambda *_: pytest.fail("a command was run"))
    for arguments in ([], ["--print", "lamemo"]):
        assert run(tiny, *arguments, "--set", "documents=recorded") == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: row '") and line.endswith(
            "is trained with --documents 'recorded', and would be evaluated on one text: write `documents` into "
            "evaluation.options, the same or `none`"
        )
    tiny.write_text(tiny.read_text().replace("{batch-size: 2}", "{batch-size: 2, documents: none}"))
    assert run(tiny, "--print", "lamemo", "--set", "documents=recorded") == 0
    assert "--documents none" in capsys.readouterr().out.split("fairseq-eval-lm")[1]


@pytest.mark.parametrize(
    ("tokenizer", "measure", "remedy"),
    [
        ({"name": "bytes"}, "bits-per-byte", None),
        ({"name": "bytes"}, "bits-per-character", None),
        ({"name": "text8"}, "bits-per-byte", None),
        ({"name": "letters"}, "bits-per-byte", "are characters, of which losses are reported: write .* or bits-per-ch"),
        ({"bpe": "none"}, "bits-per-byte", "are words, of which losses are reported: write perplexity$"),
        ({"bpe": "sentencepiece"}, "bits-per-character", "are pieces of words, of which losses are reported: write p"),
        ({"bpe": "sentencepiece"}, "perplexity", None),
    ],
)
def test_a_measure_is_the_loss_of_a_token(tokenizer, measure, remedy, tmp_path, capsys):
    """Also where a table is only rendered: its measure may have been edited after the runs."""
    whole = {"name": "lines", "tokenizer": "words", "pattern": "", "source_lang": "", **tokenizer}
    record = {"made_from": {"settings": {"tokenizer": whole}}, "files": {"sentencepiece.bpe.model": {"sha256": ""}}}
    (tmp_path / "preprocess.json").write_text(json.dumps(record))
    loaded = load(tmp_path / "t.yaml", measure=measure, data=str(tmp_path))
    units.check(loaded, str(tmp_path / "absent"))
    with nullcontext() if remedy is None else pytest.raises(table.TableError, match=remedy):
        units.check(loaded, str(tmp_path))
    (tmp_path / "runs.jsonl").write_text(json.dumps(result()) + "\n")
    assert run(tmp_path / "t.yaml", "--render", "--results", tmp_path) == (remedy is not None)
    assert remedy is None or re.search(remedy, capsys.readouterr().err.rstrip())


WITHOUT_MEMORY = "without_memory: {memory: none, position_encoding: transformer-xl}"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            WITHOUT_MEMORY, "without_memory: {memory: none, position_encodin: alibi}",
            "row 'lamemo', without_memory: --model-overrides does not know 'position_encodin': did you mean ",
        ),
        (WITHOUT_MEMORY, "without_memory: {memory: nine}", "row 'lamemo', without_memory: --memory cannot be 'nine': "),
        (
            "lamemo_lm", "infini_attention_lm",
            "row 'lamemo', evaluation.memory (sweeps: false leaves it out): --model-overrides: mem_len belongs to --",
        ),
        (
            WITHOUT_MEMORY + "\n", "evaluation: {without_memory: {memry: none}, memory: {lengths: [0]}}\n",
            "row 'lamemo', evaluation.without_memory: --model-overrides does not know 'memry': did you mean 'memory'?",
        ),
        (
            WITHOUT_MEMORY + "\n", "evaluation: {options: {batch-size: 2, model-overrides: mem_len=3}}\n",
            "evaluation.options: --model-overrides 'mem_len=3' is no dictionary of options: ",
        ),
    ],
)  # fmt: skip
def test_overrides_that_a_model_does_not_know_are_refused_before_any_training(
    old, new, message, tiny, capsys, monkeypatch
):
    monkeypatch.setattr(process, "run", lambda *_: pytest.fail("a command was run"))
    text = tiny.read_text()
    if new.startswith("evaluation"):
        text, old = re.sub("evaluation:\n(  .*\n)*", new, text), f"    {old}"
        new = ""
    assert old in text
    tiny.write_text(text.replace(old, new))
    assert run(tiny, "--only", "lamemo") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


@pytest.mark.parametrize("data", [
    WRITTEN.encode(), b"\xef\xbb\xbf" + WRITTEN.encode(), WRITTEN.replace("\n", "\r\n").encode(),
    b"\xef\xbb\xbf" + WRITTEN.replace("\n", "\r\n").encode(),
])  # fmt: skip
def test_marks_and_line_ends(data, tmp_path):
    (tmp_path / "t.yaml").write_bytes(data)
    loaded = table.load(tmp_path / "t.yaml")
    assert loaded.title == "é, x" and loaded.rows["a"].title == "A"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (WRITTEN.encode("latin-1"), "is not UTF-8 in line .*: save it as UTF-8"),
        (WRITTEN.encode("utf-16"), "is not UTF-8 in line 1"),
        (f"{WRITTEN}title: other\n".encode(), "duplicate key title"),
        (WRITTEN.replace("  a:", "  a: {title: B}\n  a:").encode(), "duplicate key a"),
        (b"a: &a [*a]", "contains itself"),
        (b"3", "Invalid loaded object"),
        (b"", "missing mandatory value"),
        (WRITTEN.encode() + b"\x00", "is no YAML"),
    ],
)
def test_files_that_are_no_tables(data, message, tmp_path, capsys):
    path = tmp_path / "t.yaml"
    path.write_bytes(data)
    with pytest.raises(table.TableError, match=f"{path}.*{message}") as error:
        table.load(path)
    assert len(str(error.value).splitlines()) == 1
