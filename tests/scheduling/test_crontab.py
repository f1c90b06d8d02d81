"""The crontab's line, run by sh as cron would."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from b2batch.scheduling.manifest import Kind

from .jobs import NASTY, rendered, with_arguments
from .programs import write_executable, write_program


def run_line(directory: Path, program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    job = with_arguments(arguments, directory=str(directory), program=str(program))
    line = rendered(Kind.CRON, job)["label-reviews.crontab"].splitlines()[-1]
    command = line.removeprefix("0 2 * * * ").replace("\\%", "%")
    return subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, env={}, check=False)


@pytest.mark.parametrize("code", [0, 99])
def test_nothing_is_mailed_of_success_and_of_a_run_that_gave_way(tmp_path: Path, code: int) -> None:
    ended = run_line(tmp_path, write_program(tmp_path / "b2batch", code), "job.yaml")

    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert (tmp_path / "label-reviews.log").read_text() == f"ended with {code}\n"


@pytest.mark.parametrize("code", [1, 2, 75])
def test_failure_is_mailed(tmp_path: Path, code: int) -> None:
    ended = run_line(tmp_path, write_program(tmp_path / "b2batch", code), "job.yaml")

    assert ended.stdout == "label-reviews failed; see label-reviews.log\n"


def test_words_come_through_and_the_environment_is_read(tmp_path: Path) -> None:
    directory = tmp_path / "where it's 100 %"
    program = write_executable(
        directory / "b2batch", '#!/bin/sh\nprintf "%s\\n" "$@" >arguments; echo "$BUCKET"\n'
    )
    (directory / "label-reviews.env").write_text("BUCKET='s3://a b'\n")

    ended = run_line(directory, program, "job.yaml", *NASTY)

    assert (ended.stdout, ended.stderr) == ("", "")
    assert (directory / "arguments").read_text(encoding="utf-8").splitlines() == ["run", "job.yaml", *NASTY]
    assert (directory / "label-reviews.log").read_text() == "s3://a b\n"
