"""``b2batch notify``."""

from __future__ import annotations

from dataclasses import asdict

import typer

from b2batch.cli.options import Config, Job, Json, Set, Verbose, log_to_stderr, read_job
from b2batch.cli.printing import print_facts, print_json


def notify(
    job: Job = None,
    config: Config = None,
    overrides: Set = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Send a test message to each webhook of a job, and tell how that went. Nothing is run.

    Exit codes: 0 all were told; 1 one was not; 2 the job file is wrong, or a package is missing.
    """
    log_to_stderr(verbose)
    spec = read_job(job, config, overrides, {})
    from b2batch.notify.delivery import check_webhooks, deliver
    from b2batch.notify.message import trial

    check_webhooks(spec.notify)
    outcomes = deliver([(webhook, trial(spec.name)) for webhook in spec.notify])
    if as_json:
        print_json([asdict(outcome) for outcome in outcomes])
    else:
        for index, outcome in enumerate(outcomes):
            how = "was told" if outcome.is_done else f"was not told: {outcome.detail}"
            print_facts([("ok" if outcome.is_done else "fail", f"notify.{index}: {outcome.service} {how}")])
        if not outcomes:
            print_facts([("", "the job names no webhook (notify)")])
    if not all(outcome.is_done for outcome in outcomes):
        raise typer.Exit(1)
