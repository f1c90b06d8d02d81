from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from golden import Golden

from b2batch.models.loading import LoadedModel


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def loaded(golden: Callable[[str], Golden]) -> Callable[[str], LoadedModel]:
    """A variant's checkpoint for engines, loaded once a session."""
    return cache(lambda variant: golden(variant).load())
