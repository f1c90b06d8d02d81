"""What a job other than plain generation asks of a row: a label, a score, a vector, a second look."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from b2batch.spec.section import Section


class Label(Section):
    """One answer of a classification. ``text`` is what the model would write for it."""

    name: str = Field(min_length=1)
    text: str = Field(min_length=1)
    description: str = ""


def as_labels(value: Any) -> Any:
    """Labels from a list of names, or from a mapping name → description or {text, description}."""
    if isinstance(value, Mapping):
        return [_as_label(name, meaning) for name, meaning in value.items()]
    if isinstance(value, list | tuple):
        return [item if isinstance(item, Mapping | Label) else _as_label(item, None) for item in value]
    return value


def _as_label(name: Any, meaning: Any) -> dict[str, Any]:
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise ValueError(f"a label is text, found {name!r}: put it in quotes")
    own = meaning if isinstance(meaning, Mapping) else {"description": "" if meaning is None else meaning}
    return {"name": str(name), "text": str(name), **own}


def check_labels(labels: tuple[Label, ...]) -> None:
    """Refuse with ValueError what is no choice: under two labels, or two with one name or text."""
    if len(labels) < 2:
        raise ValueError(f"labels: task: classify needs at least two, found {len(labels)}")
    for what in ("name", "text"):
        values = [getattr(label, what) for label in labels]
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise ValueError(f"labels: the {what} {twice!r} stands twice")


class ClassifySpec(Section):
    """How the likelihoods of the labels' texts become probabilities.

    ``calibrate_with`` are texts without content that stand in for the row's columns: the labels'
    mean probabilities under them are divided out (Zhao et al. 2021, "Calibrate before use").
    """

    normalize: Literal["none", "tokens"] = Field(
        default="none", description="tokens: the mean log-likelihood of a label's tokens, not the sum"
    )
    calibrate_with: tuple[str, ...] = ()
    threshold: float | None = Field(
        default=None, gt=0.0, le=1.0, description="several labels may hold: all with this probability"
    )


class ScoreSpec(Section):
    """Which text's log-likelihood after the prompt is wanted."""

    column: str | None = None


class EmbedSpec(Section):
    """How the hidden states of the last layer become one vector."""

    pooling: Literal["mean", "last"] = "mean"
    normalize: bool = Field(default=True, description="to length 1")


class ReviewSpec(Section):
    """Which rows people should look at."""

    below: float | None = Field(
        default=None, gt=0.0, le=1.0, description="rows whose label_score, or vote_share, is less"
    )
