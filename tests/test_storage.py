"""Inputs on S3: listed, planned, read and watched as on a disk."""

from __future__ import annotations

import errno
import gzip
import io
import time
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("boto3")
pytest.importorskip("moto")

from outputs.s3_server import Fault, S3Server, s3_server

from b2batch.errors import DriftError, InputError, SpecError, StorageError
from b2batch.inputs import listing
from b2batch.inputs.plan import Plan, make_plan
from b2batch.inputs.unit_reader import UnitReader
from b2batch.outputs.s3_store import S3Store
from b2batch.spec import InputSpec
from b2batch.storage import mask_credentials, open_filesystem, retried


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        bucket = S3Store("bucket", "in", staging="x")
        bucket.probe()
        bucket.put("a.jsonl", b"".join(b'{"n": %d}\n' % n for n in range(50)))
        bucket.put("b.jsonl.gz", gzip.compress(b'{"n": 50}\n{"n": 51}\n'))
        sink = io.BytesIO()
        pq.write_table(pa.table({"n": range(52, 60)}), sink)
        bucket.put("c.parquet", sink.getvalue())
        bucket.put("_hidden.jsonl", b"{}")
        bucket.delete("x")
        yield running


@pytest.fixture(autouse=True)
def _calm(server: S3Server) -> None:
    server.calm()


def plan_of(*paths: str) -> Plan:
    return make_plan(InputSpec(path=paths, rows_per_unit=20))


def numbers(plan: Plan) -> list[int]:
    with UnitReader(plan.files, plan.schema, InputSpec(path=("s3://bucket/in",), rows_per_unit=20)) as reader:
        return [row.columns["n"] for unit in plan.units for row in reader.read(unit).rows]


@pytest.mark.parametrize(
    "path", ["s3://bucket/in", "s3://bucket/in/", "s3://bucket/in/*", "s3://bucket/**/[abc].*"]
)
def test_every_row_of_every_format(path: str) -> None:
    plan = plan_of(path)
    assert [file.path.rpartition("/")[2] for file in plan.files] == ["a.jsonl", "b.jsonl.gz", "c.parquet"]
    assert numbers(plan) == list(range(60))


@pytest.mark.parametrize("seed", [0, 1])
def test_requests_that_fail_are_asked_again(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server.fail_some(0.1, seed, Fault.SLOW_DOWN, Fault.LOST_REPLY, Fault.CUT_BODY)
    assert numbers(plan_of("s3://bucket/in")) == list(range(60))
    assert server.num_faults > 2


@pytest.mark.parametrize(
    ("error", "num_calls", "raised"),
    [
        (OSError("AWS Error NETWORK_CONNECTION"), 3, StorageError),
        (OSError(errno.EACCES, "Permission denied"), 1, PermissionError),
        (InputError("not JSON"), 1, InputError),
    ],
)
def test_only_what_may_pass_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, error: Exception, num_calls: int, raised: type[Exception]
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    calls = []

    def call() -> None:
        calls.append(1)
        raise error

    with pytest.raises(raised):
        retried(call, "s3://bucket/a")
    assert len(calls) == num_calls


def test_a_listing_that_fails_is_the_stores_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError("When listing objects: AWS Error SLOW_DOWN during ListObjectsV2 operation")

    monkeypatch.setattr(listing, "_look_up", fail)
    with pytest.raises(StorageError, match="SLOW_DOWN"):
        plan_of("s3://bucket/in")


def test_nothing_there(server: S3Server) -> None:
    for path in ("s3://bucket/nothing", "s3://bucket/in/*.csv", "s3://nowhere/in"):
        with pytest.raises(InputError, match=r"input\.path: s3://"):
            plan_of(path)


def test_an_object_that_is_replaced_during_the_run_is_told(server: S3Server) -> None:
    bucket = S3Store("bucket", "changing", staging="x")
    bucket.probe()
    bucket.put("a.jsonl", b'{"n": 1}\n')
    plan = plan_of("s3://bucket/changing/a.jsonl")
    bucket.put("a.jsonl", b'{"n": 2}\n')  # as long, and within the same second
    with pytest.raises(DriftError, match="the input changed during the run"):
        numbers(plan)


def test_an_unknown_scheme_is_told() -> None:
    with pytest.raises(SpecError, match="no file system for this scheme"):
        open_filesystem("nonsense://host/path")


def test_credentials_are_masked() -> None:
    text = "s3://key:canary@bucket/x?secret_key=canary&region=eu and https://canary@host/"
    assert mask_credentials(text) == "s3://***@bucket/x?secret_key=***&region=eu and https://***@host/"
