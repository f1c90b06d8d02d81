"""A secret of the environment is used by the driver and the replicas, and told by none of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray

from .command import b2batch, write_job

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def test_a_secret_is_found_nowhere_after_runs_that_end_well_and_badly(tmp_path: Path) -> None:
    secret = Path(os.environ["B2_TEST_SECRET"])
    job = write_job(
        tmp_path,
        ['{"text": "很好"}', "{", '{"text": "\\ud800"}'],
        input={
            "path": ["${env:B2_TEST_SECRET}/*.jsonl", "${env:B2_TEST_SECRET}/x.gz"],
            "on_bad_file": "skip",
        },
    )
    document = json.loads(job.read_text(encoding="utf-8"))
    document["notify"] = [{"url": "json://127.0.0.1:9${env:B2_TEST_SECRET}", "include_sample": 2}]
    job.write_text(json.dumps(document), encoding="utf-8")
    shutil.move(tmp_path / "rows.jsonl", secret / "rows.jsonl")
    (secret / "x.gz").write_bytes(b"\x1f\x8b broken")
    said = []

    for verb in ("validate", "plan", "run", "status", "verify"):
        ended = b2batch(verb, job, *(["-v"] if verb != "status" else []))
        assert ended.exit_code == 0, ended.output
        said.append(ended.output)
    rows = pq.read_table(tmp_path / "out").to_pylist()
    assert [row["status"] for row in rows] == ["ok", "error", "error", "error"]
    (secret / "rows.jsonl").write_text('{"text": "很差"}\n', encoding="utf-8")
    for verb, exit_code in (("run", 4), ("verify", 4)):
        ended = b2batch(verb, job, "-v")
        assert ended.exit_code == exit_code, ended.output
        said.append(ended.output)
    (secret / "rows.jsonl").unlink()
    for arguments, exit_code in ((("run", job), 2), (("verify", tmp_path / "out"), 2)):
        ended = b2batch(*arguments, "-v")
        assert ended.exit_code == exit_code, ended.output
        said.append(ended.output)

    assert "${env:B2_TEST_SECRET}" in said[-1]
    assert "notify.0 (JSON) was not told" in said[2]
    places = {
        **dict(enumerate(text.encode() for text in said)),
        **dict(_files(tmp_path / "out")),
        **dict(_files(Path(ray._private.worker._global_node.get_session_dir_path()) / "logs")),
        **dict(_command_lines()),
        "actors": repr(ray._private.state.actors()).encode(),
        "jobs": repr(ray._private.state.jobs()).encode(),
    }
    assert len(places) > 30
    assert [place for place, content in places.items() if b"canary" in content] == []


def _files(directory: Path) -> Iterator[tuple[object, bytes]]:
    """Every file, those of Parquet also as what they say."""
    for path in directory.rglob("*"):
        if not path.is_file():
            continue
        yield path, path.read_bytes()
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            yield (path, "rows"), repr((table.to_pylist(), table.schema.metadata)).encode()


def _command_lines() -> Iterator[tuple[object, bytes]]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path, path.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue  # the process has ended since
