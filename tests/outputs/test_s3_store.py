"""The same contract on S3, with the failings of networks and stores between the two."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("boto3")
pytest.importorskip("moto")

from b2batch.errors import Fenced, IntegrityError, OutputError, StorageError, StorageFull
from b2batch.outputs import lease
from b2batch.outputs.layout import SUCCESS, RunKeys, part_name
from b2batch.outputs.lease import take_epoch
from b2batch.outputs.parts import commit_part
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.s3_store import S3Store
from b2batch.outputs.schema import output_schema
from b2batch.outputs.store import open_store
from b2batch.outputs.verify import verify

from . import tiny_run
from .s3_server import Fault, S3Server, s3_server
from .tiny_run import INPUT_SCHEMA, PLAN, drive, make_part, make_record, make_spec, make_units, rows_digest

STAGING = "__b2batch/1f3a9c7e/tmp"
SPEC, UNITS = make_spec(), make_units()
RECORD = make_record(SPEC, UNITS)
SCHEMA = output_schema(INPUT_SCHEMA, SPEC)
_numbers = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def out(server: S3Server) -> Iterator[str]:
    """A place of its own in the bucket."""
    server.calm()
    yield f"s3://bucket/out{next(_numbers)}"
    server.calm()


@pytest.fixture
def store(out: str) -> S3Store:
    bucket, _, prefix = out.removeprefix("s3://").partition("/")
    store = S3Store(bucket, prefix, STAGING)
    store.probe()
    return store


def start(out: str) -> RunDirectory:
    return RunDirectory.open(open_store(out, RECORD.run_id), RECORD, PLAN)


# --- the contract --------------------------------------------------------------------------------


def test_second_creation_is_refused_and_changes_nothing(store: S3Store) -> None:
    assert store.put_if_absent("a", b"first")
    assert not store.put_if_absent("a", b"second")
    assert store.read("a") == b"first"


def test_put_replaces_and_listing_is_by_prefix(store: S3Store) -> None:
    for key in ("part-1", "part-2", "other", "d/e/part-3"):
        store.put(key, b"")
    store.put("part-1", b"22")
    assert list(store.list("part-")) == [("part-1", 2), ("part-2", 0)]
    assert [key for key, _ in store.list("d/")] == ["d/e/part-3"]
    assert [key for key, _ in store.list("")] == [STAGING, "d/e/part-3", "other", "part-1", "part-2"]
    store.delete_tree("d")
    assert not store.exists("d/e/part-3")


def test_long_listings_come_whole(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    call = store._call
    monkeypatch.setattr(
        store,
        "_call",
        lambda operation, key="", **arguments: call(
            operation, key, **arguments, **({"MaxKeys": 2} if operation == "list_objects_v2" else {})
        ),
    )
    for number in range(5):
        store.put(f"x/{number}", b"")
    assert [key for key, _ in store.list("x/")] == [f"x/{number}" for number in range(5)]


def test_missing_keys(store: S3Store) -> None:
    assert not store.exists("a")
    store.delete("a")
    store.delete_tree("d")
    for call in (store.read, store.open, store.age_s):
        with pytest.raises(FileNotFoundError):
            call("a")


@pytest.mark.parametrize("key", ["", "..", "a/../b", "/etc/passwd", "a//b", "./a"])
def test_keys_that_are_no_names_inside_are_refused(store: S3Store, key: str) -> None:
    for call in (store.read, store.delete, lambda key: store.put(key, b"")):
        with pytest.raises(OutputError):
            call(key)


@pytest.mark.parametrize("size", [0, 10, 200_000])
def test_random_access(store: S3Store, size: int) -> None:
    data = os.urandom(size)
    store.put("a", data)
    with store.open("a") as file:
        assert file.seek(0, os.SEEK_END) == size
        for start in (size // 2, 0, max(0, size - 5)):
            file.seek(start)
            assert file.read(7) == data[start : start + 7]
        file.seek(0)
        assert file.read() == data


def test_age_is_by_the_stores_clock(store: S3Store) -> None:
    store.put("a", b"")
    assert -1 <= store.age_s("a") < 30


def test_without_the_object_that_fences_nothing_is_written(store: S3Store) -> None:
    store.delete_tree(STAGING)
    with pytest.raises(Fenced):
        store.put_if_absent("a", b"")
    with pytest.raises(Fenced):
        store.put("a", b"")
    assert list(store.list("")) == []


def test_opened_without_a_run_it_can_be_read_only(store: S3Store, out: str) -> None:
    store.put("a", b"1")
    reader = open_store(out)
    assert reader.uri == out
    assert reader.read("a") == b"1"
    with pytest.raises(OutputError, match="reading only"):
        reader.put("a", b"2")


def test_one_of_many_threads_wins(store: S3Store) -> None:
    wins: list[int] = []

    def race(number: int) -> None:
        wins.extend(turn for turn in range(5) if store.put_if_absent(f"part-{turn}", str(number).encode()))

    threads = [threading.Thread(target=race, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(wins) == list(range(5))


# --- preflight -----------------------------------------------------------------------------------


def test_preflight_refuses_a_store_that_ignores_the_condition(server: S3Server, out: str) -> None:
    server.ignores_conditions = True
    with pytest.raises(OutputError, match="replace an existing object") as raised:
        start(out)
    assert raised.value.exit_code == 2


def test_preflight_survives_its_own_lost_reply(server: S3Server, out: str) -> None:
    server.fail_next(Fault.LOST_REPLY, "PUT", "probe-")
    start(out)


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("s3://nowhere/out", "NoSuchBucket"),
        ("s3://key@bucket/out", "expected s3://"),
        ("s3:///out", "expected s3://"),
    ],
)
def test_preflight_says_why_a_place_cannot_be_used(server: S3Server, place: str, told: str) -> None:
    server.calm()
    with pytest.raises(OutputError, match=told) as raised:
        start(place)
    assert "key@" not in str(raised.value)


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_preflight_where_reading_or_writing_is_denied(server: S3Server, out: str, method: str) -> None:
    server.fail_next(Fault.DENIED, method, times=100)
    with pytest.raises(OutputError, match="AccessDenied"):
        start(out)


# --- what fails on the way -----------------------------------------------------------------------


@pytest.mark.parametrize("fault", [Fault.SLOW_DOWN, Fault.ERROR_AFTER, Fault.LOST_REPLY, Fault.CONFLICT])
def test_a_part_is_committed_once_whatever_happens_to_the_first_reply(
    server: S3Server, out: str, fault: Fault
) -> None:
    directory = start(out)
    part = make_part(UNITS[1], RECORD.run_id)
    server.fail_next(fault, "PUT", "part-")
    report = commit_part(directory.store, part)
    assert server.num_faults == 1
    assert report.counts.num_ok == 3
    assert directory.store.read(part.name) == part.data
    assert directory.committed_units(UNITS).keys() == {1}


def test_what_is_written_is_one_request_however_large(server: S3Server, store: S3Store) -> None:
    asked: list[tuple[str, str]] = []

    def note(method: str, path: str) -> None:
        asked.append((method, path.rpartition("/")[2]))

    server.fault_of = note
    assert store.put_if_absent("part-1", b"x" * (20 << 20)), "more than clients send in pieces by themselves"
    assert [request for request in asked if request[1] == "part-1"] == [("PUT", "part-1")]
    assert "POST" not in {method for method, _ in asked}


def test_a_name_that_is_taken_by_something_else_is_not_taken_for_the_part(server: S3Server, out: str) -> None:
    directory = start(out)
    other = make_part(UNITS[2], RECORD.run_id)
    directory.store.put(part_name(1, RECORD.run8), other.data)
    with pytest.raises(IntegrityError, match="unit is 2, planned is 1"):
        commit_part(directory.store, make_part(UNITS[1], RECORD.run_id))


def test_an_epoch_whose_reply_was_lost_is_ones_own(server: S3Server, out: str) -> None:
    directory = start(out)
    server.fail_next(Fault.LOST_REPLY, "PUT", "epoch/")
    assert directory.take_epoch().number == 1
    assert server.num_faults == 1


def test_a_reply_cut_within_its_body_is_asked_for_again(server: S3Server, store: S3Store) -> None:
    data = os.urandom(300_000)
    store.put("a", data)
    server.fail_next(Fault.CUT_BODY, "GET", times=2)
    assert store.read("a") == data
    assert server.num_faults == 2


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault.SLOW_DOWN, StorageError),
        (Fault.DENIED, StorageError),
        (Fault.EXPIRED, StorageError),
        (Fault.FULL, StorageFull),
    ],
)
def test_what_does_not_pass_ends_the_attempt_and_can_be_tried_again(
    server: S3Server, store: S3Store, fault: Fault, kind: type[StorageError]
) -> None:
    server.fail_next(fault, "PUT", times=100)
    with pytest.raises(kind) as raised:
        store.put_if_absent("part-1", b"data")
    assert raised.value.exit_code == 1
    server.calm()
    assert store.put_if_absent("part-1", b"data")


def test_lease_on_the_stores_clock(out: str, store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    take_epoch(store, "1f3a9c7e")
    with pytest.raises(lease.RunLocked):
        take_epoch(store, "1f3a9c7e")
    monkeypatch.setattr(lease, "LEASE_TTL_S", -2.0)
    monkeypatch.setattr(lease, "_WATCH_S", 0.0)
    assert take_epoch(store, "1f3a9c7e").number == 2


# --- whole runs ----------------------------------------------------------------------------------


def prove(out: str) -> None:
    report = verify(RunDirectory.existing(open_store(out, RECORD.run_id)), UNITS, SCHEMA, rows_digest)
    assert report.problems == ()
    assert report.num_rows == 12


@pytest.mark.parametrize("seed", [0, 1])
def test_every_row_once_though_requests_fail_all_the_time(server: S3Server, out: str, seed: int) -> None:
    server.fail_some(0.2, seed, Fault.SLOW_DOWN, Fault.ERROR_AFTER, Fault.LOST_REPLY, Fault.CUT_BODY)
    num_generated, success = drive(open_store(out, RECORD.run_id), SPEC, UNITS)
    assert server.num_faults > 3
    server.calm()
    assert (num_generated, success.counts.num_rows) == (4, 12)
    prove(out)
    assert drive(open_store(out, RECORD.run_id), SPEC, UNITS)[0] == 0


@pytest.mark.parametrize("failpoint", ["F8:kill:9", "F9:kill:9", "F12:kill"])
def test_killed_then_run_again(server: S3Server, out: str, failpoint: str) -> None:
    script = Path(tiny_run.__file__)
    environment = os.environ | {"B2BATCH_FAILPOINT": failpoint, "PYTHONPATH": str(script.parents[2])}
    ended = subprocess.run(
        [sys.executable, str(script), out], env=environment, capture_output=True, timeout=60
    )
    assert ended.returncode == -signal.SIGKILL
    before = open_store(out)
    committed = {key: before.read(key) for key, _ in before.list("part-")}
    num_generated, _ = drive(open_store(out, RECORD.run_id), SPEC, UNITS)
    assert num_generated == 4 - len(committed)
    assert {key: before.read(key) for key in committed} == committed
    prove(out)


def test_overwrite_fences_the_writers_of_the_replaced_run(server: S3Server, out: str) -> None:
    other_spec = make_spec("sampling.temperature=0.5")
    other = make_record(other_spec, UNITS)
    late = open_store(out, RECORD.run_id)
    drive(late, SPEC, UNITS)
    drive(open_store(out, other.run_id), other_spec, UNITS, overwrite=True)
    with pytest.raises(Fenced):
        commit_part(late, make_part(UNITS[0], RECORD.run_id))
    assert not late.exists(RunKeys(RECORD.run8).record)


def test_success_that_a_replaced_run_wrote_late_is_nobodys(server: S3Server, out: str) -> None:
    other_spec = make_spec("sampling.temperature=0.5")
    other = make_record(other_spec, UNITS)
    old = open_store(out, RECORD.run_id)
    drive(old, SPEC, UNITS)
    late = old.read(SUCCESS)
    new = open_store(out, other.run_id)
    RunDirectory.open(new, other, PLAN, overwrite=True)
    new.put(SUCCESS, late)  # its PUT was under way while the run was replaced
    assert RunDirectory.existing(new).success() is None
    num_generated, success = drive(new, other_spec, UNITS)
    assert (num_generated, success.run_id) == (4, other.run_id)
