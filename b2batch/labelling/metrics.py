"""How good labels are against gold, and their confidence against both. Numpy only.

Definitions as in scikit-learn: macro-F1 is the plain mean over all labels that occur, a ratio of
nothing is 0. The expected calibration error has 15 bins of equal width (Guo et al. 2017).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NUM_BINS = 15
_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


class Tally:
    """Rows as they are read; ``metrics`` at any time."""

    def __init__(self, labels: Sequence[str] = ()) -> None:
        self._labels = tuple(labels)
        self._pairs: Counter[tuple[str, str]] = Counter()  # (gold, predicted)
        self._confidences: list[NDArray[np.float64]] = []
        self._hits: list[NDArray[np.bool_]] = []
        self._num_unanswered = 0
        self._num_without_gold = 0

    def add(
        self,
        gold: Sequence[str | None],
        predicted: Sequence[str | None],
        confidence: Sequence[float | None] | None,
    ) -> None:
        """Take in rows. Those without gold are left out; those without an answer are counted apart."""
        kept = [i for i, (g, p) in enumerate(zip(gold, predicted, strict=True)) if None not in (g, p)]
        self._num_without_gold += sum(g is None for g in gold)
        self._num_unanswered += sum(g is not None and p is None for g, p in zip(gold, predicted, strict=True))
        pairs = [(str(gold[i]), str(predicted[i])) for i in kept]
        self._pairs.update(pairs)
        if confidence is not None:
            self._confidences.append(np.array([confidence[i] for i in kept], dtype=np.float64))
            self._hits.append(np.array([g == p for g, p in pairs], dtype=np.bool_))

    def metrics(self) -> dict[str, Any]:
        """Everything, as it stands in ``metrics.json``."""
        labels = self._all_labels()
        confusion = [[self._pairs[gold, predicted] for predicted in labels] for gold in labels]
        num_rows = self._pairs.total()
        per_label = {
            label: _of_label(i, np.array(confusion, dtype=np.int64)) for i, label in enumerate(labels)
        }
        f1 = [row["f1"] for row in per_label.values()]
        return {
            "num_rows": num_rows,
            "num_unanswered": self._num_unanswered,
            "num_without_gold": self._num_without_gold,
            "accuracy": _ratio(sum(self._pairs[label, label] for label in labels), num_rows),
            "macro_f1": _ratio(sum(f1), len(f1)),
            "labels": labels,
            "confusion": confusion,
            "per_label": per_label,
            **self._of_confidence(),
        }

    def _all_labels(self) -> list[str]:
        """The job's labels that occur, in its order, then all others."""
        found = {label for pair in self._pairs for label in pair}
        return [label for label in self._labels if label in found] + sorted(found - set(self._labels))

    def _of_confidence(self) -> dict[str, Any]:
        if not self._confidences:
            return {}
        confidence, hits = np.concatenate(self._confidences), np.concatenate(self._hits)
        return {
            "ece": expected_calibration_error(confidence, hits),
            "auroc": auroc(confidence, hits),
            "thresholds": [_at_threshold(value, confidence, hits) for value in _THRESHOLDS],
        }


def expected_calibration_error(confidence: NDArray[np.float64], hits: NDArray[np.bool_]) -> float:
    """The mean distance of confidence and accuracy over bins of equal width, weighted by rows."""
    if not len(hits):
        return 0.0
    bins = np.clip(np.ceil(confidence * _NUM_BINS).astype(int) - 1, 0, _NUM_BINS - 1)
    sums = np.bincount(bins, weights=confidence - hits, minlength=_NUM_BINS)
    return float(np.abs(sums).sum() / len(hits))


def auroc(confidence: NDArray[np.float64], hits: NDArray[np.bool_]) -> float | None:
    """The chance that a right label has more confidence than a wrong one; None without both kinds."""
    num_right, num_wrong = int(hits.sum()), int((~hits).sum())
    if not num_right or not num_wrong:
        return None
    _, group, size = np.unique(confidence, return_inverse=True, return_counts=True)
    mean_rank = (np.cumsum(size) - (size - 1) / 2)[group]
    above = mean_rank[hits].sum() - num_right * (num_right + 1) / 2
    return float(above / (num_right * num_wrong))


def _at_threshold(value: float, confidence: NDArray[np.float64], hits: NDArray[np.bool_]) -> dict[str, Any]:
    """What is kept, and how much of it is right, when rows below ``value`` go to people."""
    kept = confidence >= value
    return {
        "threshold": value,
        "num_kept": int(kept.sum()),
        "coverage": _ratio(int(kept.sum()), len(hits)),
        "accuracy": _ratio(int(hits[kept].sum()), int(kept.sum())),
    }


def _of_label(index: int, confusion: NDArray[np.int64]) -> dict[str, Any]:
    right, support = int(confusion[index, index]), int(confusion[index].sum())
    precision, recall = _ratio(right, int(confusion[:, index].sum())), _ratio(right, support)
    return {
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "support": support,
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
