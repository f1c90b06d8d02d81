"""One download of a model at a time: who comes later finds it in the cache."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

_AT_ONCE_S = 0.5


@contextmanager
def only_download(cache: Path, name: str) -> Iterator[None]:
    """Wait until no other process, of any node that shares ``cache``, downloads the model ``name``.

    The lock is a file in the cache, free again when its process ends, however it does. A cache that
    cannot be written or locked is used without.
    """
    lock = FileLock(cache / ".locks" / f"b2batch--{re.sub(r'[^A-Za-z0-9._-]', '--', name)}.lock")
    try:
        _acquire(lock, name)
    except (OSError, NotImplementedError) as error:
        logger.debug("%s: downloads are not locked: %s", name, error)
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, name: str) -> None:
    Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=_AT_ONCE_S)
    except Timeout:
        logger.info("%s: another process downloads it; waiting", name)
        lock.acquire()
