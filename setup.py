"""The rest is in pyproject.toml, which cannot add two packages to those that are found, nor a step of the build."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

BESIDE = ["lamemo_fairseq.preprocess", "lamemo_fairseq.tables"]


class FreshBuild(build_py):
    """Leave out what an earlier build has left in build/lib: a memory that was removed or renamed would live on."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "lamemo_fairseq"), ignore_errors=True)
        super().run()


packages = [*find_packages(include=["lamemo_fairseq", "lamemo_fairseq.*"]), *BESIDE]
setup(packages=packages, cmdclass={"build_py": FreshBuild})
