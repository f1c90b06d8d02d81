"""Programs that stand in for b2batch: they note their arguments, and end as they are told."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path


def write_executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


def write_program(path: Path, code: int) -> Path:
    """Writes its arguments, a line each, into the working directory and ends with ``code``."""
    return write_executable(
        path, f'#!/bin/sh\nprintf "%s\\n" "$@" >arguments\necho "ended with {code}"\nexit {code}\n'
    )


def waiting_program(path: Path) -> tuple[Path, Callable[[], object]]:
    """Waits for SIGTERM or SIGUSR1, notes which and ends with 75; the function returns when it waits."""
    fifo = path.with_name("started")
    os.mkfifo(fifo)
    program = write_executable(
        path,
        f"""#!{sys.executable} -S
import pathlib, signal, sys

def stop(number, frame):
    pathlib.Path("signal").write_text(signal.Signals(number).name)
    sys.exit(75)

signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGUSR1, stop)
pathlib.Path({str(fifo)!r}).write_text("started")
while True:
    signal.pause()
""",
    )
    return program, fifo.read_text
