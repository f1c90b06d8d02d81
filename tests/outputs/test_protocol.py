"""Any order of starts, crashes, takeovers, late writers and lost replies keeps each row exactly once."""

from __future__ import annotations

import functools
import hashlib
import json

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from b2batch.errors import Fenced, IntegrityError, RunLocked
from b2batch.outputs.finalise import finalise
from b2batch.outputs.footer import read_footer
from b2batch.outputs.layout import SUCCESS, part_name
from b2batch.outputs.lease import LEASE_TTL_S, Epoch
from b2batch.outputs.parts import Part, commit_part, planned_row_ids
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.schema import output_schema

from .memory_store import LostReplyError, MemoryStore
from .tiny_run import INPUT_SCHEMA, PLAN, answer, failed, make_part, make_record, make_spec, make_units

UNITS = make_units(3, 2)
SPECS = [make_spec(), make_spec("sampling.temperature=0.5")]
RECORDS = [make_record(spec, UNITS) for spec in SPECS]
SCHEMA = output_schema(INPUT_SCHEMA, SPECS[0])


@functools.cache
def part_of(which: int, unit_index: int, attempt: int, is_bad: bool) -> Part:
    make = failed if is_bad else answer
    results = [make(row_id) for row_id in planned_row_ids(UNITS[unit_index])]
    return make_part(UNITS[unit_index], RECORDS[which].run_id, results=results, attempt=attempt)


class Protocol(RuleBasedStateMachine):
    """The store against a model: which run is current, which parts it must hold, who may drive it."""

    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryStore()
        self.current: int | None = None
        self.started: set[int] = set()
        self.parts: dict[int, bytes] = {}
        self.drivers: list[tuple[RunDirectory, Epoch]] = []
        self.holder: Epoch | None = None
        self.last_beat_s = 0.0

    def lease_is_alive(self) -> bool:
        return self.holder is not None and self.store.now_s - self.last_beat_s <= LEASE_TTL_S

    @rule(which=st.sampled_from([0, 1]), takeover=st.booleans())
    def start_a_driver(self, which: int, takeover: bool) -> None:
        if self.current not in (None, which):
            with pytest.raises(IntegrityError, match="temperature"):
                RunDirectory.open(self.store, RECORDS[which], PLAN)
            return
        directory = RunDirectory.open(self.store, RECORDS[which], PLAN)
        self.current = which
        self.started.add(which)
        if self.lease_is_alive() and not takeover:
            with pytest.raises(RunLocked):
                directory.take_epoch()
            return
        self.holder = directory.take_epoch(takeover=takeover)
        self.last_beat_s = self.store.now_s
        self.drivers.append((directory, self.holder))

    @precondition(lambda self: self.drivers)
    @rule(data=st.data())
    def a_driver_stops(self, data: st.DataObject) -> None:
        _, epoch = data.draw(st.sampled_from(self.drivers))
        epoch.close()
        if epoch is self.holder:
            self.holder = None

    @rule(seconds=st.sampled_from([1.0, LEASE_TTL_S / 2, LEASE_TTL_S + 1]))
    def time_passes(self, seconds: float) -> None:
        self.store.now_s += seconds

    @precondition(lambda self: self.current is not None)
    @rule(
        which=st.sampled_from([0, 1]),
        unit_index=st.sampled_from(range(len(UNITS))),
        attempt=st.integers(1, 2),
        is_bad=st.booleans(),
        reply_is_lost=st.booleans(),
    )
    def any_worker_commits(
        self, which: int, unit_index: int, attempt: int, is_bad: bool, reply_is_lost: bool
    ) -> None:
        if which not in self.started:
            return
        part = part_of(which, unit_index, attempt, is_bad)
        was_there = self.store.exists(part.name)
        self.store.lose_next_reply = reply_is_lost
        if reply_is_lost:
            with pytest.raises(LostReplyError):
                commit_part(self.store, part)
        else:
            assert commit_part(self.store, part).newly_committed is not was_there
        if which == self.current:
            self.parts.setdefault(unit_index, part.data)

    @precondition(lambda self: self.drivers)
    @rule(data=st.data())
    def a_driver_finalises(self, data: st.DataObject) -> None:
        directory, epoch = data.draw(st.sampled_from(self.drivers))
        if epoch is not self.holder:
            if self.holder is not None:
                with pytest.raises(Fenced):
                    epoch.check_not_fenced()
            return
        if len(self.parts) < len(UNITS):
            with pytest.raises(IntegrityError, match="not committed"):
                self.finalise(directory)
            return
        self.finalise(directory)
        assert self.store.exists(SUCCESS)
        names = [key for key, _ in self.store.list("part-")]
        assert names == [part_name(unit.index, directory.record.run8) for unit in UNITS]

    def finalise(self, directory: RunDirectory) -> None:
        finalise(directory, UNITS, SCHEMA, num_skipped_blank=0, max_error_rate=1.0)

    @precondition(lambda self: self.current is not None)
    @rule(which=st.sampled_from([0, 1]))
    def somebody_overwrites(self, which: int) -> None:
        replaces = which != self.current or self.store.exists(SUCCESS)
        if replaces and self.lease_is_alive():
            with pytest.raises(RunLocked):
                RunDirectory.open(self.store, RECORDS[which], PLAN, overwrite=True)
            return
        RunDirectory.open(self.store, RECORDS[which], PLAN, overwrite=True)
        if replaces:
            self.started.add(which)
            self.current, self.parts, self.drivers, self.holder = which, {}, [], None

    @invariant()
    def committed_parts_are_there_and_never_change(self) -> None:
        if self.current is None:
            return
        run8 = RECORDS[self.current].run8
        for index, data in self.parts.items():
            assert self.store.objects[part_name(index, run8)] == data
        directory = RunDirectory.existing(self.store)
        assert directory.record.run_id == RECORDS[self.current].run_id
        assert directory.committed_units(UNITS).keys() == self.parts.keys()

    @invariant()
    def success_means_every_row_once(self) -> None:
        if not self.store.exists(SUCCESS):
            return
        assert len(self.parts) == len(UNITS)
        document = json.loads(self.store.read(SUCCESS))
        assert {part["sha256"] for part in document["parts"].values()} == {
            hashlib.sha256(data).hexdigest() for data in self.parts.values()
        }
        footers = [read_footer(data) for data in self.parts.values()]
        assert sum(footer.num_rows for footer in footers) == 6
        assert document["rows"]["ok"] + document["rows"]["error"] == 6


Protocol.TestCase.settings = settings(max_examples=50, stateful_step_count=25)
TestProtocol = Protocol.TestCase
