"""``doctor`` on open Ray ports, against a small server that answers as a dashboard does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from b2batch import doctor, exposure
from b2batch.cluster import placement
from b2batch.doctor import Check, Verdict

TOKEN = "Bearer right"


class Dashboard(BaseHTTPRequestHandler):
    """Lists its jobs to whoever has the token, or to everybody where it asks for none."""

    asks_for_token = False

    def do_GET(self) -> None:
        is_denied = self.asks_for_token and self.headers.get("Authorization") != TOKEN
        self.send_response(401 if is_denied else 200 if self.path == "/api/jobs/" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Its ``host:port``; no other cluster is known."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(placement, "address_of_ray_start", lambda: None)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    server = HTTPServer(("127.0.0.1", 0), Dashboard)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    place = f"127.0.0.1:{server.server_port}"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://{place}")
    yield place
    server.shutdown()
    server.server_close()


def exposed() -> Check:
    return next(check for check in doctor.examine() if check.name == "exposure")


@pytest.fixture(autouse=True)
def _only_exposure(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_packages", "_torch", "_ray", "_cluster"):
        monkeypatch.setattr(doctor, name, lambda: Check("skipped", Verdict.OK, ""))


def test_a_dashboard_that_asks_for_a_token_is_fine(dashboard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dashboard, "asks_for_token", True)
    assert exposed().verdict is Verdict.OK


def test_an_open_dashboard_of_this_machine_is_a_warning(dashboard: str) -> None:
    found = exposed()
    assert found.verdict is Verdict.WARN
    assert dashboard in found.detail
    assert "RAY_AUTH_MODE=token" in found.detail


def test_an_open_dashboard_that_others_reach_is_a_failure(
    dashboard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exposure, "is_loopback", lambda host: False)
    found = exposed()
    assert found.verdict is Verdict.FAIL
    assert dashboard in found.detail


def test_a_head_that_others_reach_is_a_warning_unless_tokens_are_on(
    dashboard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Dashboard, "asks_for_token", True)
    monkeypatch.setattr(exposure, "is_loopback", lambda host: False)
    monkeypatch.setenv("RAY_ADDRESS", dashboard)
    assert exposed().verdict is Verdict.WARN
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert exposed().verdict is Verdict.OK


def test_nobody_there_is_fine(dashboard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert exposed().verdict is Verdict.OK


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("10.0.0.1", False),
        ("8.8.8.8", False),
        ("0.0.0.0", False),
        ("head.example", False),
    ],
)
def test_what_only_this_machine_reaches(host: str, local: bool) -> None:
    assert exposure.is_loopback(host) is local


def test_where_a_dashboard_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(exposure, "own_address", lambda: "10.1.2.3")
    assert exposure.dashboard_urls("ray://head.example:10001") == [
        "http://head.example:8265",
        "http://127.0.0.1:8265",
        "http://10.1.2.3:8265",
    ]
