"""Messages on their way through real processes to a real server, and what is in their way."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import pytest

from b2batch.errors import SpecError
from b2batch.notify import delivery
from b2batch.notify.delivery import check_webhooks, deliver
from b2batch.notify.order import Message, Outcome
from b2batch.spec import WebhookSpec

from .webhook_server import WebhookServer

MESSAGE = Message("b2batch label: finished", "rows: 8 ok", "success", {"num_ok": 8})


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine takes long to start a process."""
    monkeypatch.setattr(delivery, "DEADLINE_S", 120.0)


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A webhook whose URL stands in the environment."""

    def make(url: str, **keys: Any) -> WebhookSpec:
        name = f"B2_HOOK_{len([name for name in os.environ if name.startswith('B2_HOOK_')])}"
        monkeypatch.setenv(name, url)
        return WebhookSpec(url=f"${{env:{name}}}", **keys)

    return make


def test_what_is_wrong_with_one_webhook_does_not_touch_another(server: WebhookServer, webhook: Any) -> None:
    hooks = [
        webhook(server.url("/hook"), allow_private=True),
        webhook(server.url("/500"), allow_private=True),
        webhook(server.url("/moved"), allow_private=True),
        webhook(server.url("/hook")),
        webhook(server.url("/hook", host="localhost")),
        webhook("http://169.254.169.254/latest/meta-data"),
    ]
    outcomes = deliver([(hook, MESSAGE) for hook in hooks])
    assert outcomes[0] == Outcome(True, "JSON")
    details = [outcome.detail for outcome in outcomes[1:]]
    assert details[:2] == ["HTTP 500", "HTTP 302 (redirects are not followed)"]
    assert "is not a public address" in details[2]
    assert "is not a public address" in details[3], "a name that resolves to this machine"
    assert details[4].startswith("169.254.169.254 is not a public address")
    assert sorted(path for path, _ in server.received) == ["/500", "/500", "/500", "/hook", "/moved"]
    (payload,) = [payload for path, payload in server.received if path == "/hook"]
    assert (payload["title"], payload["message"], payload["num_ok"]) == (MESSAGE.title, MESSAGE.body, 8)


def test_a_server_that_does_not_answer_costs_no_more_than_the_deadline(
    server: WebhookServer, webhook: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "DEADLINE_S", 2.5)
    hooks = [
        webhook(f"json://127.0.0.1:{server.port}/slow?rto=60", allow_private=True),
        webhook(server.url("/slow"), allow_private=True),
    ]
    started_s = time.monotonic()
    outcomes = deliver([(hook, MESSAGE) for hook in hooks])
    assert time.monotonic() - started_s < 30
    assert [outcome.detail for outcome in outcomes] == ["no answer within 2.5 s"] * 2


def test_a_proxy_of_the_environment_does_not_lead_around(
    server: WebhookServer, webhook: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, server.url(""))
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    (outcome,) = deliver([(webhook("http://169.254.169.254/hook"), MESSAGE)])
    assert not outcome.is_done
    assert server.received == []
    assert deliver([(webhook("http://bots.example/hook", allow_private=True), MESSAGE)])[0].is_done
    assert [path for path, _ in server.received] == ["http://bots.example/hook"]


def test_webhooks_are_checked_before_a_job_begins(webhook: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_webhooks([]) == []
    hooks = [webhook("https://bots.example/hook"), webhook("wecombot://ab-12")]
    assert check_webhooks(hooks) == ["JSON", "WeCom"]
    with pytest.raises(SpecError, match=r"notify\.1\.url: .* is not the URL of a webhook") as raised:
        check_webhooks([hooks[0], webhook("ftp://canary@bots.example")])
    assert "canary" not in str(raised.value)
    with pytest.raises(SpecError, match=r"notify\.0\.url: the environment variable B2_NONE"):
        check_webhooks([WebhookSpec(url="${env:B2_NONE}")])
    monkeypatch.delitem(sys.modules, "b2batch.notify.sender")
    monkeypatch.setitem(sys.modules, "apprise", None)
    with pytest.raises(SpecError, match=r"notify needs apprise: pip install 'b2batch\[notify\]'"):
        check_webhooks(hooks)
    assert check_webhooks([]) == []
