"""A cluster that only remembers jobs: they end when a test says so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from b2batch.cluster.submission import JobRequest, JobState, SubmittedJob, Unreachable
from b2batch.errors import CallerError

URL = "http://head:8265"


class FakeJobs:
    """A ``JobsClient``. ``ends`` say how each job ends when it is followed: exit code and log."""

    def __init__(self) -> None:
        self.url = URL
        self.requests: list[JobRequest] = []
        self.known: dict[str, SubmittedJob] = {}
        self.log: dict[str, str] = {}
        self.ends: list[SubmittedJob | Unreachable] = []
        self.stopped: list[str] = []

    def submit(self, request: JobRequest) -> None:
        """Remember it as running."""
        self.requests.append(request)
        self.add(request.submission_id, output=request.output)

    def add(self, submission_id: str, state: JobState = JobState.RUNNING, output: str = "/out") -> None:
        """A job that is there already."""
        self.known[submission_id] = SubmittedJob(submission_id, state, output)

    def end(self, submission_id: str, state: JobState, exit_code: int | None = None, log: str = "") -> None:
        """Let a job end."""
        self.known[submission_id] = replace(self.known[submission_id], state=state, exit_code=exit_code)
        self.log[submission_id] = log

    def jobs(self) -> list[SubmittedJob]:
        return list(self.known.values())

    def job(self, submission_id: str) -> SubmittedJob:
        if submission_id not in self.known:
            raise CallerError(f"there is no job {submission_id}")
        return self.known[submission_id]

    def logs(self, submission_id: str) -> str:
        return self.log.get(self.job(submission_id).submission_id, "")

    def follow(self, submission_id: str) -> Iterator[str]:
        """What is there; each end in turn is taken when it was read."""
        if self.ends:
            end = self.ends.pop(0)
            if isinstance(end, Unreachable):
                yield self.logs(submission_id)
                raise end
            self.known[submission_id] = replace(end, submission_id=submission_id)
        yield from self.logs(submission_id).splitlines(keepends=True)

    def stop(self, submission_id: str) -> None:
        """Ray's way: the driver drains, and its code is only in the log."""
        self.stopped.append(submission_id)
        self.end(submission_id, JobState.STOPPED, log='stopping\n{"exit_code": 75, "reason": "stopped"}\n')
