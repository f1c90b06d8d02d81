"""A job on a real cluster that asks for a token: submitted, followed, stopped, gone on with."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from .command import write_job

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
BIN = Path(sys.executable).parent
GATE = """
import pathlib, time
def stand(row):
    # Once something is committed, nothing more is read until the test opens.
    place = pathlib.Path(row["place"])
    while any((place / "out").glob("part-*")) and not (place / "open").exists():
        time.sleep(0.05)
    return row
"""
PATIENCE_S = 400.0  # for a machine that does much else


@dataclass(frozen=True, slots=True)
class RealCluster:
    """Where its dashboard is, the environment of whoever may use it, and where their jobs are."""

    url: str
    directory: Path
    environ: dict[str, str]

    def begin(self, *arguments: str | Path, **changed: str) -> subprocess.Popen[str]:
        """Start ``b2batch ARGUMENTS`` as a user does."""
        return subprocess.Popen(
            [sys.executable, "-m", "b2batch", *map(str, arguments), "--address", self.url],
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**self.environ, **changed},
        )

    def b2batch(self, *arguments: str | Path, **changed: str) -> tuple[int, str, str]:
        """The exit code, stdout and stderr of ``b2batch ARGUMENTS``."""
        process = self.begin(*arguments, **changed)
        said, told = process.communicate(timeout=PATIENCE_S)
        return process.returncode, said, told


@pytest.fixture(scope="module")
def cluster() -> Iterator[RealCluster]:
    """A node started as an administrator does; its processes end with the tests.

    In a directory with a short name: Ray's sockets lie in it, and a socket's path has 107 bytes at most.
    """
    with tempfile.TemporaryDirectory(prefix="b2s-", ignore_cleanup_errors=True) as directory:
        yield from _cluster(Path(directory))


def _cluster(place: Path) -> Iterator[RealCluster]:
    port, dashboard, agent = _free_ports(3)
    environ = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "B2BATCH_"))},
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(place),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    command = [BIN / "ray", "start", "--head", "--block", "--num-cpus=1", "--object-store-memory=80000000"]
    command += [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--temp-dir={place}", "--disable-usage-stats"]
    found = RealCluster(f"http://127.0.0.1:{dashboard}", place, environ)
    head = _start(command, found)
    try:
        wait_until(lambda: _num_nodes(found) == 1, head, lambda: (place / "start.log").read_text()[-2000:])
        yield found
    finally:
        head.terminate()
        head.wait(60)


def _start(command: list[str | Path], cluster: RealCluster) -> subprocess.Popen[bytes]:
    """Ray gives itself 30 s to start, which a busy machine may not: the last of three tries counts."""
    for _ in range(3):
        with (cluster.directory / "start.log").open("wb") as log:
            head = subprocess.Popen(command, env=cluster.environ, stdout=log, stderr=log)
        while head.poll() is None and not _num_nodes(cluster):
            time.sleep(0.1)  # another process works: there is nothing else to wait on
        if head.poll() is None:
            break
    return head


def _free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _num_nodes(cluster: RealCluster) -> int:
    """As the dashboard counts them; it takes jobs when it knows the first."""
    token = {"Authorization": f"Bearer {cluster.environ['RAY_AUTH_TOKEN']}"}
    try:
        reply = requests.get(f"{cluster.url}/nodes?view=summary", headers=token, timeout=5)
        nodes = reply.json()["data"]["summary"]
    except (requests.RequestException, ValueError, KeyError):
        return 0
    return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[Any], said: Callable[[], object]) -> None:
    """Until something is so that ``process`` works for; ``said`` tells why it never came."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert process.poll() is None, said()
        assert time.monotonic() < deadline_s, said()
        time.sleep(0.1)  # other processes work: there is nothing else to wait on


def test_a_job_is_submitted_followed_stopped_and_gone_on_with(cluster: RealCluster, tmp_path: Path) -> None:
    (cluster.directory / "gate.py").write_text(GATE)
    job = write_job(
        tmp_path,
        [json.dumps({"text": "很好", "place": str(tmp_path)})] * 40,
        preprocess={"function": "gate:stand"},
        cluster={"replicas": 1, "address": "local", "drain_grace_s": 1},
    )
    output = tmp_path / "out"

    waiting = cluster.begin("submit", job, "--wait", "--json")
    wait_until(lambda: any(output.glob("part-*")), waiting, lambda: cluster.b2batch("logs", job))
    view = json.loads(cluster.b2batch("status", job, "--json")[1])
    assert (view["job"]["state"], view["run"]["state"]) == ("running", "running")
    assert view["run"]["num_rows_planned"] == 40

    stopped = json.loads(cluster.b2batch("stop", job, "--json")[1])
    end, log = waiting.communicate(timeout=PATIENCE_S)
    assert (waiting.returncode, stopped["exit_code"]) == (75, 75), log
    first = {part.name: part.stat().st_mtime_ns for part in output.glob("part-*")}
    drained = json.loads(end)["run"]
    assert (drained["state"], drained["num_units_committed"]) == ("drained", len(first))
    assert "SIGTERM: stopping" in log
    assert cluster.b2batch("logs", job)[1] in log

    (tmp_path / "open").touch()
    code, said, told = cluster.b2batch("submit", job, "--wait")
    assert code == 0, told
    parts = {part.name: part.stat().st_mtime_ns for part in output.glob("part-*")}
    assert parts.items() >= first.items(), "what was committed was not made again"
    assert 0 < len(first) < len(parts) == 20
    jobs = json.loads(cluster.b2batch("list", "--json")[1])
    assert [job["state"] for job in jobs] == ["stopped", "succeeded"]
    assert jobs[1]["submission_id"] == f"{jobs[0]['submission_id']}-2"
    assert jobs[1]["submission_id"] in said


def test_without_the_token_nothing_is_done(cluster: RealCluster) -> None:
    code, _, told = cluster.b2batch("list", RAY_AUTH_MODE="disabled")

    assert code == 2
    assert "wants a token" in told or "does not take this token" in told
