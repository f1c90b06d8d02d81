"""Manifests from templates: each kind of scheduler, the files it needs and how to install them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from jinja2 import Environment, PackageLoader, StrictUndefined

from b2batch.scheduling import quoting
from b2batch.scheduling.on_calendar import on_calendar
from b2batch.scheduling.scheduled_job import ScheduledJob


class Kind(StrEnum):
    """What starts the job."""

    CRON = "cron"
    SYSTEMD = "systemd"
    KUBERNETES = "kubernetes"
    RAY_JOB = "ray-job"  # kubernetes, on a Ray cluster of its own that KubeRay makes
    SLURM = "slurm"
    AIRFLOW = "airflow"


@dataclass(frozen=True, slots=True)
class Manifest:
    """A file to write, and in one line what to do with it."""

    file_name: str
    text: str
    install: str


@dataclass(frozen=True, slots=True)
class _Template:
    """``file_name`` and ``install`` have ``{name}``, the job's name as the file has it."""

    template: str
    file_name: str
    install: str


_TEMPLATES: dict[Kind, list[_Template]] = {
    Kind.CRON: [
        _Template("crontab.j2", "{name}.crontab", "add its line with `crontab -e`"),
    ],
    Kind.SYSTEMD: [
        _Template("service.j2", "{name}.service", "copy to ~/.config/systemd/user, as the timer"),
        _Template("timer.j2", "{name}.timer", "then `systemctl --user enable --now {name}.timer`"),
    ],
    Kind.KUBERNETES: [
        _Template("cronjob.yaml.j2", "{name}.cronjob.yaml", "kubectl apply -f {name}.cronjob.yaml"),
    ],
    Kind.RAY_JOB: [
        _Template(
            "rayjob.yaml.j2", "{name}.rayjob.yaml", "one run now: kubectl create -f {name}.rayjob.yaml"
        ),
        _Template(
            "raycronjob.yaml.j2",
            "{name}.raycronjob.yaml",
            "on the schedule (KubeRay 1.6, feature gate RayCronJob): kubectl apply -f {name}.raycronjob.yaml",
        ),
    ],
    Kind.SLURM: [
        _Template(
            "sbatch.j2", "{name}.sbatch", "copy to the job's directory; one run now: sbatch {name}.sbatch"
        ),
        _Template(
            "sbatch.crontab.j2", "{name}.sbatch.crontab", "on a login node, add its line with `crontab -e`"
        ),
    ],
    Kind.AIRFLOW: [
        _Template("dag.py.j2", "{name}.py", "copy to Airflow's dags folder"),
    ],
}


def render(kind: Kind, job: ScheduledJob) -> list[Manifest]:
    """The files that run ``job`` under a scheduler.

    Raises:
        CallerError: a value that this scheduler has no safe way to write.
    """
    for what, value in _written_values(job):
        quoting.require_printable(what, value)
    environment = _environment()
    name = job.object_name if kind in (Kind.KUBERNETES, Kind.RAY_JOB) else job.name
    known = {
        "job": job,
        "machines": job.machines,
        "on_calendar": on_calendar(job.cron, job.time_zone),
        "ray_version": importlib.metadata.version("ray"),
    }
    return [
        Manifest(
            each.file_name.format(name=name),
            environment.get_template(each.template).render(known),
            each.install.format(name=name),
        )
        for each in _TEMPLATES[kind]
    ]


def _written_values(job: ScheduledJob) -> list[tuple[str, str]]:
    return [
        ("--directory", job.directory),
        ("--image", job.machines.image),
        ("--claim", job.machines.claim),
        *(("the command", word) for word in job.command),
    ]


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("b2batch.scheduling"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # no HTML: each value is quoted by its filter
    )
    filters: dict[str, Callable[..., str]] = {
        "shell": lambda words: quoting.shell(*words),
        "crontab": quoting.crontab,
        "systemd_word": quoting.systemd_word,
        "systemd_path": quoting.systemd_path,
        "literal": quoting.literal,
        "kubernetes_argument": quoting.kubernetes_argument,
    }
    environment.filters.update(filters)
    return environment
