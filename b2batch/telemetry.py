"""Counters, rates and the log: how a running job tells where it is. No clock is read here but the log's."""

from __future__ import annotations

import json
import logging
import sys
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from b2batch.spec import mask_env

if TYPE_CHECKING:
    from rich.console import Console

LOGGER_NAME = "b2batch"


@dataclass(frozen=True, slots=True)
class Progress:
    """What a replica has done since it started; ``num_running`` is how many sequences run now.

    Rows count when they are answered, before their unit is committed: good for rates, not for the
    account, which is the sum of ``UnitCounts``.
    """

    num_rows: int = 0
    num_error_rows: int = 0
    num_input_tokens: int = 0
    num_generated_tokens: int = 0
    num_running: int = 0
    num_reused_rows: int = 0  # answered by the answer to an identical request
    num_out_of_memory: int = 0  # steps that ran out of memory and were made again with half the batch

    def __add__(self, other: Progress) -> Progress:
        return Progress(
            self.num_rows + other.num_rows,
            self.num_error_rows + other.num_error_rows,
            self.num_input_tokens + other.num_input_tokens,
            self.num_generated_tokens + other.num_generated_tokens,
            self.num_running + other.num_running,
            self.num_reused_rows + other.num_reused_rows,
            self.num_out_of_memory + other.num_out_of_memory,
        )

    def __sub__(self, other: Progress) -> Progress:
        return Progress(
            self.num_rows - other.num_rows,
            self.num_error_rows - other.num_error_rows,
            self.num_input_tokens - other.num_input_tokens,
            self.num_generated_tokens - other.num_generated_tokens,
            self.num_running - other.num_running,
            self.num_reused_rows - other.num_reused_rows,
            self.num_out_of_memory - other.num_out_of_memory,
        )


class Rate:
    """Growth of a counter per second over the last ``window_s`` seconds."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._points: deque[tuple[float, float]] = deque()

    def add(self, now_s: float, total: float) -> None:
        """Note the counter's value; calls come with growing ``now_s``."""
        self._points.append((now_s, total))
        # One point older than the window stays: the window's left edge.
        while len(self._points) > 2 and self._points[1][0] <= now_s - self._window_s:
            self._points.popleft()

    @property
    def per_s(self) -> float:
        """The rate at the last point; 0.0 while there are fewer than two."""
        if len(self._points) < 2:
            return 0.0
        (first_s, first), (last_s, last) = self._points[0], self._points[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0


def eta_s(remaining: float, per_s: float) -> float | None:
    """Seconds until ``remaining`` is done at ``per_s``; None while nothing moves."""
    if remaining <= 0:
        return 0.0
    return remaining / per_s if per_s > 0 else None


class _JsonFormatter(logging.Formatter):
    """One JSON object a line, for log collectors."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class _HideSecrets(logging.Filter):
    """Turns what the environment put into a path or URI back into ``${env:NAME}``."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = mask_env(record.getMessage()), None
        return True


def setup_logging(
    level: int | str = logging.INFO, *, json_lines: bool = False, console: Console | None = None
) -> None:
    """Send the log of ``b2batch`` to stderr: coloured on a terminal, plain or JSON lines otherwise.

    ``console`` is the one that a live display on stderr uses: lines then go above it. Other
    libraries' loggers are left as they are. Calling it again replaces the earlier set-up.
    """
    logger = logging.getLogger(LOGGER_NAME)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    handler = _make_handler(json_lines, console)
    handler.addFilter(_HideSecrets())
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


def _make_handler(json_lines: bool, console: Console | None) -> logging.Handler:
    if not json_lines and sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        return RichHandler(console=console or Console(stderr=True), show_path=False, log_time_format="[%X]")
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S%z")
    handler.setFormatter(_JsonFormatter() if json_lines else plain)
    return handler
