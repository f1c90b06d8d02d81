"""Sends one message to one webhook, in a process of its own: ``python -m b2batch.notify.sender``.

The order comes on stdin and what became of it goes to stdout, so that no secret stands in a command line. A
process can be ended, whatever the other side does, and can be forbidden an address for good. apprise knows
the services; it tells neither status nor answer, which are therefore noted on the way.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import requests
from apprise import AppriseAsset, NotifyFormat, NotifyType, PersistentStoreMode
from apprise.logger import logger as apprise_logger
from apprise.plugins.base import NotifyBase
from apprise.plugins.custom_json import NotifyJSON
from apprise.plugins.dingtalk import NotifyDingTalk
from apprise.plugins.feishu import NotifyFeishu
from apprise.plugins.lark import NotifyLark
from apprise.plugins.slack import NotifySlack
from apprise.plugins.wecombot import NotifyWeComBot
from requests.adapters import HTTPAdapter
from tenacity import Retrying, retry_if_result, stop_after_attempt, wait_random_exponential

from b2batch.notify.address import Guard
from b2batch.notify.order import Message, Order, Outcome

TRIES = 3
_LONGEST_PAUSE_S = 2.0
_MEMORY_BYTES = 2 << 30  # more than that no answer can take
# By hand, since to ask apprise by a URL alone imports all of its hundred services.
_SERVICES: dict[str, tuple[str, type[NotifyBase]]] = {
    "json": ("JSON", NotifyJSON),
    "jsons": ("JSON", NotifyJSON),
    "slack": ("Slack", NotifySlack),
    "feishu": ("Feishu", NotifyFeishu),
    "lark": ("Lark", NotifyLark),
    "dingtalk": ("DingTalk", NotifyDingTalk),
    "wecombot": ("WeCom", NotifyWeComBot),
}
_SAY_NO_IN_A_200 = ("feishu", "lark", "dingtalk", "wecombot")
_PASSING = ("ConnectionError", "ConnectTimeout", "ReadTimeout", "ChunkedEncodingError")
# The URLs that two services show to be copied, and apprise does not know.
_SHOWN = (
    (re.compile(r"https://open\.feishu\.cn/open-apis/bot/v2/hook/([\w-]+)/?"), r"feishu://\1"),
    (re.compile(r"https://oapi\.dingtalk\.com/robot/send\?access_token=(\w+)"), r"dingtalk://\1"),
)


class BadUrlError(ValueError):
    """The URL is not of a webhook that is known here; the message does not repeat it."""


def carry_out(order: Order, guard: Guard) -> Outcome:
    """Send, trying again where that may help."""
    try:
        service = open_service(order.url)
    except BadUrlError as error:
        return Outcome(False, detail=str(error))
    tries = Retrying(
        retry=retry_if_result(lambda outcome: outcome.may_pass),
        stop=stop_after_attempt(TRIES),
        wait=wait_random_exponential(multiplier=0.5, max=_LONGEST_PAUSE_S),
        retry_error_callback=lambda state: state.outcome and state.outcome.result(),
    )
    outcome: Outcome = tries(_send, service, order.message, guard)
    return outcome


def service_name(url: str) -> str:
    """The service of a URL, for people.

    Raises:
        BadUrlError: it is none that is known here.
    """
    return _SERVICES[open_service(url).schema][0]


def open_service(url: str) -> NotifyBase:
    """apprise's service of a URL, as the service shows it or as apprise writes it.

    Raises:
        BadUrlError: it is none that is known here.
    """
    asset = AppriseAsset(http_redirects=False, storage_mode=PersistentStoreMode.MEMORY)
    with _silence():
        found = _parse(_shown_as_known(url)) or _parse(_plain_as_json(url))
        try:
            if found is not None:
                return _SERVICES[found["schema"]][1](**found, asset=asset)
        except (TypeError, ValueError):  # AppriseImproperlyConfigured is one; a part is missing, or malformed
            pass
    known = ", ".join(f"{schema}://" for schema in _SERVICES)
    raise BadUrlError(f"is not the URL of a webhook that is known here: https://, {known}")


@contextmanager
def _silence() -> Iterator[None]:
    """apprise says nothing: it would name tokens."""
    before, apprise_logger.disabled = apprise_logger.disabled, True
    try:
        yield
    finally:
        apprise_logger.disabled = before


def _parse(url: str) -> dict[str, Any] | None:
    """What apprise makes of a URL of its own, or as a service shows it."""
    for _, service in _SERVICES.values():
        found: dict[str, Any] | None = service.parse_native_url(url)
        if found is not None:
            return found
    schema = url.partition("://")[0].lower()
    return _SERVICES[schema][1].parse_url(url) if schema in _SERVICES else None


def _shown_as_known(url: str) -> str:
    for pattern, known in _SHOWN:
        match = pattern.fullmatch(url)
        if match is not None:
            return match.expand(known)
    return url


def _plain_as_json(url: str) -> str:
    """``https://HOST/PATH?a=b`` as apprise writes a POST of JSON to it; anything else as it is."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        return url
    query = urlencode([(f"-{name}", value) for name, value in parse_qsl(parts.query)], quote_via=quote)
    return parts._replace(scheme="jsons" if parts.scheme == "https" else "json", query=query).geturl()


def _send(service: NotifyBase, message: Message, guard: Guard) -> Outcome:
    if isinstance(service, NotifyJSON):
        service.payload_extras = {**message.facts, **service.payload_extras}
    _Witness.forget()
    requests.sessions.HTTPAdapter = _Witness
    with _silence():
        is_done = service.notify(
            title=message.title,
            body=message.body,
            notify_type=NotifyType(message.severity),
            body_format=NotifyFormat.TEXT,
        )
    name = _SERVICES[service.schema][0]
    if guard.refused:
        return Outcome(False, name, f"{guard.refused} is not a public address (see allow_private)")
    no = _refusal(_Witness.reply) if service.schema in _SAY_NO_IN_A_200 else ""
    if is_done and not no:
        return Outcome(True, name)
    return Outcome(False, name, no or _Witness.detail(), not no and _Witness.may_pass())


class _Witness(HTTPAdapter):  # type: ignore[misc]
    """Makes the requests of apprise, notes how the last one ended, and lets none be led elsewhere."""

    reply: requests.Response | None = None
    error = ""

    def send(self, *args: Any, **options: Any) -> requests.Response:
        """Make a request."""
        try:
            reply = super().send(*args, **options)
            _ = reply.content  # read here, so that its failure is noted too
        except Exception as error:
            _Witness.error = type(error).__name__  # its text names the URL
            raise
        reply.headers.pop("Location", None)
        _Witness.reply = reply
        return reply

    @classmethod
    def forget(cls) -> None:
        """Nothing was sent yet."""
        cls.reply, cls.error = None, ""

    @classmethod
    def detail(cls) -> str:
        """What the last request came to."""
        if cls.reply is None:
            return cls.error or "nothing was sent"
        moved = " (redirects are not followed)" if 300 <= cls.reply.status_code < 400 else ""
        return f"HTTP {cls.reply.status_code}{moved}"

    @classmethod
    def may_pass(cls) -> bool:
        """Whether the same request may do better a moment later."""
        if cls.reply is None:
            return cls.error in _PASSING
        status = int(cls.reply.status_code)
        return status == 429 or status >= 500


def _refusal(reply: requests.Response | None) -> str:
    """Why a service refused what it answered by 200; empty where it did not."""
    try:
        said = reply.json() if reply is not None else None
    except ValueError:
        return ""
    if not isinstance(said, dict):
        return ""
    code = said.get("errcode", said.get("code", said.get("StatusCode", 0)))
    words = str(said.get("errmsg", said.get("msg", "")))[:100]
    return f"refused by the service: {code} {words}".rstrip() if code else ""


def main() -> None:
    """Carry out the order on stdin."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    given = json.load(sys.stdin)
    order, guard = Order(**{**given, "message": Message(**given["message"])}), Guard()
    if not order.allow_private:
        guard.install()
    print(json.dumps(asdict(carry_out(order, guard))))


if __name__ == "__main__":
    main()
