"""Run the core's tests as if no host were installed."""

import pytest

from . import hosts


def pytest_configure() -> None:
    try:
        hosts.block()
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from None
