"""The systemd units: verified by systemd where it is there, and what they do with exit codes."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from b2batch.scheduling.manifest import Kind
from b2batch.ticks.cron import parse_cron

from .jobs import JOB, NASTY, rendered, with_arguments


def settings_of(unit: str) -> dict[str, str]:
    lines = (line.partition("=") for line in unit.splitlines() if line and line[0] not in "#[")
    return {name: value for name, _, value in lines}


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd")
def test_systemd_verifies_the_units(tmp_path: Path) -> None:
    directory = tmp_path / "100 % of it's"
    directory.mkdir()
    job = with_arguments(
        NASTY, directory=str(directory), program="/bin/true", cron=parse_cron("*/5 8-18 13 1 5")
    )
    for name, text in rendered(Kind.SYSTEMD, job).items():
        (tmp_path / name).write_text(text, encoding="utf-8")

    verified = subprocess.run(
        ["systemd-analyze", "verify", *map(str, sorted(tmp_path.glob("label-reviews.*")))],
        capture_output=True,
        text=True,
        check=False,
    )

    assert "label-reviews" not in verified.stderr, verified.stderr
    assert verified.returncode == 0


def test_service_is_restarted_only_where_that_can_help() -> None:
    service = settings_of(rendered(Kind.SYSTEMD, replace(JOB, drain_grace_s=120.0))["label-reviews.service"])

    assert service["Restart"] == "on-failure"
    assert service["RestartPreventExitStatus"] == "2 3 4"
    assert service["SuccessExitStatus"] == "99"
    assert service["KillMode"] == "mixed"
    assert int(service["TimeoutStopSec"]) > 120
    assert service["EnvironmentFile"] == "-/srv/labels/label-reviews.env"


def test_timer_has_the_time_zone_and_makes_up_for_a_missed_start() -> None:
    timer = settings_of(rendered(Kind.SYSTEMD)["label-reviews.timer"])

    assert timer["OnCalendar"] == "*-*-* 02:00:00 Etc/UTC"
    assert timer["Persistent"] == "true"
