"""Whether a dashboard can be used, before anything is sent: against a small server that answers as one."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from typing import ClassVar

import pytest

from b2batch.cluster import dashboard
from b2batch.cluster.dashboard import Dashboard, find_dashboard
from b2batch.cluster.submission import JobState, Unreachable
from b2batch.errors import CallerError, ClusterError

TOKEN = "Bearer right"


class Head(BaseHTTPRequestHandler):
    """A dashboard. ``replies``: path → status and document."""

    replies: ClassVar[dict[str, tuple[int, object]]] = {}
    asked: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers.get("Authorization")))
        status, document = self.replies.get(self.path, (404, "not found"))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(document).encode())

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def details(**fields: object) -> dict[str, object]:
    return {"type": "SUBMISSION", "entrypoint": "x", "metadata": {"b2batch_output": "/out"}, **fields}


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Its ``host:port``; no other cluster is known."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(dashboard, "address_of_ray_start", lambda: None)
    monkeypatch.setattr(Head, "replies", {"/api/version": (200, {"ray_version": version("ray")})})
    monkeypatch.setattr(Head, "asked", [])
    server = HTTPServer(("127.0.0.1", 0), Head)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_an_address_is_a_url_or_a_place(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_dashboard(f"http://{head}/") == f"http://{head}"
    assert find_dashboard(head) == f"http://{head}"
    monkeypatch.setenv("RAY_ADDRESS", "ray://other:10001")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://{head}")
    assert find_dashboard(None) == f"http://{head}"


def test_an_address_that_is_given_wins_over_the_environment(
    head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setitem(Head.replies, "/api/jobs/", (200, []))

    assert Dashboard(find_dashboard(head)).jobs() == []


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "head:http", ":8265", None])
def test_what_is_no_address_is_refused(head: str, address: str | None) -> None:
    with pytest.raises(CallerError, match="http://HOST:8265"):
        find_dashboard(address)


def test_nobody_there_may_be_there_later() -> None:
    place = f"127.0.0.1:{closed_port()}"

    with pytest.raises(ClusterError, match="Connection refused"):
        find_dashboard(place)
    with pytest.raises(Unreachable, match=f"http://{place} does not answer: Connection refused$"):
        Dashboard(f"http://{place}")


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ((200, {"ray_version": "2.9.0"}), "Ray 2.9.0 runs there, and b2batch needs ray>="),
        ((200, {"hello": 1}), "no dashboard of Ray"),
        ((200, []), "no dashboard of Ray"),
        ((404, "?"), "no dashboard of Ray"),
        ((401, "?"), "wants a token: set RAY_AUTH_MODE=token"),
        ((403, "?"), "does not take this token"),
    ],
)
def test_what_answers_and_cannot_be_used_is_refused(
    head: str, monkeypatch: pytest.MonkeyPatch, reply: tuple[int, object], reason: str
) -> None:
    monkeypatch.setitem(Head.replies, "/api/version", reply)

    with pytest.raises(CallerError, match=reason) as refused:
        Dashboard(f"http://{head}")

    assert "\n" not in str(refused.value)


def test_jobs_are_b2batchs_with_their_real_ends(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [
        details(submission_id="b", status="FAILED", driver_exit_code=75, start_time=2_000, end_time=3_000),
        details(submission_id="a", status="SUCCEEDED", driver_exit_code=0, start_time=1_000),
        details(submission_id="strange", status="RUNNING", metadata={}),
        details(submission_id="c", status="PENDING", start_time=4_000),
        details(
            submission_id="k",
            status="RUNNING",
            start_time=5_000,
            metadata=None,
            entrypoint="cd /x && b2batch run y",
        ),
    ]
    monkeypatch.setitem(Head.replies, "/api/jobs/", (200, jobs))

    found = Dashboard(f"http://{head}").jobs()

    assert [(job.submission_id, job.state, job.exit_code) for job in found] == [
        ("a", JobState.SUCCEEDED, 0),
        ("b", JobState.STOPPED, 75),
        ("c", JobState.PENDING, None),
        ("k", JobState.RUNNING, None),
    ]
    assert (found[1].started, found[1].ended) == ("1970-01-01T00:00:02+00:00", "1970-01-01T00:00:03+00:00")


def test_a_job_that_is_not_there_is_the_callers_error(head: str) -> None:
    cluster = Dashboard(f"http://{head}")

    for ask in (cluster.job, cluster.logs, cluster.stop):
        with pytest.raises(CallerError, match="there is no job x"):
            ask("x")


def test_what_the_cluster_fails_at_can_be_tried_again(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Head.replies, "/api/jobs/x", (500, "broken"))

    with pytest.raises(ClusterError, match=r"refused: .*broken"):
        Dashboard(f"http://{head}").job("x")


def test_the_cluster_that_ray_start_left_here_is_found(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "address_of_ray_start", lambda: head)

    assert find_dashboard(None) == f"http://{head}"
