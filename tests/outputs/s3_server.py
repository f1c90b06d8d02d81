"""An S3 on this machine (moto's), behind a door that lets requests fail as networks and stores let them."""

from __future__ import annotations

import logging
import os
import random
import re
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any

import pytest
from botocore.retries.standard import ExponentialBackoff
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from b2batch.outputs import s3_store

Environ = dict[str, Any]


class Fault(Enum):
    """What happens to one request."""

    SLOW_DOWN = auto()  # 503, nothing was done
    ERROR_AFTER = auto()  # it was done, and 500 is said
    LOST_REPLY = auto()  # it was done, and the connection ends without a word
    CUT_BODY = auto()  # the connection ends within the reply's body
    CONFLICT = auto()  # 409: somebody is creating the same object
    DENIED = auto()  # 403
    EXPIRED = auto()  # 403: the credentials are no longer valid
    FULL = auto()  # 507


_REPLIES = {
    Fault.SLOW_DOWN: ("503 Slow Down", "SlowDown"),
    Fault.ERROR_AFTER: ("500 Internal Server Error", "InternalError"),
    Fault.CONFLICT: ("409 Conflict", "ConditionalRequestConflict"),
    Fault.DENIED: ("403 Forbidden", "AccessDenied"),
    Fault.EXPIRED: ("403 Forbidden", "ExpiredToken"),
    Fault.FULL: ("507 Insufficient Storage", "XMinioStorageFull"),
}


class S3Server:
    """``fault_of(method, path)`` says what a request suffers; ``ignores_conditions`` drops If-None-Match."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.endpoint = f"http://127.0.0.1:{self._server.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.calm()

    def calm(self) -> None:
        """Answer everything as it should be."""
        self.fault_of: Callable[[str, str], Fault | None] = lambda method, path: None
        self.ignores_conditions = False
        self.num_faults = 0

    def fail_next(self, fault: Fault, method: str, pattern: str = "", times: int = 1) -> None:
        """Let the next ``times`` requests of a method whose path matches suffer ``fault``."""
        left = iter(range(times))
        self.fault_of = lambda verb, path: (
            fault if verb == method and re.search(pattern, path) and next(left, None) is not None else None
        )

    def fail_some(self, share: float, seed: int, *faults: Fault) -> None:
        """Let a share of all requests suffer one of ``faults``, the same ones for the same seed."""
        drawn, lock = random.Random(seed), threading.Lock()

        def fault_of(method: str, path: str) -> Fault | None:
            with lock:
                return drawn.choice(faults) if drawn.random() < share else None

        self.fault_of = fault_of

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"].startswith("/moto-api"):
            return self._moto(environ, start_response)
        if self.ignores_conditions:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        fault = self.fault_of(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        if fault is None:
            return self._moto(environ, start_response)
        self.num_faults += 1
        if fault in (Fault.ERROR_AFTER, Fault.LOST_REPLY):
            list(self._moto(environ, lambda *args: lambda data: None))
        elif fault is not Fault.CUT_BODY:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if fault is Fault.LOST_REPLY:
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
        if fault is Fault.CUT_BODY:
            return self._cut(environ, start_response)
        status, code = _REPLIES[fault]
        body = f"<Error><Code>{code}</Code><Message>as asked for</Message></Error>".encode()
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    def _cut(self, environ: Environ, start_response: Any) -> Iterator[bytes]:
        body = b"".join(self._moto(environ, start_response))
        yield body[: len(body) // 2]
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """The server with a bucket named ``bucket``, in an environment where it is S3; retries do not wait."""
    server = S3Server()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": server.endpoint,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1",
        }.items():
            patch.setenv(name, value)
        patch.setattr(ExponentialBackoff, "delay_amount", lambda self, context: 0.0)
        patch.setattr(s3_store, "_pause", lambda attempt: None)
        s3_store._make_client.cache_clear()
        s3_store._make_client().create_bucket(Bucket="bucket")
        yield server
    s3_store._make_client.cache_clear()
    server.stop()
