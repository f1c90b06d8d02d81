"""A scheduled job to make manifests of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import strategies as st

from b2batch.scheduling.manifest import Kind, render
from b2batch.scheduling.scheduled_job import Machines, ScheduledJob
from b2batch.ticks.cron import parse_cron

JOB = ScheduledJob(
    name="label-reviews",
    cron=parse_cron("0 2 * * *"),
    directory="/srv/labels",
    program="/opt/b2batch/bin/b2batch",
    arguments=("job.yaml",),
    env_names=(),
    drain_grace_s=30.0,
    time_zone="Etc/UTC",
    machines=Machines(image="example.org/b2batch"),
)
NASTY = (
    "a b",
    "it's",
    '"quoted"',
    "$HOME `id` $(id)",
    "100% {{ x }} {% y %} {# z #}",
    "评论 *",
    "#!;&|<>~",
    "{run8}",
)
_seen = st.characters(blacklist_categories=("C", "Z"))
_special = st.sampled_from(
    [*" '\"$%\\{}()#`;&|<>*!~=-a评", "$$", "$(X)", "%%", "{{", "{%", "{#", '\\"', "%d"]
)
words = st.lists(
    st.lists(_special, max_size=8).map("".join) | st.text(_seen, max_size=12), min_size=1, max_size=3
)


def with_arguments(arguments: Sequence[str], **changes: object) -> ScheduledJob:
    return replace(JOB, arguments=tuple(arguments), **changes)  # type: ignore[arg-type]


def rendered(kind: Kind, job: ScheduledJob = JOB) -> dict[str, str]:
    """File name → text."""
    return {manifest.file_name: manifest.text for manifest in render(kind, job)}
