from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from golden import Golden

from b2batch.models.loading import LoadedModel


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden(shared_dir: Path) -> Callable[[str], Golden]:
    """The reference data of a variant."""
    return cache(lambda variant: Golden.read(shared_dir, variant))


@pytest.fixture(scope="session")
def loaded(golden: Callable[[str], Golden]) -> Callable[[str], LoadedModel]:
    """A variant's checkpoint for engines, loaded once a session."""
    return cache(lambda variant: golden(variant).load())


@pytest.fixture(scope="session")
def plain(golden: Callable[[str], Golden]) -> Callable[[str], LoadedModel]:
    """The same for plain forward passes: an engine changes its model's attention."""
    return cache(lambda variant: golden(variant).load())
