"""The Slurm script, run by bash with stand-ins for srun, scontrol and ray on its PATH."""

from __future__ import annotations

import re
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from b2batch.scheduling.manifest import Kind
from b2batch.scheduling.scheduled_job import ScheduledJob

from .jobs import JOB, NASTY, rendered, with_arguments
from .programs import waiting_program, write_executable, write_program

SCONTROL = """#!/bin/sh
case "$1" in
show) printf 'node7\\nnode8\\n' ;;
requeue) echo "$2" >requeued ;;
esac
"""
RAY = """#!/bin/bash
[ "$1" = symmetric-run ] || exit 0
printf '%s ' "$@" >ray
while [ "$1" != -- ]; do shift; done
shift
"$@"
"""


def job_in(directory: Path, *arguments: str) -> ScheduledJob:
    """A job whose program's directory has the stand-ins."""
    commands = directory / "bin of it"
    write_executable(commands / "scontrol", SCONTROL)
    write_executable(commands / "ray", RAY)
    write_executable(commands / "srun", '#!/bin/bash\nexec "$@"\n')
    return with_arguments(
        arguments or ("job.yaml",), directory=str(directory), program=str(commands / "b2batch")
    )


def start(job: ScheduledJob, directory: Path) -> subprocess.Popen[bytes]:
    script = directory / "job.sbatch"
    script.write_text(rendered(Kind.SLURM, job)["label-reviews.sbatch"], encoding="utf-8")
    environment = {
        "PATH": "/usr/bin:/bin",
        "SLURM_JOB_ID": "4217",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "TMPDIR": str(directory),
    }
    return subprocess.Popen(["bash", str(script)], env=environment)


@pytest.mark.parametrize(("ended", "told"), [(0, 0), (1, 1), (2, 2), (3, 3), (75, 75), (99, 0)])
def test_script_ends_with_the_runs_code_and_requeues_on_75(tmp_path: Path, ended: int, told: int) -> None:
    job = job_in(tmp_path)
    write_program(Path(job.program), ended)

    assert start(job, tmp_path).wait(timeout=60) == told

    assert (tmp_path / "requeued").exists() == (ended == 75)
    assert (tmp_path / "ray").read_text().startswith("symmetric-run --address node7:24217 --min-nodes 2 ")
    assert (tmp_path / "arguments").read_text() == "run\njob.yaml\n--address\nnode7:24217\n"
    assert not list(tmp_path.glob("tmp.*"))  # its notes are gone


def test_usr1_stops_the_driver_alone_and_the_job_is_requeued(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    _, started = waiting_program(Path(job.program))
    script = start(job, tmp_path)
    started()

    script.send_signal(signal.SIGUSR1)

    assert script.wait(timeout=60) == 75
    assert (tmp_path / "signal").read_text() == "SIGUSR1"
    assert (tmp_path / "requeued").read_text() == "4217\n"


def test_words_and_environment_come_through(tmp_path: Path) -> None:
    job = job_in(tmp_path, "job.yaml", *NASTY)
    write_program(Path(job.program), 0)
    (tmp_path / "label-reviews.env").write_text("BUCKET='s3://a b'\n")
    write_executable(tmp_path / "bin of it" / "srun", '#!/bin/bash\necho "$BUCKET" >bucket\nexec "$@"\n')

    assert start(job, tmp_path).wait(timeout=60) == 0

    assert (tmp_path / "arguments").read_text(encoding="utf-8").splitlines()[1:-2] == ["job.yaml", *NASTY]
    assert (tmp_path / "bucket").read_text() == "s3://a b\n"


def test_what_slurm_is_asked_for() -> None:
    machines = replace(JOB.machines, nodes=2, gpus=4, cpus=32, memory_gib=128)
    text = rendered(Kind.SLURM, replace(JOB, machines=machines, drain_grace_s=300.0))["label-reviews.sbatch"]

    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
    assert asked["nodes"] == "2"
    assert asked["ntasks-per-node"] == "1"
    assert (asked["gpus-per-node"], asked["cpus-per-task"], asked["mem"]) == ("4", "32", "128G")
    assert {"requeue", "open-mode"} <= asked.keys()
    assert asked["dependency"] == "singleton"
    assert asked["signal"] == "B:USR1@390"  # after it: the grace of 300 s, and what closing takes
    assert "B:USR1@120" in rendered(Kind.SLURM)["label-reviews.sbatch"]
    assert "gpus-per-node" not in rendered(Kind.SLURM)["label-reviews.sbatch"]


def test_line_for_the_login_node_submits_it() -> None:
    assert rendered(Kind.SLURM)["label-reviews.sbatch.crontab"].splitlines()[-1] == (
        "0 2 * * * cd /srv/labels && sbatch --parsable ./label-reviews.sbatch >/dev/null"
    )
