from __future__ import annotations

import subprocess
import sys

import pytest

from b2batch.errors import IntegrityError
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.status import RunState, Status, read_status, write_status
from b2batch.rows import UnitCounts

from .memory_store import MemoryStore
from .tiny_run import PLAN, make_record, make_spec, make_units

RECORD = make_record(make_spec(), make_units())
STATUS = Status(
    run_id=RECORD.run_id,
    state=RunState.DRAINED,
    epoch=2,
    num_units=4,
    num_units_committed=1,
    counts=UnitCounts(2, 1, 0, 14, 4),
    num_replicas=2,
    started="2026-01-01T00:00:00Z",
    updated="2026-01-01T00:01:00Z",
    exit_code=75,
    reason="asked to stop",
)


def test_status_of_the_run_that_is_there(memory: MemoryStore) -> None:
    assert read_status(memory) is None
    RunDirectory.open(memory, RECORD, PLAN)
    assert read_status(memory) is None
    write_status(memory, STATUS)
    assert read_status(memory) == STATUS


def test_damaged_status(memory: MemoryStore) -> None:
    RunDirectory.open(memory, RECORD, PLAN)
    memory.put(f"__b2batch/{RECORD.run8}/status.json", b'{"state": "asleep"}')
    with pytest.raises(IntegrityError, match="damaged"):
        read_status(memory)


def test_reading_a_status_needs_no_heavy_library() -> None:
    code = (
        "import sys, b2batch.outputs.status; "
        "print([name for name in ('torch', 'ray', 'transformers', 'pyarrow') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
