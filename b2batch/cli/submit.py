"""``b2batch submit``."""

from __future__ import annotations

import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from b2batch.cli.options import (
    Config,
    Input,
    Job,
    Json,
    Limit,
    Output,
    Set,
    Verbose,
    log_to_stderr,
    read_job,
)
from b2batch.cli.printing import print_facts, print_json, size
from b2batch.cli.submitted import Address, job_facts, open_cluster
from b2batch.errors import CallerError

if TYPE_CHECKING:
    from b2batch.cluster.dashboard import Dashboard
    from b2batch.cluster.submission import JobRequest
    from b2batch.spec import JobSpec


def submit(
    job: Job = None,
    config: Config = None,
    overrides: Set = None,
    paths: Input = None,
    output: Output = None,
    limit: Limit = None,
    address: Address = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Show its log until it ends, and end with its exit code.")
    ] = False,
    submission_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Instead of the one that the job's content gives.")
    ] = None,
    working_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|URI",
            help="Also take along the small files of DIR; or s3://…/x.zip, which has the job file in it.",
        ),
    ] = None,
    runtime_env: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="Ray's runtime_env of the job: pip, env_vars, ….")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that the output holds.")
    ] = False,
    takeover: Annotated[
        bool, typer.Option("--takeover", help="Do not wait for another driver's lease to end.")
    ] = False,
    wait_lock: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0.0, help="As for run: wait for another driver.")
    ] = None,
    tick: Annotated[
        str | None, typer.Option(metavar="INSTANT|auto", help="As for run: whose run it is.")
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run a job on a Ray cluster, by its dashboard. The same again goes on after any stop.

    Exit codes: 0 submitted; 1 the cluster does not answer; 2 refused before anything was sent; 99 the job
    runs there already. With --wait: those of `b2batch run`. Ctrl-C while it waits leaves the job running.
    """
    log_to_stderr(verbose)
    values = {"input.path": paths, "output.path": output, "input.limit": limit}
    spec = read_job(job, config, overrides, values)
    flags = [flag for flag, given in (("--overwrite", overwrite), ("--takeover", takeover)) if given]
    flags += [] if wait_lock is None else ["--wait-lock", f"{wait_lock:g}"]
    flags += [] if tick is None else ["--tick", tick]
    environment = _read_environment(runtime_env, spec)
    command, content = _command(spec, job or config or Path(), overrides or [], working_dir)
    from b2batch.cluster.submission import JobRequest, check_unused, next_id, submission_base

    client = open_cluster(address)
    _warn_if_open(client.url)
    known = client.jobs()
    if submission_id is not None:
        check_unused(submission_id, known)
    request = JobRequest(
        submission_id=submission_id or next_id(submission_base(spec, tick), known),
        entrypoint=f"exec {shlex.join([*command, *flags])}",
        working_dir=content,
        runtime_env=environment,
        output=_output_of(spec),
    )
    client.submit(request)
    if wait:
        _wait(client, request.submission_id, as_json)
    else:
        _tell_submitted(client, request, as_json)


def _command(
    spec: JobSpec, job: Path, overrides: list[str], working_dir: str | None
) -> tuple[list[str], str | bytes]:
    """The words that run the job in the working directory, and that directory: its URI, or a zip."""
    from b2batch.cluster.package import JOB_FILE, absolute_path, absolute_paths, make_package

    if working_dir is None or "://" not in working_dir:
        package = make_package(spec, Path(working_dir) if working_dir else None)
        return ["b2batch", "run", JOB_FILE], package.content
    if job.is_absolute() or ".." in job.parts:
        raise CallerError(f"--working-dir {working_dir}: the job file is one in it, not {job}")
    given = [word for override in overrides for word in ("--set", override)]
    inputs = [word for path in absolute_paths(spec.input.path) for word in ("-i", path)]
    limit = ["-n", str(spec.input.limit)] if spec.input.limit else []
    places = [*inputs, "-o", absolute_path(spec.output.path), *limit, "--address", "auto"]
    return ["b2batch", "run", str(job), *given, *places], working_dir


def _read_environment(path: Path | None, spec: JobSpec) -> dict[str, Any]:
    """The runtime_env of the job, and in it the time that Ray gives a stopped job to drain."""
    from b2batch.cluster.submission import stop_environment
    from b2batch.spec import read_yaml

    given = read_yaml(path) if path else {}
    if "working_dir" in given:
        raise CallerError(f"{path}: working_dir is what --working-dir says")
    env_vars = given.get("env_vars") or {}
    if not isinstance(env_vars, dict) or not all(isinstance(value, str) for value in env_vars.values()):
        raise CallerError(f"{path}: env_vars: names → texts, in quotes")
    return {**given, "env_vars": {**stop_environment(spec.cluster.drain_grace_s), **env_vars}}


def _output_of(spec: JobSpec) -> str:
    from b2batch.cluster.package import absolute_path

    return absolute_path(spec.output.path)


def _warn_if_open(url: str) -> None:
    from b2batch.exposure import open_dashboard

    found = open_dashboard(url)
    if found is not None:
        who = "every user of this machine" if found.is_local else "everybody who reaches it"
        typer.echo(
            f"warning: {found.place} takes orders from {who}: set RAY_AUTH_MODE=token on all nodes", err=True
        )


def _tell_submitted(client: Dashboard, request: JobRequest, as_json: bool) -> None:
    if as_json:
        print_json({"submission_id": request.submission_id, "address": client.url, "output": request.output})
        return
    named = request.submission_id
    sent = size(len(request.working_dir)) if isinstance(request.working_dir, bytes) else request.working_dir
    print_facts(
        [
            ("submitted", f"{named} to {client.url}, with {sent}"),
            ("output", request.output),
            ("next", f"b2batch logs -f {named}, b2batch stop {named}"),
        ]
    )


def _wait(client: Dashboard, submission_id: str, as_json: bool) -> None:
    """Show the job's log on stderr, then end as its driver did."""
    from b2batch.cluster.submission import end_line, exit_code_of, explain_end, wait

    def tell(text: str) -> None:
        typer.echo(text, err=True, nl=False)

    typer.echo(f"submitted {submission_id} to {client.url}", err=True)
    try:
        job = wait(client, submission_id, tell, time.monotonic, time.sleep)
    except KeyboardInterrupt:
        typer.echo(f"{submission_id} goes on: b2batch logs -f, b2batch stop {submission_id}", err=True)
        raise
    logs = client.logs(submission_id)
    code = exit_code_of(job, logs)
    assert code is not None  # it has ended
    if as_json:
        print_json({"address": client.url, "job": asdict(job), **(end_line(logs) or {}), "exit_code": code})
    else:
        print_facts(job_facts(job, code))
    explained = explain_end(job)
    if explained is not None:
        typer.echo(f"error: {explained}", err=True)
    raise typer.Exit(code)
