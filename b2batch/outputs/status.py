"""``status.json``: how a run stands, for ``b2batch status``, cron, and schedulers that lose exit codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Self

from b2batch.errors import IntegrityError
from b2batch.outputs.document import encode_document, read_document
from b2batch.outputs.generation import latest_generation
from b2batch.outputs.layout import RunKeys
from b2batch.outputs.store import Store
from b2batch.rows import UnitCounts


class RunState(StrEnum):
    """Where a run is on its way."""

    RUNNING = "running"
    FINALISING = "finalising"
    SUCCEEDED = "succeeded"
    DRAINED = "drained"
    FENCED = "fenced"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Status:
    """A run at one moment. ``exit_code`` is None while it runs; times are UTC, ISO 8601.

    ``num_rows`` are the plan's, where ``counts`` are the committed ones'. ``rows_per_s`` and
    ``tokens_per_s`` (generated ones) are means over this start of the driver. ``num_rows_again`` are
    the rows of units that this start began more than once (a lost replica, a failed attempt, a copy at
    the end); ``num_out_of_memory`` the steps that were made again with half the batch;
    ``num_reused_rows`` the rows that got the answer to an identical request.
    """

    run_id: str
    state: RunState
    epoch: int
    num_units: int
    num_units_committed: int
    counts: UnitCounts
    num_replicas: int
    started: str
    updated: str
    exit_code: int | None = None
    reason: str = ""
    num_rows: int = 0
    rows_per_s: float = 0.0
    tokens_per_s: float = 0.0
    num_replicas_lost: int = 0
    num_rows_again: int = 0
    num_out_of_memory: int = 0
    num_reused_rows: int = 0

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Read it back; IntegrityError when it is damaged."""
        try:
            fields = dict(document)
            return cls(
                state=RunState(fields.pop("state")), counts=UnitCounts(**fields.pop("counts")), **fields
            )
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"status.json is damaged: {error}") from error


def write_status(store: Store, status: Status) -> None:
    """Replace the run's status in one step."""
    store.put(RunKeys(status.run_id[:8]).status, encode_document(asdict(status)))


def read_status(store: Store) -> Status | None:
    """The status of the run that the directory holds, or None when there is none yet."""
    generation = latest_generation(store)
    if generation is None:
        return None
    try:
        return Status.from_document(read_document(store, RunKeys(generation.run8).status))
    except FileNotFoundError:
        return None
