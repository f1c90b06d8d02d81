"""The lock as other processes see it: who holds it, waiting for it, breaking it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from b2batch.errors import Drained, Fenced, RunLocked
from b2batch.outputs import lease as lease_module
from b2batch.outputs.lease import LEASE_TTL_S, find_lease, take_epoch
from b2batch.outputs.lock import break_lock, find_lock, when_free
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.store import open_store

from .memory_store import MemoryStore
from .tiny_run import PLAN, make_record, make_spec, make_units

RUN8 = "1f3a9c7e"


@pytest.fixture(params=["local", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "out")
        return
    pytest.importorskip("moto")
    pytest.importorskip("boto3")
    from .s3_server import s3_server

    with s3_server():
        yield f"s3://bucket/{tmp_path.name}"  # the buckets outlive a server


def open_run(out: str) -> RunDirectory:
    record = make_record(make_spec(), make_units())
    return RunDirectory.open(open_store(out, record.run_id), record, PLAN)


def test_who_holds_the_lock_is_seen_and_nothing_is_left_by_looking(out: str) -> None:
    run = open_run(out)
    assert find_lock(out).lease is None
    epoch = run.take_epoch("raysubmit_7")
    before = set(run.store.list(""))
    held = find_lock(out)
    assert held.is_held
    assert held.lease is not None
    assert (held.lease.epoch, held.lease.owner.job_id) == (1, "raysubmit_7")
    assert held.lease.is_beating
    assert 0 < held.lease.ends_in_s <= LEASE_TTL_S
    assert set(run.store.list("")) == before
    epoch.close()
    free = find_lock(out)
    assert not free.is_held
    assert free.lease is not None
    assert free.lease.ends_in_s == 0.0


def test_looking_writes_nothing(tmp_path: Path) -> None:
    """A file that is made and removed again shows in its directory's time."""
    out = str(tmp_path / "out")
    with open_run(out).take_epoch():
        places = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
        before = {place: place.stat().st_mtime_ns for place in places}
        assert find_lock(out).is_held
        assert {place: place.stat().st_mtime_ns for place in places} == before


def test_a_broken_lock_fences_its_holder_and_is_free(out: str) -> None:
    run = open_run(out)
    old = run.take_epoch()
    seen = find_lock(out).lease
    assert seen is not None
    with pytest.raises(RunLocked, match="the holder is alive"):
        break_lock(out, seen)
    old.check_not_fenced()
    assert break_lock(out, seen, force=True) == 2
    with pytest.raises(Fenced, match="epoch 2 took it over"):
        old.check_not_fenced()
    old.close()
    assert not find_lock(out).is_held
    new = run.take_epoch()
    assert new.number == 3
    with pytest.raises(RunLocked, match="changed hands"):
        break_lock(out, seen, force=True)
    new.check_not_fenced()


@pytest.mark.parametrize(
    ("silent_s", "is_held", "is_beating"),
    [(0, True, True), (14, True, True), (16, True, False), (60, True, False), (61, False, False)],
)
def test_a_holder_is_alive_for_one_and_a_half_heartbeats(
    memory: MemoryStore, silent_s: int, is_held: bool, is_beating: bool
) -> None:
    take_epoch(memory, RUN8)
    memory.now_s += silent_s
    lease = find_lease(memory, RUN8)
    assert lease is not None
    assert (lease.is_held, lease.is_beating) == (is_held, is_beating)


def test_a_holder_that_beats_on_is_alive_though_the_clock_jumped(
    memory: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_epoch(memory, RUN8)
    memory.now_s -= 86_400
    monkeypatch.setattr(lease_module, "_beats_on", lambda store, keys: True)
    lease = find_lease(memory, RUN8)
    assert lease is not None
    assert lease.is_beating


class Waiting:
    """A lock that is taken for a while, and a clock that only sleeping moves."""

    def __init__(self, free_at_s: float) -> None:
        self.now_s = 0.0
        self._free_at_s = free_at_s

    def take(self) -> str:
        if self.now_s < self._free_at_s:
            raise RunLocked("pid 7 on that host")
        return "taken"

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def wait(self, wait_s: float, should_stop: Callable[[], bool] = lambda: False) -> str:
        return when_free(self.take, wait_s, should_stop, lambda: self.now_s, self.sleep)


def test_waiting_ends_when_the_lock_is_free(caplog: pytest.LogCaptureFixture) -> None:
    lock = Waiting(free_at_s=150)
    with caplog.at_level("INFO", logger="b2batch.outputs.lock"):
        assert lock.wait(float("inf")) == "taken"
    assert 150 <= lock.now_s < 153
    assert caplog.text.count("waiting for the lock: pid 7 on that host") == 3


def test_waiting_ends_when_the_time_is_over() -> None:
    lock = Waiting(free_at_s=150)
    with pytest.raises(RunLocked):
        lock.wait(30)
    assert 30 <= lock.now_s < 31
    with pytest.raises(RunLocked):
        Waiting(free_at_s=1).wait(0)


def test_waiting_hears_a_stop() -> None:
    lock, calls = Waiting(free_at_s=150), itertools.count()
    with pytest.raises(Drained):
        lock.wait(float("inf"), should_stop=lambda: next(calls) == 9)
    assert lock.now_s < 3
