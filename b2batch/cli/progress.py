"""A running job for eyes: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from b2batch.cli.printing import count, duration, share
from b2batch.telemetry import Rate, eta_s

if TYPE_CHECKING:
    from rich.console import Console

    from b2batch.logbook import JobProgress

LINE_INTERVAL_S = 10.0
_RATE_WINDOW_S = 30.0
_STDERR = 2


class ProgressView(Protocol):
    """Shows progress while its context is open; ``say`` writes a line beside it, safe in a signal handler."""

    def update(self, progress: JobProgress) -> None: ...  # noqa: D102
    def say(self, text: str) -> None: ...  # noqa: D102
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_view(console: Console) -> ProgressView:
    """The view that fits stderr, whose console is given."""
    return LiveView(console) if console.is_terminal else LineView(_write_stderr)


class Speed:
    """Rows and generated tokens a second over the last half minute, and the time that is left."""

    def __init__(self) -> None:
        self._rows = Rate(_RATE_WINDOW_S)
        self._tokens = Rate(_RATE_WINDOW_S)

    def describe(self, progress: JobProgress, now_s: float) -> str:
        """Take in how far the job is at ``now_s`` and say it without the row count."""
        self._rows.add(now_s, progress.live.num_rows)
        self._tokens.add(now_s, progress.live.num_generated_tokens)
        left_s = eta_s(progress.num_rows - progress.num_rows_done, self._rows.per_s)
        parts = [
            f"{self._rows.per_s:.1f} rows/s",
            f"{self._tokens.per_s:.0f} tokens/s",
            f"ETA {'?' if left_s is None else duration(left_s)}",
            f"replicas {progress.num_ready} ready",
        ]
        if progress.num_starting:
            parts.append(f"{progress.num_starting} starting")
        if progress.num_lost:
            parts.append(f"{progress.num_lost} lost")
        return " · ".join([*parts, f"errors {count(progress.num_error_rows)}"])


class LineView:
    """A line every 10 s and one at the end, for logs."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._speed = Speed()
        self._next_s = clock() + LINE_INTERVAL_S
        self._last = ""

    def update(self, progress: JobProgress) -> None:
        """Write a line when one is due."""
        now_s = self._clock()
        done = f"{count(progress.num_rows_done)}/{count(progress.num_rows)} rows"
        percent = share(progress.num_rows_done, progress.num_rows)
        self._last = f"{done} ({percent}) · {self._speed.describe(progress, now_s)}"
        if now_s >= self._next_s:
            self._next_s = now_s + LINE_INTERVAL_S
            self._flush()

    def say(self, text: str) -> None:
        """Write ``text`` on a line of its own."""
        self._write(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()

    def _flush(self) -> None:
        if self._last:
            self._write(self._last)
            self._last = ""


class LiveView:
    """A bar that stays at the foot of the terminal; the log goes on above it."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
        from rich.table import Column

        rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # a narrow terminal cuts this, not the rows
        details = TextColumn("{task.fields[details]}", table_column=rest)
        columns = (SpinnerColumn(), BarColumn(20), MofNCompleteColumn(), details)
        self._bar = Progress(*columns, console=console, transient=True, expand=True)
        self._console = console
        self._speed = Speed()
        self._row_task: Any = self._bar.add_task("rows", total=None, details="planning and starting")

    def update(self, progress: JobProgress) -> None:
        """Move the bar."""
        details = self._speed.describe(progress, time.monotonic())
        self._bar.update(
            self._row_task, completed=progress.num_rows_done, total=progress.num_rows, details=details
        )

    def say(self, text: str) -> None:
        """Write ``text`` above the bar."""
        self._console.print(text, markup=False, highlight=False)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def _write_stderr(text: str) -> None:
    # Not through sys.stderr: a signal handler may interrupt a write to it, which must not be entered again.
    os.write(_STDERR, f"{text}\n".encode())
