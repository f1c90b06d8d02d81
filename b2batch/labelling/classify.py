"""Log-likelihoods of the labels' texts → one decision with its confidence. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from b2batch.engine.request import Score


@dataclass(frozen=True, slots=True)
class Decision:
    """The most likely label (the first of equals) and what the others have.

    ``margin`` is the distance to the second; ``entropy`` is in nats: 0 when one label has it all.
    """

    label: str
    score: float
    probabilities: dict[str, float]
    margin: float
    entropy: float

    def labels_from(self, threshold: float) -> list[str]:
        """All labels with at least this probability, in the job's order."""
        return [name for name, value in self.probabilities.items() if value >= threshold]

    def columns(self, threshold: float | None) -> dict[str, Any]:
        """What stands in the row's columns."""
        columns: dict[str, Any] = {
            "label": self.label,
            "label_score": self.score,
            "label_probs": list(self.probabilities.items()),
            "label_margin": self.margin,
            "label_entropy": self.entropy,
        }
        return columns if threshold is None else {**columns, "labels": self.labels_from(threshold)}


def label_probabilities(scores: Sequence[Score], normalize: Literal["none", "tokens"]) -> list[float]:
    """The labels' shares of the likelihood that falls on labels at all; they sum to 1.

    Raises:
        ValueError: no log-likelihood is a number, or one is not.
    """
    logits = [score.loglikelihood / (score.num_tokens if normalize == "tokens" else 1) for score in scores]
    return _softmax(logits)


def decide(
    names: Sequence[str], probabilities: Sequence[float], prior: Sequence[float] | None = None
) -> Decision:
    """The decision, with ``prior`` (the probabilities under texts without content) divided out."""
    if prior is not None:
        probabilities = _softmax(
            [_log(value) - _log(before) for value, before in zip(probabilities, prior, strict=True)]
        )
    best = max(range(len(names)), key=probabilities.__getitem__)
    second = max(value for i, value in enumerate(probabilities) if i != best)
    return Decision(
        label=names[best],
        score=probabilities[best],
        probabilities=dict(zip(names, probabilities, strict=True)),
        margin=probabilities[best] - second,
        entropy=sum(-value * math.log(value) for value in probabilities if value > 0),
    )


def mean_prior(probabilities: Sequence[Sequence[float]]) -> tuple[float, ...] | None:
    """The labels' mean probabilities over several texts without content; None when there is none."""
    if not probabilities:
        return None
    return tuple(sum(values) / len(values) for values in zip(*probabilities, strict=True))


def _log(value: float) -> float:
    return math.log(max(value, 5e-324))


def _softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    if any(map(math.isnan, logits)) or not math.isfinite(top):
        raise ValueError("the log-likelihoods of the labels are not finite")
    weights = [math.exp(value - top) for value in logits]
    total = sum(weights)
    return [weight / total for weight in weights]
