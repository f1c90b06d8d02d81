"""A replica's turn to load its model: of those on one node only so many load at once as its memory bears."""

from __future__ import annotations

import logging
import os
import stat
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

_MAX_LOADS = 32  # of one node at once, however small the model
_SHARE = 0.8  # of the node's memory that loads may take
_POLL_S = 0.2


class LoadTurn:
    """A context that waits for one of the node's places to load, which all jobs of the user share.

    A place is a locked file, so it is free again when its process ends, however it does. Where no file
    can be locked, everybody loads at once.
    """

    def __init__(self, load_bytes: int, directory: Path | None = None, node_bytes: int | None = None) -> None:
        """``load_bytes``: memory that one load takes. ``node_bytes``: what the node has; None: ask it."""
        self._directory = directory or Path(tempfile.gettempdir(), f"b2batch-{os.getuid()}")
        self._num_places = num_loads(load_bytes, node_bytes or psutil.virtual_memory().total)
        self._place: FileLock | None = None

    def __enter__(self) -> Self:
        try:
            _make_private(self._directory)
            while self._place is None:
                self._place = self._free_place()
                if self._place is None:
                    time.sleep(_POLL_S)  # a lock tells nobody that it is free
        except (OSError, NotImplementedError) as error:
            logger.warning("all replicas of this node load at once: %s", error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._place is not None:
            self._place.release()
            self._place = None

    def _free_place(self) -> FileLock | None:
        for number in range(self._num_places):
            place = FileLock(self._directory / f"load-{number}.lock")
            try:
                return place.acquire(timeout=0).lock
            except Timeout:
                continue
        return None


def num_loads(load_bytes: int, node_bytes: int) -> int:
    """How many replicas may load at once on a node of this memory: at least one."""
    return max(1, min(_MAX_LOADS, int(_SHARE * node_bytes) // max(1, load_bytes)))


def _make_private(directory: Path) -> None:
    """OSError where the directory is somebody else's, who could have laid links in it."""
    directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{directory} is not this user's own directory")
