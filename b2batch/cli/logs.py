"""``b2batch logs``."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated

import typer

from b2batch.cli.options import Json, Verbose, log_to_stderr
from b2batch.cli.printing import print_json
from b2batch.cli.submitted import Address, Submission, find_submission, open_cluster


def logs(
    target: Submission,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job ends.")] = False,
    address: Address = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show what a submitted job's driver wrote. With -f and --json: once it has ended."""
    log_to_stderr(verbose)
    from b2batch.cluster.submission import wait

    client = open_cluster(address)
    submission_id = find_submission(client, target)

    def tell(text: str) -> None:
        if not as_json:
            typer.echo(text, nl=False)

    if follow:
        wait(client, submission_id, tell, time.monotonic, time.sleep)
    else:
        tell(client.logs(submission_id))
    if as_json:
        print_json({"job": asdict(client.job(submission_id)), "log": client.logs(submission_id)})
