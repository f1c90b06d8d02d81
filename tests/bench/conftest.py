from __future__ import annotations

from pathlib import Path

import pytest

from b2batch.bench.random_model import build


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("random-tiny")
    build("random-tiny", "cpu", "float32", directory)
    return directory
