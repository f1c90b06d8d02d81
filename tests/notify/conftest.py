from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("apprise")

from .webhook_server import WebhookServer, webhook_server


@pytest.fixture
def server() -> Iterator[WebhookServer]:
    with webhook_server() as running:
        yield running
