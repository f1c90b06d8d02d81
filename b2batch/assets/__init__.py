"""What ships inside the package: a tiny chat model and a sample of reviews for it to label.

EMBEDDED_MODELS   name in a job file -> model directory, laid out as on the hub
REVIEWS_SAMPLE    200 labelled Chinese reviews (JSONL: id, text, label), unseen in training
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

_ASSETS = Path(__file__).resolve().parent

EMBEDDED_MODELS: Final[dict[str, Path]] = {"baichuan2-tiny": _ASSETS / "baichuan2-tiny"}
REVIEWS_SAMPLE: Final[Path] = _ASSETS / "reviews-sample.jsonl"
