"""A wheel of the package, built from a copy of the sources and used where no checkout is."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import lamemo_fairseq

ROOT = Path(__file__).parent.parent
SOURCES = {"lamemo_fairseq": "lamemo_fairseq", "preprocess": "lamemo_fairseq/preprocess"}
SOURCES["examples/tables"] = "lamemo_fairseq/tables"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    try:
        if int(metadata.version("setuptools").split(".")[0]) < 77:
            pytest.skip("building needs setuptools 77")
    except metadata.PackageNotFoundError:
        pytest.skip("building needs setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    for source in SOURCES:
        shutil.copytree(ROOT / source, folder / "source" / source, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, folder / "source")
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=folder / "source", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_every_module_is_in_it_and_no_other_name(wheel):
    top = {path.name for path in wheel.iterdir()}
    assert top == {"lamemo_fairseq", f"lamemo_fairseq-{lamemo_fairseq.__version__}.dist-info"}
    wanted = {
        Path(target, path.relative_to(ROOT / source))
        for source, target in SOURCES.items()
        for path in (ROOT / source).rglob("*.py")
    }
    assert {path.relative_to(wheel) for path in wheel.rglob("*.py")} == wanted
    assert (wheel / "lamemo_fairseq" / "py.typed").exists()
    assert (wheel / "lamemo_fairseq" / "preprocess" / "README.md").exists()


def test_its_dependencies_replace_neither_torch_nor_fairseq(wheel):
    (installed,) = metadata.distributions(path=[str(wheel)])
    assert installed.version == lamemo_fairseq.__version__
    always = [requirement for requirement in installed.requires or [] if "extra ==" not in requirement]
    assert "safetensors" in always and not [name for name in always if "torch" in name or "fairseq" in name]


def test_preprocess_and_tables_work_away_from_a_checkout(wheel, tmp_path):
    (tmp_path / "text.txt").write_text("the old house stood\n" * 50)
    (tmp_path / "table.yaml").write_text(
        "title: own\ndata: data\nmeasure: perplexity\nstreams: 2\nseeds: [1]\n"
        "options: {user-dir: lamemo_fairseq, task: segment_language_modeling, max-update: 1, cpu: true}\n"
        "evaluation: {options: {batch-size: 1}, subsets: [test]}\n"
        "rows: {lamemo: {title: LaMemo, options: {arch: lamemo_lm}}}\n"
    )
    code = (
        "import runpy, sys\n"
        "for line in (PREPROCESS, TABLES):\n"
        "    sys.argv = line.split()\n"
        "    try: runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
        "    except SystemExit as stop: assert not stop.code, stop.code\n"
    )
    given = "PREPROCESS = 'lamemo_fairseq.preprocess own --destdir data --source text.txt --bpe bytes'\n"
    given += "TABLES = 'lamemo_fairseq.tables table.yaml --print-slurm'\n"
    environment = {**os.environ, "PYTHONPATH": str(wheel), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", given + code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "data" / "dict.txt").exists()
    assert "python -m lamemo_fairseq.tables" in done.stdout
