"""Pages: links lead somewhere, what they name is there, and they say what the code says."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from lamemo_fairseq.core import MEMORIES, POSITIONS
from lamemo_fairseq.host import stand_in

ROOT = Path(__file__).parent.parent
FOLDERS = ("docs", "examples", "lamemo_fairseq", "preprocess")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def name_of(page):
    return str(page.relative_to(ROOT))


@cache
def prose(page):
    return CODE.sub("", page.read_text(encoding="utf-8"))


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists() and linked.is_relative_to(ROOT), target
            assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_are_there(page):
    folders = (page.parent, ROOT, ROOT / "lamemo_fairseq", ROOT / "lamemo_fairseq" / "core")
    for name in re.findall(r"`((?:[\w-]+/)+[\w-]+\.(?:py|md|sh|yaml|svg|json|jsonl))\b", prose(page)):
        if name.split("/")[0] in (*FOLDERS, "tests", "core", "host"):
            assert any((folder / name).exists() for folder in folders), name


def test_the_front_page_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120 and len(text.split()) <= 1200
    assert re.search(r"^bash examples/quickstart\.sh\b", text, re.MULTILINE)
    assert re.search(r"^bash tests/run\.sh\b", text, re.MULTILINE)


def test_the_table_of_contents_has_every_page():
    contents = prose(ROOT / "docs" / "README.md")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages == set(re.findall(r"\]\((\w+\.md)\)", contents))


def test_the_tables_of_memories_and_positions_are_whole():
    rows = re.findall(
        r"^\| `(\w[\w-]*)` \| (?:`(\w[\w-]*)` \| )?", prose(ROOT / "docs" / "architecture.md"), re.MULTILINE
    )
    memories = {(MEMORIES[name].architecture.name, name) for name in MEMORIES.names()}
    assert {row for row in rows if row[1]} == memories, "docs/architecture.md needs a row for each memory"
    encodings = {row[0] for row in rows if not row[1]}
    assert set(POSITIONS.names()) <= encodings, "docs/architecture.md needs a row for each position encoding"


def test_replaced_functions_are_those_of_the_table():
    def rows(text):
        return re.findall(r"^\| `([\w.]+)` \| ([\w ]+) \| ", text, re.MULTILINE)

    assert rows(prose(ROOT / "docs" / "fairseq.md")) == rows(stand_in.__doc__)


def messages():
    page = prose(ROOT / "docs" / "troubleshooting.md").split("## Messages of fairseq")[0]
    return re.findall(r"^\| `(.*?)` \| ", page.replace('`--model-overrides "', ""), re.MULTILINE)


def strings():
    """Every text in the code; a value in it is three points."""
    for folder in ("lamemo_fairseq", "preprocess"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield re.sub(r"%[sd]", "...", node.value)


def test_messages_are_those_of_the_code():
    known = "\n".join(strings())
    wanted = messages()
    assert len(wanted) > 40
    for message in wanted:
        pieces = [piece.strip(" '") for piece in message.split("...")]
        pattern = r"[^\n]*?".join(re.escape(piece) for piece in pieces if piece)
        assert re.search(pattern, known), message
