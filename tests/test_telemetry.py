import json
import logging

import pytest

from b2batch.telemetry import Progress, Rate, eta_s, setup_logging


def test_rate_is_that_of_the_window_not_of_all_time():
    rate = Rate(window_s=10.0)
    assert rate.per_s == 0.0
    for now_s in range(100):
        rate.add(now_s, 1000 + 5 * max(0, now_s - 50))
    assert rate.per_s == 5.0


@pytest.mark.parametrize(("remaining", "per_s", "expected"), [(0, 0.0, 0.0), (10, 0.0, None), (10, 4.0, 2.5)])
def test_eta(remaining, per_s, expected):
    assert eta_s(remaining, per_s) == expected


def test_progress_adds_up():
    assert Progress(1, 2, 3, 4, 5) + Progress(10, 20, 30, 40, 50) == Progress(11, 22, 33, 44, 55)


def test_json_log_lines_are_json_and_bound_to_the_package(capsys):
    setup_logging("INFO", json_lines=True)
    setup_logging("INFO", json_lines=True)  # twice is not double
    logging.getLogger("b2batch.job").info("committed 批 unit=%d", 3)
    logging.getLogger("b2batch.job").debug("not this")
    [line] = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert (entry["level"], entry["message"], entry["logger"]) == (
        "INFO",
        "committed 批 unit=3",
        "b2batch.job",
    )


def test_plain_log_lines_when_stderr_is_no_terminal(capsys):
    setup_logging()
    logging.getLogger("b2batch").warning("replica=1 lost")
    assert capsys.readouterr().err.rstrip().endswith("WARNING replica=1 lost")
