"""What the verbs for jobs on a cluster share: the connection, the job that is meant, and its lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from b2batch.cli.options import is_job_file
from b2batch.cli.printing import shorten
from b2batch.errors import CallerError

if TYPE_CHECKING:
    from b2batch.cluster.dashboard import Dashboard
    from b2batch.cluster.submission import JobsClient, SubmittedJob

Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="The cluster's dashboard, http://HOST:8265; default: RAY_API_SERVER_ADDRESS."
    ),
]
Submission = Annotated[
    str, typer.Argument(metavar="ID|JOB.yaml", help="A submission id, or the job: its last submission.")
]
_MESSAGE_CHARS = 160


def open_cluster(address: str | None) -> Dashboard:
    """Connect to the cluster that is named, or that the environment names."""
    from b2batch.cluster.dashboard import Dashboard, find_dashboard

    return Dashboard(find_dashboard(address))


def find_submission(client: JobsClient, target: str) -> str:
    """The submission id that an ``ID|JOB.yaml`` argument means.

    Raises:
        CallerError: the job was never submitted there.
    """
    if not is_job_file(target):
        return target
    from b2batch.cluster.submission import attempts, submission_base
    from b2batch.spec import load_spec

    base = submission_base(load_spec(target))
    earlier = attempts(base, client.jobs())
    if not earlier:
        raise CallerError(
            f"{target}: as it is now, it is not on the cluster (it would be {base}); `b2batch list` names "
            "the jobs there: with other settings, as by --set, it is another one"
        )
    return earlier[-1].submission_id


def job_facts(job: SubmittedJob, exit_code: int | None) -> Iterator[tuple[str, str]]:
    """A submitted job in lines for people."""
    code = "" if exit_code is None else f" (exit {exit_code})"
    yield "job", f"{job.submission_id}: {job.state}{code}"
    if job.output:
        yield "output", job.output
    if job.state == "failed" and job.exit_code is None:
        yield "reason", shorten(job.message, _MESSAGE_CHARS)
    times = [f"{name} {time}" for name, time in (("started", job.started), ("ended", job.ended)) if time]
    if times:
        yield "time", ", ".join(times)
