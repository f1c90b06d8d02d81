"""Arguments that verbs share, and the spec they make together."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from b2batch.spec import JobSpec

Job = Annotated[Path | None, typer.Argument(metavar="JOB.yaml", help="The job file.", show_default=False)]
Config = Annotated[Path | None, typer.Option("-c", "--config", metavar="JOB.yaml", help="The job file.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Set a key of the job file; may be repeated."),
]
Input = Annotated[
    list[str] | None,
    typer.Option("-i", "--input", metavar="PATH", help="Replaces input.path; may be repeated."),
]
Output = Annotated[str | None, typer.Option("-o", "--output", metavar="DIR", help="Replaces output.path.")]
Limit = Annotated[int | None, typer.Option("-n", "--limit", metavar="N", help="Take the first N rows only.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Log more, to stderr.")]
Target = Annotated[
    str, typer.Argument(metavar="OUT|JOB.yaml", help="An output directory, or the job that made it.")
]


def read_job(
    job: Path | None,
    config: Path | None,
    overrides: list[str] | None,
    values: dict[str, Any],
) -> JobSpec:
    """The spec of a job file with what the command line says put in; None among ``values`` says nothing.

    Raises:
        SpecError: the job is not valid.
    """
    from b2batch.spec import load_spec

    return of_now(load_spec(*_job_file(job, config, overrides, values)))


def read_jobs(
    job: Path | None,
    config: Path | None,
    overrides: list[str] | None,
    values: dict[str, Any],
) -> list[JobSpec]:
    """As ``read_job``, for a verb that runs each of a list of revisions."""
    from b2batch.spec import load_specs

    return load_specs(*_job_file(job, config, overrides, values))


def _job_file(
    job: Path | None, config: Path | None, overrides: list[str] | None, values: dict[str, Any]
) -> tuple[Path, list[str], dict[str, Any]]:
    if (job is None) == (config is None):
        raise typer.BadParameter("give one job file: b2batch VERB JOB.yaml, or -c JOB.yaml")
    given = {key: value for key, value in values.items() if value}
    return job or config or Path(), overrides or [], given


def of_now(spec: JobSpec) -> JobSpec:
    """For verbs that look at a job: where it is one of ticks, that of the tick that is due."""
    if not spec.has_tick_paths and not (spec.input.incremental and spec.schedule.cron):
        return spec
    return spec.at(spec.schedule.latest_tick(datetime.now(UTC)))


def is_job_file(target: str) -> bool:
    """Whether an ``OUT|JOB.yaml`` argument names a job file."""
    return target.endswith((".yaml", ".yml")) and not Path(target).is_dir()


def output_path(target: str) -> str:
    """The output directory that an ``OUT|JOB.yaml`` argument means."""
    if not is_job_file(target):
        return target
    from b2batch.preflight import open_output
    from b2batch.spec import load_spec

    return open_output(of_now(load_spec(target))).uri


def log_to_stderr(verbose: bool) -> None:
    """Logging of verbs that read: warnings, or with ``-v`` everything."""
    from b2batch.telemetry import setup_logging

    setup_logging(logging.DEBUG if verbose else logging.WARNING)
