"""What a run says while it goes on: on a terminal, and in a log."""

from __future__ import annotations

import io

from rich.console import Console

from b2batch.cli.progress import LINE_INTERVAL_S, LineView, LiveView, open_view
from b2batch.logbook import JobProgress
from b2batch.telemetry import Progress


def progress(num_done: int, *, num_resumed: int = 0, num_starting: int = 0, num_lost: int = 0) -> JobProgress:
    """A job of 1,000 rows; every row has 20 generated tokens and every hundredth failed."""
    live = Progress(num_rows=num_done - num_resumed, num_generated_tokens=20 * (num_done - num_resumed))
    return JobProgress(
        num_rows=1000,
        num_rows_done=num_done,
        num_error_rows=num_done // 100,
        num_units=10,
        num_units_committed=num_done // 100,
        live=live,
        num_ready=2,
        num_starting=num_starting,
        num_lost=num_lost,
    )


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def lines_of(updates: list[tuple[float, JobProgress]]) -> list[str]:
    lines: list[str] = []
    clock = Clock()
    with LineView(lines.append, clock) as view:
        for clock.now_s, update in updates:
            view.update(update)
    return lines


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end() -> None:
    seconds = [float(s) for s in range(26)]

    lines = lines_of([(s, progress(int(s) * 10)) for s in seconds])

    assert [line.partition(" rows")[0] for line in lines] == ["100/1,000", "200/1,000", "250/1,000"]
    assert LINE_INTERVAL_S == 10


def test_a_line_tells_speed_time_left_replicas_and_errors() -> None:
    (line,) = lines_of([(0.0, progress(100)), (5.0, progress(200, num_starting=1, num_lost=3))])

    assert line == (
        "200/1,000 rows (20 %) · 20.0 rows/s · 400 tokens/s · ETA 0:40 · "
        "replicas 2 ready · 1 starting · 3 lost · errors 2"
    )


def test_rows_of_earlier_starts_are_done_but_no_speed() -> None:
    (line,) = lines_of([(0.0, progress(900, num_resumed=900)), (10.0 - 1e-3, progress(910, num_resumed=900))])

    assert line.startswith("910/1,000 rows (91 %) · 1.0 rows/s")


def test_nothing_is_said_of_a_run_that_had_nothing_to_do() -> None:
    assert lines_of([]) == []


def test_a_terminal_gets_a_bar_and_what_is_said_above_it() -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=160)

    with LiveView(console) as view:
        view.update(progress(500))
        view.say("[stopping]")

    assert "500/1000" in written.getvalue()
    assert "replicas 2 ready" in written.getvalue()
    assert "[stopping]" in written.getvalue()


def test_a_narrow_terminal_still_shows_the_rows() -> None:
    written = io.StringIO()

    with LiveView(Console(file=written, force_terminal=True, width=60)) as view:
        view.update(progress(500))

    assert "500/1000" in written.getvalue()


def test_the_view_fits_where_it_is_shown() -> None:
    assert isinstance(open_view(Console(file=io.StringIO(), force_terminal=True)), LiveView)
    assert isinstance(open_view(Console(file=io.StringIO())), LineView)
