from __future__ import annotations

from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta

import pytest

from b2batch.errors import OutputError
from b2batch.outputs.document import encode_document
from b2batch.outputs.layout import RunKeys
from b2batch.outputs.lease import Owner
from b2batch.outputs.overview import overview
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.status import RunState, Status, write_status
from b2batch.rows import UnitCounts

from .memory_store import MemoryStore
from .tiny_run import PLAN, drive, make_record, make_spec, make_units

RECORD = make_record(make_spec(), make_units())
NEWS = datetime(2026, 1, 1, 0, 1, tzinfo=UTC)
RUNNING = Status(
    run_id=RECORD.run_id,
    state=RunState.RUNNING,
    epoch=1,
    num_units=4,
    num_units_committed=1,
    counts=UnitCounts(2, 1, 0, 14, 4),
    num_replicas=2,
    started="2026-01-01T00:00:00+00:00",
    updated=NEWS.isoformat(),
    rows_per_s=1.5,
)


def begin(store: MemoryStore, status: Status | None = RUNNING, owner: Owner | None = None) -> None:
    """A run whose driver is this process, or ``owner``."""
    RunDirectory.open(store, RECORD, PLAN)
    document = encode_document(asdict(owner or Owner.this_process()))
    store.put_if_absent(RunKeys(RECORD.run8).epoch(1), document)
    if status is not None:
        write_status(store, status)


def test_a_directory_without_a_run(memory: MemoryStore) -> None:
    with pytest.raises(OutputError, match="holds no b2batch run"):
        overview(memory, NEWS)


def test_a_finished_run_with_what_failed_in_it(memory: MemoryStore) -> None:
    drive(memory, make_spec(), make_units(), bad_rows=["0:1", "0:7"])

    view = overview(memory, NEWS)

    assert (view.state, view.exit_code, view.num_skipped_blank) == (RunState.SUCCEEDED, 0, 1)
    assert (view.counts.num_ok, view.counts.num_error) == (10, 2)
    (kind,) = view.failures
    assert (kind.type, kind.num_rows, kind.row_id, kind.message) == ("PROMPT_MISSING", 2, "0:1", "no text")
    assert kind.file == "reviews.jsonl"


def test_a_run_that_goes_on(memory: MemoryStore) -> None:
    begin(memory)

    view = overview(memory, NEWS + timedelta(seconds=5))

    assert (view.state, view.is_silent, view.silent_s) == (RunState.RUNNING, False, 5)
    assert (view.num_units_committed, view.num_units, view.rows_per_s) == (1, 4, 1.5)


def test_a_run_that_was_not_heard_of_since_its_lease_ended(memory: MemoryStore) -> None:
    begin(memory)

    assert overview(memory, NEWS + timedelta(seconds=61)).is_silent


def test_a_driver_that_died_on_this_host_is_told_at_once(memory: MemoryStore) -> None:
    begin(memory, owner=replace(Owner.this_process(), pid_start="0"))

    assert overview(memory, NEWS).is_silent


def test_a_run_that_ended_is_not_silent_however_old(memory: MemoryStore) -> None:
    begin(memory, replace(RUNNING, state=RunState.DRAINED, exit_code=75, reason="asked to stop"))

    view = overview(memory, NEWS + timedelta(days=1))

    assert (view.state, view.is_silent, view.exit_code) == (RunState.DRAINED, False, 75)
    assert view.num_replicas == 0


def test_a_driver_that_died_before_its_first_word(memory: MemoryStore) -> None:
    begin(memory, status=None)

    assert overview(memory, NEWS).state is None
