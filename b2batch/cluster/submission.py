"""Jobs on a cluster as Ray's Jobs API knows them: their ids, how they end, and waiting for it.

The id of a job says what it does: the same job has the same id, and an attempt's number behind it from
the second on (Ray takes an id once). So whoever submits a job that is running is told so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from b2batch.cluster.package import absolute_path, absolute_paths
from b2batch.errors import CallerError, ClusterError, Drained, RunLocked
from b2batch.spec import JobSpec, config_digest

OUTPUT_KEY = "b2batch_output"  # of a job's metadata
_LOST_AFTER_S = 120.0
_POLL_S = 1.0
_CLOSING_S = 60  # beyond the grace: what ending the replicas and writing the status take
_NOT_FOUND = 127  # a shell's code for a command that is not there
_FORCED = 143
_SIGNALLED = 128
_RUN_LINE = re.compile(r"\brun ([0-9a-f]{8}) epoch \d+:")


class JobState(StrEnum):
    """Where a submitted job is, in Ray's words but for what was stopped cleanly, which Ray calls failed."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class SubmittedJob:
    """One submitted job. Times are UTC, ISO 8601, or empty.

    ``exit_code`` is that of ``b2batch run``, None while it runs and where Ray did not learn it: it
    stopped the job, or lost it. ``message`` is Ray's reason. ``has_driver``: the command was begun.
    """

    submission_id: str
    state: JobState
    output: str
    exit_code: int | None = None
    message: str = ""
    started: str = ""
    ended: str = ""
    has_driver: bool = True

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state not in (JobState.PENDING, JobState.RUNNING)


@dataclass(frozen=True, slots=True)
class JobRequest:
    """What is sent to the cluster. ``working_dir`` is the URI of a zip, or the content of one."""

    submission_id: str
    entrypoint: str
    working_dir: str | bytes
    runtime_env: Mapping[str, Any]
    output: str


class Unreachable(ClusterError):
    """The cluster did not answer; it may later."""


class JobsClient(Protocol):
    """Ray's Jobs API; each call raises Unreachable where the cluster does not answer."""

    def submit(self, request: JobRequest) -> None:
        """Have the cluster start a job; CallerError when the id was used before."""

    def jobs(self) -> list[SubmittedJob]:
        """b2batch's jobs, running or not, the oldest first."""
        ...

    def job(self, submission_id: str) -> SubmittedJob:
        """One job; CallerError when there is none of this id."""
        ...

    def logs(self, submission_id: str) -> str:
        """What its driver has written so far, stdout and stderr together."""
        ...

    def follow(self, submission_id: str) -> Iterator[str]:
        """What its driver has written and writes, in pieces, until it ends or the connection does."""
        ...

    def stop(self, submission_id: str) -> None:
        """Ask it to drain."""


def submission_base(spec: JobSpec, tick: str | None = None) -> str:
    """The id of a job's first submission: its name, and a digest of what it makes out of what, and where.

    ``tick`` as it is given: jobs for two instants are two, those for whichever is due are one.
    """
    identity = {
        "output": absolute_path(spec.output.path),
        "input": absolute_paths(spec.input.path),
        "limit": spec.input.limit,
        "config": spec.result_config(),
        "tick": tick,
    }
    return f"{spec.name}-{config_digest(identity)[:8]}"


def attempts(base: str, jobs: Sequence[SubmittedJob]) -> list[SubmittedJob]:
    """Those of ``jobs`` that are submissions of one job, the latest last."""
    numbered = [(number, job) for job in jobs if (number := _attempt(base, job.submission_id))]
    return [job for _, job in sorted(numbered, key=lambda pair: pair[0])]


def next_id(base: str, jobs: Sequence[SubmittedJob]) -> str:
    """The id under which the job can be submitted now.

    Raises:
        RunLocked: an earlier submission has not ended.
    """
    earlier = attempts(base, jobs)
    running = next((job for job in earlier if not job.has_ended), None)
    if running is not None:
        raise RunLocked(_still_there(running))
    if not earlier:
        return base
    return f"{base}-{_attempt(base, earlier[-1].submission_id) + 1}"


def check_unused(submission_id: str, jobs: Sequence[SubmittedJob]) -> None:
    """Refuse an id that was given by hand and used before.

    Raises:
        RunLocked: its job has not ended.
        CallerError: it has; Ray takes an id once.
    """
    for job in jobs:
        if job.submission_id == submission_id:
            if not job.has_ended:
                raise RunLocked(_still_there(job))
            raise CallerError(f"--submission-id {submission_id}: was used before, and Ray takes an id once")


def stop_environment(drain_grace_s: float) -> dict[str, str]:
    """Gives a job that Ray stops, by whichever way, the time to drain; without it Ray kills after 3 s."""
    return {"RAY_JOB_STOP_WAIT_TIME_S": str(round(drain_grace_s) + _CLOSING_S)}


def wait(
    client: JobsClient,
    submission_id: str,
    tell: Callable[[str], None],
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> SubmittedJob:
    """The job once it has ended; what its driver writes meanwhile goes to ``tell``, each piece once.

    Raises:
        ClusterError: the cluster has not answered for two minutes; the job's end is not known.
    """
    listener, heard_s = _Listener(tell), clock()
    while True:
        try:
            listener.hear(client.follow(submission_id))
            job = client.job(submission_id)
            heard_s = clock()
        except Unreachable as error:
            if clock() - heard_s > _LOST_AFTER_S:
                raise ClusterError(
                    f"{error}; whether {submission_id} goes on is not known. "
                    "`b2batch status OUT` tells from its output, and submitting it again goes on with it"
                ) from error
        else:
            if job.has_ended:
                return job
        sleep(_POLL_S)


class _Listener:
    """Tells what it has not told yet, though a log that is followed again begins anew."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._num_told = 0

    def hear(self, pieces: Iterator[str]) -> None:
        """Take a log in from its beginning, as far as it goes."""
        position = 0
        for piece in pieces:
            fresh = piece[max(0, self._num_told - position) :]
            position += len(piece)
            if fresh:
                self._num_told = position
                self._tell(fresh)


def end_line(logs: str) -> dict[str, Any] | None:
    """What ``b2batch run`` said last of its end, for programs: its exit code, reason and standing."""
    for line in reversed(logs.splitlines()):
        if line.startswith('{"exit_code": '):
            try:
                return dict(json.loads(line))
            except ValueError:
                return None
    return None


def output_of(job: SubmittedJob, logs: str) -> str | None:
    """The directory of the run that a job works on, None until its log tells what the path leaves open."""
    run = (end_line(logs) or {}).get("run")
    if run:
        return str(run["output"])
    named = _RUN_LINE.findall(logs)
    output = job.output.replace("{run8}", named[-1] if named else "{run8}")
    return None if not output or "{run8}" in output or "{{" in output else output


def exit_code_of(job: SubmittedJob, logs: str) -> int | None:
    """What a process that stands for a job should end with, None while the job goes on.

    The driver's own code where it is known, by Ray or by the end of its log; a driver killed by a
    signal counts as a shell counts it. A cluster without b2batch is the caller's fault.
    """
    if not job.has_ended:
        return None
    if job.exit_code == _NOT_FOUND:
        return CallerError.exit_code
    if job.exit_code is not None and job.state is not JobState.STOPPED:
        return job.exit_code if job.exit_code >= 0 else _SIGNALLED - job.exit_code
    if job.state is JobState.STOPPED:
        end = end_line(logs)
        if end is not None:
            return int(end["exit_code"])
        return _FORCED if job.has_driver else Drained.exit_code
    return ClusterError.exit_code


def explain_end(job: SubmittedJob) -> str | None:
    """Why a job failed whose driver had no chance to say it, None for one that had."""
    if job.exit_code == _NOT_FOUND:
        return (
            "there is no command b2batch on the PATH of the cluster's head: install it on all nodes, or name "
            "it in a --runtime-env"
        )
    if job.state is not JobState.FAILED:
        return None
    if job.exit_code is None:
        return f"Ray lost the job: {' '.join(job.message.split())[:500]}"
    if job.exit_code < 0:
        return f"its driver was killed by signal {-job.exit_code}; what was committed stays, submit it again"
    return None


def _attempt(base: str, submission_id: str) -> int:
    """The attempt's number, from 1; 0 for another job's id."""
    if submission_id == base:
        return 1
    number = submission_id.removeprefix(f"{base}-")
    return int(number) if number != submission_id and number.isdecimal() else 0


def _still_there(job: SubmittedJob) -> str:
    return (
        f"this job is {job.state} already, as {job.submission_id}: `b2batch logs -f {job.submission_id}` "
        f"follows it, `b2batch stop {job.submission_id}` stops it"
    )
