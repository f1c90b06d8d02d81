"""``_SUCCESS``: the account of a finished run, written last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from b2batch.errors import ErrorBudgetExceeded, IntegrityError
from b2batch.rows import UnitCounts

_MIN_ALLOWED_ERRORS = 10


def allowed_errors(num_rows: int, max_error_rate: float) -> int:
    """How many of ``num_rows`` may fail: the share, but at least 10; a rate of 0 allows none."""
    return max(_MIN_ALLOWED_ERRORS, int(num_rows * max_error_rate)) if max_error_rate else 0


def check_budget(counts: UnitCounts, max_error_rate: float) -> None:
    """Raise ErrorBudgetExceeded when more rows failed than ``max_error_rate`` allows."""
    allowed = allowed_errors(counts.num_rows, max_error_rate)
    if counts.num_error > allowed:
        raise ErrorBudgetExceeded(
            f"{counts.num_error} of {counts.num_rows} rows failed, {allowed} are allowed "
            f"(errors.max_error_rate {max_error_rate:g}); the output is complete, "
            "and the failed rows stand in it with status = error"
        )


@dataclass(frozen=True, slots=True)
class PartDigest:
    """A committed part as ``_SUCCESS`` lists it."""

    sha256: str
    num_rows: int


@dataclass(frozen=True, slots=True)
class Success:
    """What a finished run holds. ``partial`` says that more rows failed than were allowed.

    ``generation`` is the newest one of whose rows it gives account: a run that grows is finished when it
    is the newest of all. Until then it stands for the rows of all generations before.
    """

    run_id: str
    counts: UnitCounts
    num_skipped_blank: int
    partial: bool
    parts: Mapping[str, PartDigest]
    generation: int = 1

    def to_document(self) -> dict[str, Any]:
        """The content of ``_SUCCESS``."""
        counts = self.counts
        return {
            "run_id": self.run_id,
            "rows": {"ok": counts.num_ok, "error": counts.num_error, "length": counts.num_length},
            "tokens": {"input": counts.num_input_tokens, "generated": counts.num_generated_tokens},
            "skipped_blank": self.num_skipped_blank,
            "partial": self.partial,
            "generation": self.generation,
            "parts": {
                name: {"sha256": part.sha256, "rows": part.num_rows} for name, part in self.parts.items()
            },
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Read it back; IntegrityError when it is damaged."""
        try:
            rows, tokens = document["rows"], document["tokens"]
            return cls(
                run_id=document["run_id"],
                counts=UnitCounts(
                    rows["ok"], rows["error"], rows["length"], tokens["input"], tokens["generated"]
                ),
                num_skipped_blank=document["skipped_blank"],
                partial=document["partial"],
                generation=document.get("generation", 1),
                parts={
                    name: PartDigest(part["sha256"], part["rows"]) for name, part in document["parts"].items()
                },
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise IntegrityError(f"_SUCCESS is damaged: {error!r}") from error
