"""Ids of submissions, and how the end of a job becomes an exit code; no cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_jobs import FakeJobs
from hypothesis import given
from hypothesis import strategies as st

from b2batch.cluster.submission import (
    JobState,
    SubmittedJob,
    Unreachable,
    attempts,
    check_unused,
    end_line,
    exit_code_of,
    explain_end,
    next_id,
    output_of,
    submission_base,
    wait,
)
from b2batch.errors import CallerError, ClusterError, RunLocked
from b2batch.spec import JobSpec, parse_spec

BASE = "label-0a1b2c3d"


def job_spec(**sections: object) -> JobSpec:
    return parse_spec(
        {
            "name": "label",
            "model": {"model": "owner/name"},
            "input": {"path": "rows.jsonl"},
            "prompt": {"column": "text"},
            "output": {"path": "out"},
            **sections,
        }
    )


def ended(submission_id: str, state: JobState = JobState.FAILED) -> SubmittedJob:
    return SubmittedJob(submission_id, state, "/out")


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def test_the_same_job_has_the_same_id() -> None:
    base = submission_base(job_spec())

    assert base == submission_base(job_spec(cluster={"replicas": 3}, errors={"max_error_rate": 0.5}))
    others = [
        submission_base(job_spec(output={"path": "elsewhere"})),
        submission_base(job_spec(input={"path": "other.jsonl"})),
        submission_base(job_spec(sampling={"max_tokens": 7})),
        submission_base(job_spec(), "auto"),
        submission_base(job_spec(), "2026-11-23T02:00"),
    ]
    assert len({base, *others}) == 6
    assert base.startswith("label-")


def test_a_relative_path_is_this_directorys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = submission_base(job_spec())
    monkeypatch.chdir(tmp_path)

    assert submission_base(job_spec()) != here


@given(
    st.lists(st.integers(1, 30), unique=True), st.lists(st.sampled_from(["other-1", BASE + "x", BASE + "-x"]))
)
def test_the_next_id_is_a_new_one(numbers: list[int], strangers: list[str]) -> None:
    known = [ended(BASE if number == 1 else f"{BASE}-{number}") for number in numbers]

    chosen = next_id(BASE, [*known, *map(ended, strangers)])

    assert chosen not in {job.submission_id for job in known}
    assert attempts(BASE, [*known, ended(chosen)])[-1].submission_id == chosen


@pytest.mark.parametrize("state", [JobState.PENDING, JobState.RUNNING])
def test_a_job_that_has_not_ended_is_not_submitted_again(state: JobState) -> None:
    with pytest.raises(RunLocked, match=f"{state} already, as {BASE}-2"):
        next_id(BASE, [ended(BASE), ended(f"{BASE}-2", state)])
    with pytest.raises(RunLocked):
        check_unused("mine", [ended("mine", state)])


def test_an_id_given_by_hand_can_be_used_once() -> None:
    check_unused("mine", [ended(BASE)])
    with pytest.raises(CallerError, match="used before"):
        check_unused("mine", [ended("mine")])


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 75, 99, 130, 143])
def test_the_drivers_code_is_the_code(code: int) -> None:
    state = JobState.SUCCEEDED if code == 0 else JobState.FAILED
    assert exit_code_of(SubmittedJob("x", state, "", exit_code=code), "") == code


def test_ends_that_ray_knows_no_code_of() -> None:
    stopped = SubmittedJob("x", JobState.STOPPED, "")
    killed = SubmittedJob("x", JobState.FAILED, "", exit_code=-9)
    lost = SubmittedJob("x", JobState.FAILED, "", message="the node died\nbadly")

    assert exit_code_of(stopped, '{"exit_code": 75}') == 75
    assert exit_code_of(stopped, '{"exit_code": 0}') == 0, "it was done before the signal came"
    assert exit_code_of(stopped, "") == 143
    assert exit_code_of(SubmittedJob("x", JobState.STOPPED, "", has_driver=False), "") == 75
    assert exit_code_of(killed, "") == 137
    assert exit_code_of(lost, "") == 1
    assert exit_code_of(SubmittedJob("x", JobState.RUNNING, ""), "") is None
    assert explain_end(lost) == "Ray lost the job: the node died badly"
    assert "killed by signal 9" in str(explain_end(killed))
    assert "PATH" in str(explain_end(SubmittedJob("x", JobState.FAILED, "", exit_code=127)))
    assert explain_end(SubmittedJob("x", JobState.FAILED, "", exit_code=3)) is None


def test_a_log_tells_the_run_and_the_end() -> None:
    log = (
        'INFO run 1f3a9c7e epoch 2: 3 rows in 1 units\n{"exit_code": 3, "reason": "x"}\nrun   1f3a9c7e: ok\n'
    )

    assert end_line(log) == {"exit_code": 3, "reason": "x"}
    assert end_line('{"exit_code": 3, "rea') is None
    assert end_line("") is None


def test_the_log_tells_an_output_that_its_path_leaves_open() -> None:
    fixed, named = (
        SubmittedJob("x", JobState.RUNNING, "/out"),
        SubmittedJob("x", JobState.RUNNING, "/o/{run8}"),
    )
    daily = SubmittedJob("x", JobState.RUNNING, "/out/{{ tick.date }}")
    begun = "INFO run 1f3a9c7e epoch 2: 3 rows in 1 units\n"
    ended = '{"exit_code": 0, "run": {"output": "/out/2026-11-23"}}\n'

    assert [output_of(job, "") for job in (fixed, named, daily)] == ["/out", None, None]
    assert [output_of(job, begun) for job in (fixed, named, daily)] == ["/out", "/o/1f3a9c7e", None]
    assert output_of(daily, begun + ended) == "/out/2026-11-23"


def test_waiting_tells_each_piece_once_over_lost_connections() -> None:
    jobs, clock, told = FakeJobs(), Clock(), list[str]()
    jobs.add("x")
    jobs.log["x"] = "one\ntwo\n"
    jobs.ends = [Unreachable("cut"), Unreachable("cut"), ended("x")]

    job = wait(jobs, "x", told.append, clock, clock.sleep)

    assert job.state is JobState.FAILED
    assert "".join(told) == "one\ntwo\n"


def test_waiting_gives_up_on_a_cluster_that_is_gone() -> None:
    jobs, clock = FakeJobs(), Clock()
    jobs.add("x")
    jobs.ends = [Unreachable("nobody answers")] * 1000

    with pytest.raises(ClusterError, match=r"nobody answers.*is not known") as given_up:
        wait(jobs, "x", lambda text: None, clock, clock.sleep)
    assert given_up.value.exit_code == 1
    assert 100 < clock.now_s < 200
