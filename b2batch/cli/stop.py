"""``b2batch stop``."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated

import typer

from b2batch.cli.options import Json, Verbose, log_to_stderr
from b2batch.cli.printing import print_facts, print_json
from b2batch.cli.submitted import Address, Submission, find_submission, job_facts, open_cluster


def stop(
    target: Submission,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it has ended.")] = True,
    address: Address = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Stop a submitted job: leased units finish for up to cluster.drain_grace_s, and it ends with 75.

    What was committed stays; submitting the job again goes on from there.
    """
    log_to_stderr(verbose)
    from b2batch.cluster.submission import exit_code_of
    from b2batch.cluster.submission import wait as wait_for

    client = open_cluster(address)
    submission_id = find_submission(client, target)
    job = client.job(submission_id)
    if not job.has_ended:
        client.stop(submission_id)
        if wait:
            job = wait_for(client, submission_id, lambda text: None, time.monotonic, time.sleep)
    code = exit_code_of(job, client.logs(submission_id))
    if as_json:
        print_json({"job": asdict(job), "exit_code": code})
    else:
        print_facts(job_facts(job, code))
