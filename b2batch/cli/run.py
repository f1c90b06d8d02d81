"""``b2batch run``."""

from __future__ import annotations

import json
import logging
import sys
import time
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from b2batch.cli.options import Config, Input, Job, Json, Limit, Output, Set, Verbose, read_jobs
from b2batch.cli.overview import overview_facts
from b2batch.cli.printing import duration, print_facts, print_json
from b2batch.errors import (
    B2BatchError,
    CallerError,
    ErrorBudgetExceeded,
    InputError,
    IntegrityError,
    NothingToDo,
    RunLocked,
)

if TYPE_CHECKING:
    from b2batch.job import JobResult, RunOptions
    from b2batch.outputs.overview import Overview
    from b2batch.spec import JobSpec


def run(
    job: Job = None,
    config: Config = None,
    overrides: Set = None,
    paths: Input = None,
    output: Output = None,
    limit: Limit = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that the output holds.")
    ] = False,
    takeover: Annotated[
        bool, typer.Option("--takeover", help="Do not wait for another driver's lease to end.")
    ] = False,
    wait_lock: Annotated[
        float,
        typer.Option(
            "--wait-lock", metavar="SECONDS", min=0.0, help="Wait for another driver to end; inf: any time."
        ),
    ] = 0.0,
    tick: Annotated[
        str | None,
        typer.Option(
            metavar="INSTANT|auto", help="Whose run it is: 2026-11-23T02:00; auto: the schedule's due one."
        ),
    ] = None,
    allow_foreign: Annotated[
        bool, typer.Option("--allow-foreign", help="Write beside files that are not b2batch's.")
    ] = False,
    address: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Replaces cluster.address.")] = None,
    replicas: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Replaces cluster.replicas.")
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run a job to its end, or go on with it: after any stop the same command resumes.

    Exit codes: 0 done; 1 failed, run again; 2 the job is wrong; 3 done, too many failed rows; 4 the output
    is another run's; 75 stopped, run again; 99 another driver works on it, or nothing is new; 130, 143
    forced.
    """
    specs = read_jobs(
        job,
        config,
        overrides,
        {
            "input.path": paths,
            "output.path": output,
            "input.limit": limit,
            "cluster.address": address,
            "cluster.replicas": replicas,
        },
    )
    from b2batch.job import RunOptions

    options = RunOptions(
        overwrite=overwrite, takeover=takeover, wait_lock_s=wait_lock, allow_foreign=allow_foreign
    )
    ends: list[dict[str, Any]] = []
    errors: list[B2BatchError | None] = []
    bound = _at_ticks(specs, tick)
    for spec in bound:
        end, failed = _run_one(spec, options, verbose, as_json)
        ends.append(end)
        errors.append(failed)
        if not _goes_on(failed, is_of_many=tick is not None):
            break  # what stopped this revision or tick would stop the others
    if as_json:
        print_json(ends if len(bound) > 1 else ends[0])
    error = _gravest(errors)
    if error is not None:
        raise error


def _at_ticks(specs: list[JobSpec], tick: str | None) -> list[JobSpec]:
    """Each job at each of the ticks that are meant, the oldest first."""
    if tick is None:
        return specs
    from b2batch.due import ticks_to_run

    now = datetime.now(UTC)
    return [spec.at(each) for spec in specs for each in ticks_to_run(spec, tick, now)]


def _goes_on(failed: B2BatchError | None, is_of_many: bool) -> bool:
    """Whether other revisions or ticks may still succeed. A tick's input may be missing for good."""
    return (
        failed is None
        or isinstance(failed, (ErrorBudgetExceeded, NothingToDo))
        or (is_of_many and isinstance(failed, InputError))
    )


def _gravest(errors: list[B2BatchError | None]) -> B2BatchError | None:
    """What the command ends with; that one of several had nothing to do is no failure."""
    failed = [error for error in errors if error is not None and not isinstance(error, NothingToDo)]
    if failed:
        return failed[-1]
    return None if None in errors else errors[-1]


def _run_one(
    spec: JobSpec, options: RunOptions, verbose: bool, as_json: bool
) -> tuple[dict[str, Any], B2BatchError | None]:
    """Run a job and tell people how it ended; the same for programs, and its error."""
    started_s = time.monotonic()
    result, error = None, None
    try:
        result = _drive(spec, options, verbose)
    except B2BatchError as caught:
        error = caught
    view = _standing(spec, result, error)
    wall_s = time.monotonic() - started_s
    end = {
        "exit_code": error.exit_code if error else 0,
        "reason": str(error or ""),
        "wall_s": round(wall_s, 1),
        "run": None if view is None else asdict(view),
    }
    if not as_json:
        _tell_end(end, view, wall_s)
    return end, error


def _drive(spec: JobSpec, options: RunOptions, verbose: bool) -> JobResult:
    """Run the job with its progress on stderr and stop signals handled."""
    from rich.console import Console

    from b2batch.cli.progress import open_view
    from b2batch.cli.stopping import StopSignals
    from b2batch.job import run_job
    from b2batch.telemetry import setup_logging

    console = Console(stderr=True)
    setup_logging(logging.DEBUG if verbose else logging.INFO, console=console)
    # Ray tells of lost workers on stdout, which is for what programs read.
    with redirect_stdout(sys.stderr), open_view(console) as view, StopSignals(view.say) as stop:
        hooked = replace(
            options,
            on_progress=view.update,
            should_stop=stop.is_asked,
            forced_code=stop.forced_code,
        )
        return run_job(spec, hooked)


def _standing(spec: JobSpec, result: JobResult | None, error: B2BatchError | None) -> Overview | None:
    """How the output stands now; None where it is not this run's, or nothing stands there."""
    if isinstance(error, (CallerError, IntegrityError, RunLocked)):
        return None
    from b2batch.outputs.overview import overview
    from b2batch.outputs.store import open_store
    from b2batch.preflight import open_output

    try:
        return overview(open_store(result.output) if result else open_output(spec), datetime.now(UTC))
    except B2BatchError:
        return None  # stopped before there was an output


def _tell_end(end: dict[str, Any], view: Overview | None, wall_s: float) -> None:
    if not sys.stderr.isatty():
        run = end["run"] and {key: value for key, value in end["run"].items() if key != "metrics"}
        line = json.dumps({**end, "run": run}, ensure_ascii=False)
        typer.echo(line, err=True)  # for schedulers that lose exit codes
    if view is not None:
        print_facts([*overview_facts(view), ("took", duration(wall_s))])
