from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where workers of this run write their logs."""
    return tmp_path_factory.mktemp("logs")
