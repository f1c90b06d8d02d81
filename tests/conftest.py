from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The reference data that stands beside the checkout; without it the test is skipped."""
    path = Path(__file__).parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("the reference data is not there")
    return path
