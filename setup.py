"""Package of the fairseq plugin; see README.md for the two commands that matter."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="lamemo-fairseq",
    version="0.1.0",
    description="LaMemo, the language model with look-ahead memory, as a fairseq plugin",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["lamemo_fairseq", "lamemo_fairseq.*"]),
    # fairseq and torch are left out on purpose: any of several fairseq packages will do, and installing
    # this one must not replace what is there. `constraints.txt` names tested versions.
    install_requires=["numpy", "sentencepiece", "sacremoses"],
    extras_require={
        "fairseq": [
            "torch>=2.6",
            "ve-fairseq>=0.12.3; python_version >= '3.11'",
            "fairseq-fixed; python_version < '3.11'",
        ],
        # torch's GPU builds bring it; the fused attention needs nothing else.
        "fused": ["triton; platform_system == 'Linux'"],
        # Pictures of the tables and of the analysis.
        "plots": ["matplotlib>=3.7"],
        "dev": ["pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "matplotlib>=3.7"],
    },
)
