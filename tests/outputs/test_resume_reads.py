"""How a resume reads the footers of what is committed: several at once where the storage is slow."""

from __future__ import annotations

import threading
import time
from typing import BinaryIO

from b2batch.outputs.parts import commit_part
from b2batch.outputs.run import RunDirectory

from .memory_store import MemoryStore
from .tiny_run import PLAN, make_part, make_record, make_spec, make_units

NUM_UNITS = 80


class SlowStore(MemoryStore):
    """Opening waits a little, as for a reply over a network. ``most_at_once`` counts opens under way."""

    def __init__(self, wait_s: float) -> None:
        super().__init__()
        self.wait_s = wait_s
        self.most_at_once = 0
        self._num_open = 0
        self._lock = threading.Lock()

    def open(self, key: str) -> BinaryIO:
        with self._lock:
            self._num_open += 1
            self.most_at_once = max(self.most_at_once, self._num_open)
        time.sleep(self.wait_s)
        with self._lock:
            self._num_open -= 1
        return super().open(key)


def test_slow_storage_is_read_by_several_threads() -> None:
    store = SlowStore(wait_s=0.002)
    spec, units = make_spec(), make_units(NUM_UNITS)
    record = make_record(spec, units)
    directory = RunDirectory.open(store, record, PLAN)
    for unit in units:
        commit_part(store, make_part(unit, record.run_id, spec=spec))

    committed = directory.committed_units(units)

    assert committed.keys() == set(range(NUM_UNITS))
    assert store.most_at_once > 1
