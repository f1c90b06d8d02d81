"""``b2batch run`` in a process of its own, to be killed, stopped and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class DriverProcess:
    """One start of a driver; ``log`` gets what it says."""

    def __init__(self, scratch: Path, job: Path, environment: Mapping[str, str], *arguments: str) -> None:
        self.started_s = time.monotonic()
        self.log = scratch / f"driver-{time.time_ns()}.log"
        command = [
            sys.executable,
            "-m",
            "b2batch.bench.fault_driver",
            str(scratch),
            "run",
            str(job),
            *arguments,
        ]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, env=dict(environment), stdout=log, stderr=log)
        self.is_stopped = False

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative after a signal."""
        return self._process.poll()

    def wait(self, timeout_s: float) -> int | None:
        """Its exit code, or None when it has none after ``timeout_s``."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def send(self, number: signal.Signals) -> None:
        """Nothing happens to one that has ended."""
        self._process.send_signal(number)
        self.is_stopped = number is signal.SIGSTOP

    def end(self) -> None:
        """kill -9, if it is still there."""
        self._process.kill()
        self._process.wait()

    def rss_bytes(self) -> int:
        """Resident memory now; 0 once it has ended."""
        try:
            pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        except (OSError, IndexError):
            return 0
        return int(pages) * _PAGE_BYTES

    def tail(self, num_chars: int = 2000) -> str:
        """The end of what it said."""
        return self.log.read_text(errors="replace")[-num_chars:]
