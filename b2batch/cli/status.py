"""``b2batch status``."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from b2batch.cli.options import Json, Verbose, is_job_file, log_to_stderr, of_now
from b2batch.cli.overview import overview_facts
from b2batch.cli.printing import print_facts, print_json
from b2batch.cli.submitted import find_submission, job_facts, open_cluster
from b2batch.errors import B2BatchError

if TYPE_CHECKING:
    from b2batch.cluster.submission import JobsClient, SubmittedJob
    from b2batch.outputs.overview import Overview
    from b2batch.outputs.store import Store


def status(
    target: Annotated[
        str,
        typer.Argument(
            metavar="OUT|JOB.yaml|ID",
            help="An output directory, the job that made it, or with --address a submission id.",
        ),
    ],
    address: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Ask the cluster's dashboard, http://HOST:8265, too."),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show how a run stands, from what lies in its output; with --address also what the cluster says."""
    log_to_stderr(verbose)
    if address is not None:
        _show_submitted(target, address, as_json)
        return
    from b2batch.outputs.overview import overview

    view = overview(_open(target), datetime.now(UTC))
    if as_json:
        print_json(view)
    else:
        print_facts(overview_facts(view))


def _show_submitted(target: str, address: str, as_json: bool) -> None:
    client = open_cluster(address)
    job = client.job(find_submission(client, target))
    code, view, why_not = _standing(client, job)
    if as_json:
        run = None if view is None else asdict(view)
        print_json({"job": asdict(job), "exit_code": code, "run": run, "reason": why_not})
        return
    print_facts(job_facts(job, code))
    print_facts(overview_facts(view) if view else [("run", f"not seen from here: {why_not}")])


def _standing(client: JobsClient, job: SubmittedJob) -> tuple[int | None, Overview | None, str]:
    """The job's exit code once it ended, its run as seen from here, and why it is not seen."""
    from b2batch.cluster.submission import exit_code_of, output_of
    from b2batch.outputs.overview import overview
    from b2batch.outputs.store import open_store

    log = client.logs(job.submission_id)
    code = exit_code_of(job, log)
    output = output_of(job, log)
    if output is None:
        return code, None, "its log names no run yet"
    try:
        return code, overview(open_store(output), datetime.now(UTC)), ""
    except (B2BatchError, OSError) as error:
        return code, None, str(error)


def _open(target: str) -> Store:
    if is_job_file(target):
        from b2batch.preflight import open_output
        from b2batch.spec import load_spec

        return open_output(of_now(load_spec(target)))
    from b2batch.outputs.store import open_store

    return open_store(target)
