"""``b2batch schedule``."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from b2batch.cli.options import Set
from b2batch.cli.printing import print_facts
from b2batch.errors import CallerError, OutputError

if TYPE_CHECKING:
    from b2batch.scheduling.manifest import Kind, Manifest
    from b2batch.scheduling.scheduled_job import ScheduledJob
    from b2batch.spec import JobSpec
    from b2batch.ticks.cron import CronExpression

_NUM_TIMES = 3
_FIXED_OUTPUT = (
    "note: output.path is the same at each start: once the run there has finished, a start does nothing, and "
    "a changed input is refused (4). For an input that grows: input.incremental: true, or {{ tick.date }} in "
    "its paths with schedule.cron; for one that changes: --set 'output.path=…/{run8}'"
)
_OWN_CLOCK = "note: ticks are of {zone}, but the start is by the clock of its machine: give --cron in that"


class Scheduler(StrEnum):
    """What starts the job."""

    CRON = "cron"
    SYSTEMD = "systemd"
    KUBERNETES = "kubernetes"
    SLURM = "slurm"
    AIRFLOW = "airflow"


_NEED_ZONE = {Scheduler.KUBERNETES, Scheduler.AIRFLOW}  # without one they would take that of some server
_ON_CLUSTER = {Scheduler.KUBERNETES, Scheduler.SLURM}


def schedule(
    kind: Annotated[Scheduler, typer.Argument(metavar="KIND", help=" | ".join(Scheduler))],
    job: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")],
    cron: Annotated[
        str | None,
        typer.Option(
            metavar="'M H D M W'", help="Minute, hour, day, month, weekday: '0 2 * * *'; default: the job's."
        ),
    ] = None,
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="DIR|-", help="Where to write the files; -: to stdout.")
    ] = "-",
    overrides: Set = None,
    directory: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the run starts, and relative paths begin; default: here."),
    ] = None,
    program: Annotated[
        str | None, typer.Option(metavar="FILE", help="b2batch there; default: this one, or the image's.")
    ] = None,
    time_zone: Annotated[
        str | None,
        typer.Option(metavar="ZONE", help="As Asia/Shanghai; default: the machine's, or UTC where none is."),
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Slurm, --ray-job: nodes, default 1.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="Slurm, Kubernetes: GPUs of a node.")] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="Slurm, Kubernetes: cores of a node.")] = None,
    memory_gib: Annotated[
        int | None, typer.Option("--memory-gib", min=1, help="Slurm, Kubernetes: memory of a node.")
    ] = None,
    image: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="Kubernetes: an image with b2batch; needed.")
    ] = None,
    claim: Annotated[
        str | None, typer.Option(metavar="NAME", help="Kubernetes: the volume claim mounted at --directory.")
    ] = None,
    ray_job: Annotated[
        bool, typer.Option("--ray-job", help="Kubernetes: a RayJob of KubeRay, instead of one pod.")
    ] = False,
    submit: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Submit to the Ray cluster with this dashboard, and wait."),
    ] = None,
) -> None:
    """Write what runs a job on a schedule: crontab line, systemd units, Kubernetes, Slurm or Airflow files.

    No secret is written: ${env:NAME} stays, and each file tells where the values go.
    """
    given: dict[str, Any] = {
        "nodes": nodes,
        "gpus": gpus,
        "cpus": cpus,
        "memory_gib": memory_gib,
        "image": image,
    }
    machines = {name: value for name, value in {**given, "claim": claim}.items() if value is not None}
    _refuse_what_has_no_use(kind, ray_job, time_zone, program, machines)
    if submit and (ray_job or kind is Scheduler.SLURM):
        raise CallerError(f"--submit: {'a RayJob' if ray_job else kind} starts a Ray cluster of its own")
    from b2batch.scheduling.manifest import render
    from b2batch.scheduling.scheduled_job import Machines, ScheduledJob
    from b2batch.spec import env_references, load_specs

    specs = load_specs(job, overrides or ())
    arguments = [str(job), *(word for override in overrides or () for word in ("--set", override))]
    if specs[0].schedule.cron is not None:
        _check_ticks(specs)
        arguments += ["--tick", "auto"]
        if _takes_zone(kind, ray_job):
            time_zone = time_zone or specs[0].schedule.timezone
    scheduled = ScheduledJob(
        name=specs[0].name,
        cron=_cron(cron, specs[0]),
        directory=str((directory or Path()).absolute()),
        program=program or _this_program(kind),
        arguments=tuple(arguments),
        env_names=tuple(sorted({name for spec in specs for name in env_references(spec)})),
        drain_grace_s=specs[0].cluster.drain_grace_s,
        time_zone=_zone(time_zone, kind, ray_job),
        machines=Machines(**{"gpus": 0 if submit else _gpus(specs[0]), **machines}),
        dashboard=submit or "",
    )
    _write(render(_kind(kind, ray_job), scheduled), output)
    _tell_times(scheduled, err=output == "-")
    if any(_has_fixed_output(spec) for spec in specs):
        typer.echo(_FIXED_OUTPUT, err=True)
    if specs[0].schedule.cron is not None and not _takes_zone(kind, ray_job) and _is_elsewhere(specs[0]):
        typer.echo(_OWN_CLOCK.format(zone=specs[0].schedule.timezone), err=True)


def _cron(given: str | None, spec: JobSpec) -> CronExpression:
    from b2batch.ticks.cron import parse_cron

    if given is not None:
        return parse_cron(given)
    if spec.schedule.expression is None:
        raise CallerError("--cron: is needed, as the job has no schedule.cron")
    return spec.schedule.expression


def _check_ticks(specs: list[JobSpec]) -> None:
    """Refuse now what ``run --tick auto`` would refuse."""
    for spec in specs:
        spec.at(spec.schedule.latest_tick(datetime.now(UTC)))


def _is_elsewhere(spec: JobSpec) -> bool:
    """Whether this machine's clock is not that of the job's ticks."""
    now = datetime.now(UTC)
    return now.astimezone().utcoffset() != now.astimezone(spec.schedule.zone).utcoffset()


def _has_fixed_output(spec: JobSpec) -> bool:
    return not (spec.input.incremental or spec.has_tick_paths or "{run8}" in spec.output.path)


def _takes_zone(kind: Scheduler, ray_job: bool) -> bool:
    return not (ray_job or kind in (Scheduler.CRON, Scheduler.SLURM))


def _kind(kind: Scheduler, ray_job: bool) -> Kind:
    from b2batch.scheduling.manifest import Kind

    return Kind.RAY_JOB if ray_job else Kind(kind.value)


def _refuse_what_has_no_use(
    kind: Scheduler, ray_job: bool, time_zone: str | None, program: str | None, machines: dict[str, Any]
) -> None:
    """Refuse options that the scheduler's files would not hold, and a missing image."""
    is_kubernetes = kind is Scheduler.KUBERNETES
    if ray_job and not is_kubernetes:
        raise CallerError(f"--ray-job is of kubernetes, not of {kind}")
    if time_zone and not _takes_zone(kind, ray_job):
        who = "KubeRay's operator" if ray_job else "the machine that cron runs on"
        raise CallerError(f"--time-zone: {kind} takes that of {who}; write --cron in it")
    used = {"gpus", "cpus", "memory_gib"} if kind in _ON_CLUSTER else set()
    used |= {"nodes"} if ray_job or kind is Scheduler.SLURM else set()
    used |= {"image", "claim"} if is_kubernetes else set()
    useless = [f"--{name.replace('_', '-')}" for name in machines if name not in used]
    if useless:
        raise CallerError(f"{', '.join(useless)}: of no use for {kind}{'' if ray_job else ' as asked'}")
    if is_kubernetes and "image" not in machines:
        raise CallerError("--image: kubernetes needs an image that has b2batch and its dependencies")
    if kind is Scheduler.SYSTEMD and program and not program.startswith("/"):
        raise CallerError(f"--program: systemd needs an absolute path, found {program!r}")


def _this_program(kind: Scheduler) -> str:
    """The installed command, by its path: cron and systemd know no virtual environment."""
    import sys
    from shutil import which

    if kind is Scheduler.KUBERNETES:
        return "b2batch"
    beside = Path(sys.executable).with_name("b2batch")
    found = str(beside) if beside.is_file() else which("b2batch")
    if found is None:
        raise CallerError("--program: no b2batch command beside this Python or on PATH; name one")
    return found


def _zone(name: str | None, kind: Scheduler, ray_job: bool) -> str | None:
    from zoneinfo import ZoneInfo

    wanted = name or ("Etc/UTC" if kind in _NEED_ZONE and not ray_job else None)
    try:
        return wanted and ZoneInfo(wanted).key
    except (ValueError, OSError, KeyError):
        raise CallerError(f"--time-zone: {name!r} is none that is known here, as Asia/Shanghai") from None


def _gpus(spec: JobSpec) -> int:
    """GPUs of a node unless told: of one replica, which has one where it may."""
    wanted = spec.cluster.gpus_per_replica
    return 0 if spec.model.device == "cpu" or wanted == 0 else 1


def _write(manifests: list[Manifest], output: str) -> None:
    if output == "-":
        for manifest in manifests:
            typer.echo(manifest.text, nl=False)
        return
    directory = Path(output)
    for manifest in manifests:
        _refuse_others(directory / manifest.file_name, manifest.text)
    for manifest in manifests:
        path = directory / manifest.file_name
        try:
            directory.mkdir(parents=True, exist_ok=True)
            path.write_text(manifest.text, encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}") from error
        print_facts([("wrote", str(path)), ("", manifest.install)])


def _refuse_others(path: Path, text: str) -> None:
    """Somebody may have changed the file since it was written."""
    if path.is_file() and path.read_bytes() != text.encode():
        raise OutputError(f"{path} exists and differs; remove it, or choose another directory")


def _tell_times(job: ScheduledJob, err: bool) -> None:
    from zoneinfo import ZoneInfo

    now = datetime.now(ZoneInfo(job.time_zone)) if job.time_zone else datetime.now()
    times = [f"{time:%a %Y-%m-%d %H:%M}" for time in job.cron.next_times(now, _NUM_TIMES)]
    where = job.time_zone or "by the clock of the machine that starts it"
    typer.echo(f"{'next':<12} {', '.join(times)} ({where})", err=err)
