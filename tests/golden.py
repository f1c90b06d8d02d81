"""What upstream's own code computed on tiny checkpoints of each variant, and our loading of the same."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from b2batch.models.loading import LoadedModel, load_model
from b2batch.spec import ModelSpec

VARIANTS = ("b2_7b", "b2_13b", "b1_7b", "b1_13b", "b2_13b-sharded")
LOGIT_TOLERANCE = 3e-4


@dataclass(frozen=True)
class Golden:
    """One variant: its checkpoint's directory and the expected values of golden/FORMAT.md."""

    variant: str
    directory: Path
    expected: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @classmethod
    def read(cls, shared_dir: Path, variant: str) -> Golden:
        base, _, layout = variant.partition("-")
        root = shared_dir / "golden"
        expected = json.loads((root / "expected" / f"{base}.json").read_text())
        arrays = dict(np.load(root / "expected" / f"{base}.npz"))
        return cls(variant, root / "ckpt" / "-".join(filter(None, (base, "tiny", layout))), expected, arrays)

    @property
    def prompts(self) -> list[list[int]]:
        return self.expected["meta"]["prompts"]

    @property
    def greedy(self) -> list[tuple[float, list[int], list[int]]]:
        """(repetition penalty, prompt, greedy tokens) of every case."""
        return [
            (float(penalty), self.prompts[case["prompt"]], case["tokens"])
            for penalty, cases in self.expected["greedy"].items()
            for case in cases
        ]

    def spec(self) -> ModelSpec:
        """The model section that loads it; the tiny vocabulary hides which head it has."""
        norm_head = self.expected["meta"]["norm_head"]
        return ModelSpec(model=str(self.directory), dtype="float32", device="cpu", norm_head=norm_head)

    def load(self) -> LoadedModel:
        return load_model(self.spec())


@torch.inference_mode()
def forward(model: Any, prompt: list[int]) -> Tensor:
    """Logits (T, V) of a plain forward pass."""
    return model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
