"""Models that the labelling tests share, each loaded once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from b2batch.models.loading import LoadedModel, load_model
from b2batch.spec import ModelSpec


@pytest.fixture(scope="package")
def tiny() -> LoadedModel:
    """The embedded model, which knows 正面 and 负面."""
    torch.set_num_threads(1)
    return load_model(ModelSpec(model="baichuan2-tiny"))


@pytest.fixture(scope="package")
def lm_eval_model(shared_dir: Path) -> LoadedModel:
    """The model that lm-evaluation-harness scored, in Baichuan's layout."""
    torch.set_num_threads(1)
    return load_model(ModelSpec(model=str(shared_dir / "golden" / "lm_eval" / "tiny_b2_equiv")))
