"""Orders to the processes that send, all at once, and all of them over when their time is.

What the other side does, or the process, cannot reach the job: an order that did not come to an end in time
is an outcome like any other.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from b2batch.errors import SpecError
from b2batch.notify.order import Message, Order, Outcome
from b2batch.spec import WebhookSpec, resolve_env

DEADLINE_S = 15.0


def check_webhooks(webhooks: Sequence[WebhookSpec]) -> list[str]:
    """The services of the webhooks, once everything is seen to be there that telling them needs.

    Raises:
        SpecError: a package is missing, a URL's variable is not set, or the URL is of no known service.
    """
    if not webhooks:
        return []
    try:
        from b2batch.notify.sender import BadUrlError, service_name
    except ImportError as error:
        raise SpecError(f"notify needs {error.name}: pip install 'b2batch[notify]'") from error
    names = []
    for index, webhook in enumerate(webhooks):
        try:
            names.append(service_name(_url(webhook)))
        except (BadUrlError, SpecError) as error:
            what = error if isinstance(error, SpecError) else f"{webhook.url} {error}"
            raise SpecError(f"notify.{index}.url: {what}") from None
    return names


def deliver(messages: Sequence[tuple[WebhookSpec, Message]]) -> list[Outcome]:
    """Send each message to its webhook, all at once; whatever goes wrong on the way is an outcome.

    Takes DEADLINE_S at most, and what starting a process takes.
    """
    end_s = time.monotonic() + DEADLINE_S
    with contextlib.ExitStack() as started:
        senders = [
            started.enter_context(_Sender(Order(_url(webhook), webhook.allow_private, message)))
            for webhook, message in messages
        ]
        return [sender.outcome(end_s - time.monotonic()) for sender in senders]


def _url(webhook: WebhookSpec) -> str:
    return resolve_env(webhook.url).strip()


class _Sender:
    """One process that carries out an order; it does not outlive its context."""

    def __init__(self, order: Order) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "b2batch.notify.sender"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(os.environ, order.allow_private),
            start_new_session=True,  # a terminal's Ctrl-C is for the job
        )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(json.dumps(asdict(order)).encode())

    def outcome(self, wait_s: float) -> Outcome:
        """What became of the order, waiting at most so long."""
        try:
            self._process.wait(max(0.0, wait_s))
        except subprocess.TimeoutExpired:
            return Outcome(False, detail=f"no answer within {DEADLINE_S:g} s")
        assert self._process.stdout is not None
        try:
            return Outcome(**json.loads(self._process.stdout.read()))
        except ValueError:
            return Outcome(False, detail=f"its process ended with {self._process.returncode}")

    def __enter__(self) -> _Sender:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def _environment(environ: Mapping[str, str], allow_private: bool) -> dict[str, str]:
    """Without proxies where private addresses are not allowed: what a proxy reaches cannot be seen here."""
    return {
        name: value for name, value in environ.items() if allow_private or not name.lower().endswith("_proxy")
    }
