"""How a run stands, told from its output directory alone: for ``b2batch status`` and the end of ``run``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from b2batch.errors import OutputError
from b2batch.outputs.document import read_document
from b2batch.outputs.generation import Generation, GenerationKind, latest_generation
from b2batch.outputs.layout import SUCCESS, RunKeys
from b2batch.outputs.lease import LEASE_TTL_S, newest_owner
from b2batch.outputs.run import read_success
from b2batch.outputs.status import RunState, Status, read_status
from b2batch.outputs.store import Store
from b2batch.rows import UnitCounts
from b2batch.telemetry import eta_s


@dataclass(frozen=True, slots=True)
class FailureKind:
    """Failed rows of one kind, and the first of them as the example."""

    type: str
    num_rows: int
    row_id: str
    file: str
    message: str


@dataclass(frozen=True, slots=True)
class Overview:
    """A run at one moment; of an incremental one its newest ``generation``, made for ``tick``.

    ``state`` is None when a driver began and was not heard of since; ``is_silent``: it should be
    running, but its driver is gone or has not been heard of for longer than the lease lasts.
    ``num_rows_planned`` is 0 where it is not known, ``eta_s`` None where nothing moves.
    ``failures`` are known once the run is finished, from the first 10,000 failed rows; so are the
    ``metrics`` of a job with gold labels.
    """

    output: str
    run_id: str
    state: RunState | None
    counts: UnitCounts = field(default_factory=UnitCounts)
    num_units: int = 0
    num_units_committed: int = 0
    num_rows_planned: int = 0
    num_replicas: int = 0
    rows_per_s: float = 0.0
    tokens_per_s: float = 0.0
    eta_s: float | None = None
    num_replicas_lost: int = 0
    num_rows_again: int = 0
    num_out_of_memory: int = 0
    num_reused_rows: int = 0
    started: str = ""
    updated: str = ""
    silent_s: float = 0.0
    is_silent: bool = False
    exit_code: int | None = None
    reason: str = ""
    num_skipped_blank: int | None = None
    generation: int = 1
    tick: str = ""
    failures: tuple[FailureKind, ...] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)


def overview(store: Store, now: datetime) -> Overview:
    """The run that the directory holds; ``now`` is timezone-aware.

    Raises:
        OutputError: it holds none.
        IntegrityError: one of its documents is damaged.
    """
    generation = latest_generation(store)
    if generation is None:
        raise OutputError(f"{store.uri} holds no b2batch run")
    status = read_status(store)
    view = Overview(store.uri, generation.run_id, None) if status is None else _of_status(store, status, now)
    view = replace(view, generation=generation.num_plans, tick=generation.tick)
    success = read_success(store, generation)
    if success is None:
        return view if view.state is not RunState.SUCCEEDED else replace(view, reason=_unsigned(generation))
    return replace(
        view,
        state=RunState.SUCCEEDED,
        is_silent=False,
        counts=success.counts,
        num_units_committed=view.num_units,
        exit_code=3 if success.partial else 0,
        num_skipped_blank=success.num_skipped_blank,
        failures=_failures(store, RunKeys(generation.run8)),
        metrics=_metrics(store, RunKeys(generation.run8)),
    )


def _unsigned(generation: Generation) -> str:
    """Why a run that had succeeded is not signed any more."""
    if generation.num_plans > 1 and generation.kind is GenerationKind.EXTEND:
        return f"generation {generation.num_plans} was begun: the same run command goes on"
    if generation.is_merging:
        return "a compaction was cut short: `b2batch compact` or the same run command completes it"
    return f"{SUCCESS} was removed, as by `verify --repair`: the same run command makes what is missing"


def _of_status(store: Store, status: Status, now: datetime) -> Overview:
    silent_s = max(0.0, (now - datetime.fromisoformat(status.updated)).total_seconds())
    is_running = status.state in (RunState.RUNNING, RunState.FINALISING)
    owner = newest_owner(store, status.run_id[:8])
    is_gone = owner is not None and owner.is_gone
    return Overview(
        output=store.uri,
        run_id=status.run_id,
        state=status.state,
        counts=status.counts,
        num_units=status.num_units,
        num_units_committed=status.num_units_committed,
        num_rows_planned=status.num_rows,
        num_replicas=status.num_replicas if is_running else 0,
        rows_per_s=status.rows_per_s,
        tokens_per_s=status.tokens_per_s,
        eta_s=eta_s(status.num_rows - status.counts.num_rows, status.rows_per_s) if is_running else None,
        num_replicas_lost=status.num_replicas_lost,
        num_rows_again=status.num_rows_again,
        num_out_of_memory=status.num_out_of_memory,
        num_reused_rows=status.num_reused_rows,
        started=status.started,
        updated=status.updated,
        silent_s=silent_s,
        is_silent=is_running and (is_gone or silent_s > LEASE_TTL_S),
        exit_code=status.exit_code,
        reason=status.reason,
    )


def _metrics(store: Store, keys: RunKeys) -> Mapping[str, Any]:
    try:
        return read_document(store, keys.metrics)
    except FileNotFoundError:
        return {}


def _failures(store: Store, keys: RunKeys) -> tuple[FailureKind, ...]:
    """The kinds of failed rows, the most frequent first."""
    kinds: dict[str, FailureKind] = {}
    for line in store.read(keys.errors).splitlines():
        error = json.loads(line)
        kind = kinds.get(error["type"])
        kinds[error["type"]] = (
            replace(kind, num_rows=kind.num_rows + 1)
            if kind
            else FailureKind(error["type"], 1, error["row_id"], error["file"] or "", error["message"])
        )
    return tuple(sorted(kinds.values(), key=lambda kind: -kind.num_rows))
