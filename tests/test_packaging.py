"""A wheel of the package, built from a copy of the sources and used where no checkout is."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lamemo_fairseq
from lamemo_fairseq import needs_fairseq

from .tables import TINY

ROOT = Path(__file__).parent.parent
SOURCES = {"lamemo_fairseq": "lamemo_fairseq", "preprocess": "lamemo_fairseq/preprocess"}
SOURCES["examples/tables"] = "lamemo_fairseq/tables"
INSTALLED = {target.replace("/", "."): source.replace("/", ".") for source, target in SOURCES.items()}


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
    removed = folder / "source" / "build" / "lib" / "lamemo_fairseq" / "core" / "memory" / "removed"
    removed.mkdir(parents=True)  # by an earlier build
    (removed / "__init__.py").touch()
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


def test_classifiers_the_extra_and_the_message_name_the_same_builds_of_fairseq(wheel):
    (installed,) = metadata.distributions(path=[str(wheel)])
    named = set(re.findall(r"Python :: (3\.\d+)", "\n".join(installed.metadata.get_all("Classifier"))))
    assert named == {f"{major}.{minor}" for major, minor in needs_fairseq.BUILDS}
    extra = [Requirement(text) for text in installed.requires if "fairseq" in text.split(";")[0]]
    for version in (*needs_fairseq.BUILDS, (3, 14)):
        environment = {"extra": "fairseq", "python_version": "{}.{}".format(*version)}
        (*builds,) = (requirement.name for requirement in extra if requirement.marker.evaluate(environment))
        told = re.findall(r"\S+-fairseq|fairseq-\S+", needs_fairseq.BUILDS.get(version, ""))
        assert builds == told, version


def test_preprocess_and_tables_work_away_from_a_checkout(wheel, tmp_path):
    """A table is run and printed: its ``--user-dir lamemo_fairseq`` is the installed package there."""
    (tmp_path / "text.txt").write_text("the old house stood\n" * 50)
    (tmp_path / "tiny.yaml").write_text(TINY.format(data="data"))
    code = (
        "import runpy, sys\n"
        "for line in sys.stdin:\n"
        "    sys.argv = line.split()\n"
        "    try: runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
        "    except SystemExit as stop: assert not stop.code, stop.code\n"
        "from lamemo_fairseq.data.folders import data_folders\n"
        "try: data_folders('absent')\n"
        "except FileNotFoundError as error: print(error)\n"
    )
    table = "lamemo_fairseq.tables tiny.yaml"
    lines = ["lamemo_fairseq.preprocess own --destdir data --source text.txt --bpe bytes"]
    lines += [
        f"{table} --print lamemo",
        f"{table} --print lamemo --as yaml",
        f"{table} --print-slurm",
        f"{table} --only lamemo --out out",
    ]
    environment = {**os.environ, "PYTHONPATH": str(wheel), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="\n".join(lines),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "data" / "dict.txt").exists()
    assert done.stdout.count(f"--user-dir {wheel / 'lamemo_fairseq'}") == 2  # to train, and to test
    assert f"user_dir: {wheel / 'lamemo_fairseq'}\n" in done.stdout
    assert "python -m lamemo_fairseq.tables" in done.stdout
    results = json.loads((tmp_path / "out" / "lamemo" / "seed-1" / "results.json").read_text())
    assert results["run"]["options"]["--user-dir"] == "lamemo_fairseq" and "test" in results["evaluations"]
    assert "python -m lamemo_fairseq.preprocess wrote" in done.stdout


def test_every_module_that_a_text_tells_to_run_can_be_run():
    files = [*(path for source in SOURCES for path in (ROOT / source).rglob("*.py"))]
    files += [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    told = {name for path in files for name in re.findall(r"python -m ([a-z]\w*(?:\.\w+)*)", path.read_text())}
    for name in (name for name in told if name.split(".")[0] in ("lamemo_fairseq", "preprocess", "examples")):
        path = ROOT.joinpath(*INSTALLED.get(name, name).split("."))
        main = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        assert main.exists() and 'if __name__ == "__main__":' in main.read_text(), name
    assert {"lamemo_fairseq.convert_checkpoint", "preprocess", "examples.tables"} <= told
