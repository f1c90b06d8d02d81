"""The ``output`` and ``errors`` sections of a job file: where rows go, and how many may have failed."""

from __future__ import annotations

from pydantic import Field

from b2batch.spec.section import Location, Section


class OutputSpec(Section):
    """Where the Parquet dataset goes and which input columns stand in it."""

    path: Location = Field(description="a directory; {run8} becomes the run's short id")
    columns: tuple[str, ...] | None = Field(default=None, description="input columns to carry; null: all")
    prefix: str | None = Field(default=None, description="put before b2batch's own column names")


class ErrorsSpec(Section):
    """How many failed rows are still a success: at least 10, or this share of all rows."""

    max_error_rate: float = Field(default=0.01, ge=0.0, le=1.0)
