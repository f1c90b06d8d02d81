"""``run --tick`` as a user types it, where nothing is to be computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from b2batch.cli.run import _gravest
from b2batch.errors import B2BatchError, ErrorBudgetExceeded, InputError, NothingToDo

from .command import b2batch

JOB = """
model: {{model: baichuan2-tiny}}
prompt: {{column: text}}
sampling: {{max_tokens: 4}}
input: {{path: '{path}', incremental: true}}
output: {{path: '{output}'}}
{schedule}
"""
DAILY = 'schedule: {cron: "0 2 * * *"}'


def write_job(directory: Path, schedule: str = DAILY, path: str = "in", output: str = "out") -> Path:
    job = directory / "job.yaml"
    (directory / "in").mkdir()
    job.write_text(JOB.format(path=directory / path, output=directory / output, schedule=schedule))
    return job


def test_nothing_to_do_ends_with_99(tmp_path: Path) -> None:
    job = write_job(tmp_path)

    ended = b2batch("run", job, "--tick", "auto", "--json")

    assert ended.exit_code == 99
    assert json.loads(ended.stdout)["exit_code"] == 99
    assert not (tmp_path / "out").exists()
    assert b2batch("run", job).exit_code == 99


@pytest.mark.parametrize(
    ("schedule", "tick", "message"),
    [
        (DAILY, "2026-11-23", "no tick of schedule.cron"),
        (DAILY, "tomorrow", "expected auto, or an instant"),
        ("", "auto", "no schedule.cron"),
        ("schedule: {catchup: all}", "auto", "without cron no tick can be missed"),
        ('schedule: {cron: "0 2 * *"}', "auto", "five are needed"),
        ('schedule: {cron: "0 2 * * *", timezone: Mars}', "auto", "none that is known"),
    ],
)
def test_what_is_no_tick_is_refused(tmp_path: Path, schedule: str, tick: str, message: str) -> None:
    ended = b2batch("run", write_job(tmp_path, schedule), "--tick", tick)

    assert ended.exit_code == 2
    assert message in ended.output


def test_paths_of_ticks_need_one(tmp_path: Path) -> None:
    ended = b2batch("run", write_job(tmp_path, path="in/{{ tick.date }}"))

    assert ended.exit_code == 2
    assert "--tick says which" in ended.output


def test_verbs_that_look_take_the_tick_that_is_due(tmp_path: Path) -> None:
    job = write_job(tmp_path, output="out/{{ tick.date }}")
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "好"}\n')

    plan = b2batch("plan", job, "--json")

    assert plan.exit_code == 0, plan.output
    assert json.loads(plan.stdout)["output"].startswith(f"{tmp_path}/out/20")
    assert b2batch("validate", job).exit_code == 0


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([None], None),
        ([NothingToDo(), NothingToDo()], NothingToDo),
        ([NothingToDo(), None], None),
        ([InputError(), None, NothingToDo()], InputError),
        ([ErrorBudgetExceeded(), NothingToDo(), None], ErrorBudgetExceeded),
    ],
)
def test_several_ticks_end_as_the_gravest(
    errors: list[B2BatchError | None], expected: type[B2BatchError] | None
) -> None:
    gravest = _gravest(errors)

    assert gravest is None if expected is None else isinstance(gravest, expected)
