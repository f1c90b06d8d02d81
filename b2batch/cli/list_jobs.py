"""``b2batch list``."""

from __future__ import annotations

from dataclasses import asdict

import typer

from b2batch.cli.options import Json, Verbose, log_to_stderr
from b2batch.cli.printing import print_json
from b2batch.cli.submitted import Address, open_cluster

_HEADER = ("ID", "STATE", "EXIT", "STARTED", "OUTPUT")


def list_jobs(address: Address = None, as_json: Json = False, verbose: Verbose = False) -> None:
    """Show the jobs that were submitted to a cluster, the oldest first."""
    log_to_stderr(verbose)
    jobs = open_cluster(address).jobs()
    if as_json:
        print_json([asdict(job) for job in jobs])
        return
    rows = [
        (job.submission_id, str(job.state), _code(job.exit_code), job.started, job.output) for job in jobs
    ]
    widths = [max(len(row[column]) for row in (_HEADER, *rows)) for column in range(len(_HEADER))]
    for row in (_HEADER, *rows):
        typer.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _code(exit_code: int | None) -> str:
    return "" if exit_code is None else str(exit_code)
