"""What each service is sent, and what is made of its answers; the network is a stand-in."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import requests

from b2batch.notify import sender
from b2batch.notify.address import Guard
from b2batch.notify.order import Message, Order, Outcome

MESSAGE = Message("b2batch label: finished", "rows: 8 ok", "success", {"job": "label", "num_ok": 8})
TEXT = f"{MESSAGE.title}\n{MESSAGE.body}"
SLACK = "T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7"


class Network:
    """Keeps the requests; answers each with the next of ``answers``, else with 200 and ``{}``."""

    def __init__(self) -> None:
        self.requests: list[requests.PreparedRequest] = []
        self.answers: list[int | Exception] = []
        self.body = b"{}"

    def send(self, adapter: Any, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if self.answers else 200
        if isinstance(answer, Exception):
            raise answer
        reply = requests.Response()
        is_slack = str(request.url).startswith("https://hooks.slack.com")
        reply.status_code, reply._content = answer, b"ok" if is_slack else self.body
        reply.request, reply.url = request, str(request.url)
        reply.headers["Location"] = "http://169.254.169.254/latest/meta-data"
        return reply

    @property
    def payload(self) -> Any:
        (request,) = self.requests
        assert request.body is not None
        return json.loads(request.body)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    found = Network()
    monkeypatch.setattr(requests.sessions, "HTTPAdapter", requests.sessions.HTTPAdapter)  # put back after
    monkeypatch.setattr(
        requests.adapters.HTTPAdapter, "send", lambda self, request, **o: found.send(self, request, **o)
    )
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    return found


def tell(url: str) -> Outcome:
    return sender.carry_out(Order(url, False, MESSAGE), Guard())


def _lines(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize(
    ("url", "service", "place", "text_of"),
    [
        (f"https://hooks.slack.com/services/{SLACK}", "Slack", f"https://hooks.slack.com/services/{SLACK}",
         lambda sent: f"{sent['attachments'][0]['title']}\n{sent['attachments'][0]['text']}"),
        (f"slack://{SLACK}", "Slack", f"https://hooks.slack.com/services/{SLACK}",
         lambda sent: f"{sent['attachments'][0]['title']}\n{sent['attachments'][0]['text']}"),
        ("https://open.feishu.cn/open-apis/bot/v2/hook/ab-12", "Feishu",
         "https://open.feishu.cn/open-apis/bot/v2/hook/ab-12/", lambda sent: sent["content"]["text"]),
        ("feishu://ab-12", "Feishu", "https://open.feishu.cn/open-apis/bot/v2/hook/ab-12/",
         lambda sent: sent["content"]["text"]),
        ("https://open.larksuite.com/open-apis/bot/v2/hook/ab-12", "Lark",
         "https://open.larksuite.com/open-apis/bot/v2/hook/ab-12", lambda sent: sent["content"]["text"]),
        ("https://oapi.dingtalk.com/robot/send?access_token=ab12", "DingTalk",
         "https://oapi.dingtalk.com/robot/send?access_token=ab12", lambda sent: sent["text"]["content"]),
        ("dingtalk://SEC99@ab12", "DingTalk", "https://oapi.dingtalk.com/robot/send?access_token=ab12&timestamp=",
         lambda sent: sent["text"]["content"]),
        ("https://qyapi.weixin.qq.com/cgi-bin/webhook/send?key=ab-12", "WeCom",
         "https://qyapi.weixin.qq.com/cgi-bin/webhook/send?key=ab-12", lambda sent: sent["text"]["content"]),
        ("wecombot://ab-12", "WeCom", "https://qyapi.weixin.qq.com/cgi-bin/webhook/send?key=ab-12",
         lambda sent: sent["text"]["content"]),
        ("https://bots.example:8443/hook?token=a%20b", "JSON", "https://bots.example:8443/hook?token=a+b",
         lambda sent: f"{sent['title']}\n{sent['message']}"),
        ("jsons://bots.example/hook", "JSON", "https://bots.example/hook",
         lambda sent: f"{sent['title']}\n{sent['message']}"),
    ],
)  # fmt: skip
def test_each_service_is_sent_what_it_wants(
    network: Network, url: str, service: str, place: str, text_of: Callable[[Any], str]
) -> None:
    assert tell(url) == Outcome(True, service)
    assert str(network.requests[0].url).startswith(place)
    assert _lines(text_of(network.payload)) == TEXT
    assert sender.service_name(url) == service
    assert len(network.requests) == 1, "looked at without sending"


def test_programs_are_sent_the_figures(network: Network) -> None:
    tell("https://bots.example/hook")
    assert network.payload["type"] == "success"
    assert (network.payload["job"], network.payload["num_ok"]) == ("label", 8)


@pytest.mark.parametrize(
    "url",
    ["", "token", "mailto://user:canary@example.com", "discord://1234/canary", "https://",
     "syslog://", "file:///etc/canary", "slack://canary", "wecombot://"],
)  # fmt: skip
def test_what_is_no_known_webhook_is_told_without_repeating_it(
    network: Network, caplog: pytest.LogCaptureFixture, url: str
) -> None:
    outcome = tell(url)
    assert not outcome.is_done
    assert "not the URL of a webhook" in outcome.detail
    assert "canary" not in outcome.detail + caplog.text
    assert network.requests == []


@pytest.mark.parametrize(
    "passing", [500, 503, 429, requests.ConnectTimeout("x"), requests.ConnectionError("x")]
)
def test_what_may_pass_is_tried_again(network: Network, passing: int | Exception) -> None:
    network.answers = [passing, passing]
    assert tell("https://bots.example/hook") == Outcome(True, "JSON")
    assert len(network.requests) == 3


def test_tries_are_bounded(network: Network) -> None:
    network.answers = [500] * 9
    outcome = tell("https://bots.example/hook")
    assert (outcome.is_done, outcome.detail) == (False, "HTTP 500")
    assert len(network.requests) == sender.TRIES


@pytest.mark.parametrize("status", [301, 302, 307, 308, 400, 401, 404])
@pytest.mark.parametrize(
    "url", ["https://bots.example/hook", "json://bots.example/hook?redirect=yes", "feishu://ab"]
)
def test_what_stays_is_not_tried_again_and_no_redirect_is_followed(
    network: Network, url: str, status: int
) -> None:
    network.answers = [status]
    outcome = tell(url)
    assert not outcome.is_done
    assert outcome.detail.startswith(f"HTTP {status}")
    assert ("redirects" in outcome.detail) == (status < 400)
    assert len(network.requests) == 1


def test_an_error_of_the_network_is_named_without_the_url(network: Network) -> None:
    network.answers = [requests.exceptions.SSLError("https://bots.example/canary")] * 3
    assert tell("https://bots.example/canary").detail == "SSLError"


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("dingtalk://ab12", {"errcode": 310000, "errmsg": "keywords not in content"}),
        ("wecombot://ab-12", {"errcode": 93000, "errmsg": "invalid webhook url"}),
        ("feishu://ab-12", {"code": 19001, "msg": "param invalid"}),
    ],
)
def test_a_200_that_says_no_is_no(network: Network, url: str, body: dict[str, Any]) -> None:
    network.body = json.dumps(body).encode()
    outcome = tell(url)
    assert not outcome.is_done
    for word in map(str, body.values()):
        assert word in outcome.detail
    network.body = json.dumps({**body, next(iter(body)): 0}).encode()
    assert tell(url).is_done
