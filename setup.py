"""The rest is in pyproject.toml, which cannot add two packages to those that are found."""

from setuptools import find_packages, setup

BESIDE = ["lamemo_fairseq.preprocess", "lamemo_fairseq.tables"]
setup(packages=[*find_packages(include=["lamemo_fairseq", "lamemo_fairseq.*"]), *BESIDE])
