from __future__ import annotations

import signal
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where workers of this run write their logs."""
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session", autouse=True)
def _sigint_interrupts() -> None:
    """Also where the run is a background job of a shell, which ignores Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
