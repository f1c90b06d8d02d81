"""The Kubernetes manifests: the fields that keep a run safe, and the container's shell run here."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from b2batch.cluster.submission import stop_environment
from b2batch.scheduling.manifest import Kind

from .jobs import JOB, rendered, with_arguments
from .programs import waiting_program, write_program


def cron_job(**changes: Any) -> dict[str, Any]:
    text = rendered(Kind.KUBERNETES, replace(JOB, **changes))["label-reviews.cronjob.yaml"]
    return yaml.safe_load(text)  # type: ignore[no-any-return]


def pod_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"]["jobTemplate"]["spec"]["template"]["spec"]  # type: ignore[no-any-return]


def command_of(pod: dict[str, Any], program: Path) -> list[str]:
    """What the container runs, with another program in the job's place."""
    (container,) = pod["containers"]
    command = [argument.replace("$$", "$") for argument in container["command"]]
    return [*command, str(program), *container["args"][1:]]


def test_cron_job_has_what_keeps_its_runs_apart_and_its_tries_bounded() -> None:
    manifest = cron_job()
    spec, pod = manifest["spec"], pod_of(manifest)

    assert (manifest["apiVersion"], manifest["kind"]) == ("batch/v1", "CronJob")
    assert (spec["schedule"], spec["timeZone"]) == ("0 2 * * *", "Etc/UTC")
    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["startingDeadlineSeconds"] > 100  # under 10 s it would never start, by the API's own words
    assert {"successfulJobsHistoryLimit", "failedJobsHistoryLimit"} <= spec.keys()
    assert pod["restartPolicy"] == "Never"  # which podFailurePolicy asks for
    assert pod["terminationGracePeriodSeconds"] > JOB.drain_grace_s
    failing = spec["jobTemplate"]["spec"]["podFailurePolicy"]["rules"][1]
    assert failing == {
        "action": "FailJob",
        "onExitCodes": {"containerName": "b2batch", "operator": "In", "values": [2, 3, 4]},
    }
    (container,) = pod["containers"]
    assert container["name"] == "b2batch"
    assert container["workingDir"] == container["volumeMounts"][0]["mountPath"] == "/srv/labels"


def test_what_a_node_has_is_asked_for() -> None:
    machines = replace(JOB.machines, gpus=2, cpus=8, memory_gib=64, claim="labels")
    pod = pod_of(cron_job(machines=machines))

    resources = pod["containers"][0]["resources"]
    assert resources == {
        "requests": {"cpu": "8", "memory": "64Gi"},
        "limits": {"memory": "64Gi", "nvidia.com/gpu": "2"},
    }
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "labels"
    assert "nvidia.com/gpu" not in str(pod_of(cron_job()))


def test_environment_comes_from_a_secret_that_must_be_there_where_the_job_refers_to_it() -> None:
    def secret(**changes: Any) -> dict[str, Any]:
        source = pod_of(cron_job(**changes))["containers"][0]["envFrom"][0]
        return source["secretRef"]  # type: ignore[no-any-return]

    assert secret() == {"name": "label-reviews-env", "optional": True}
    assert secret(env_names=("BUCKET",)) == {"name": "label-reviews-env", "optional": False}


@pytest.mark.parametrize(
    ("name", "other"), [("Label_Reviews", "label-reviews"), ("a" * 99, "a" * 98), ("a.b", "a-b")]
)
def test_names_are_those_that_kubernetes_takes_and_stay_apart(name: str, other: str) -> None:
    names = [replace(JOB, name=each).object_name for each in (name, other)]

    assert len(set(names)) == 2
    assert all(len(each) <= 40 and each.strip("-") == each == each.lower() for each in names)
    assert not any(set(each) & set("._") for each in names)


@pytest.mark.parametrize(("ended", "told"), [(0, 0), (1, 1), (2, 2), (75, 75), (99, 0)])
def test_container_ends_with_the_runs_code_but_for_99(tmp_path: Path, ended: int, told: int) -> None:
    program = write_program(tmp_path / "b2batch", ended)

    code = subprocess.run(command_of(pod_of(cron_job()), program), cwd=tmp_path, check=False).returncode

    assert code == told
    assert (tmp_path / "arguments").read_text() == "run\njob.yaml\n"


def test_sigterm_reaches_the_run_and_its_code_is_told(tmp_path: Path) -> None:
    program, started = waiting_program(tmp_path / "b2batch")
    pod = subprocess.Popen(command_of(pod_of(cron_job()), program), cwd=tmp_path)
    started()

    pod.send_signal(signal.SIGTERM)

    assert pod.wait(timeout=30) == 75
    assert (tmp_path / "signal").read_text() == "SIGTERM"


def test_ray_job_and_its_schedule_are_one_job() -> None:
    machines = replace(JOB.machines, nodes=3, gpus=1)
    files = {
        name: yaml.safe_load(text)
        for name, text in rendered(Kind.RAY_JOB, replace(JOB, machines=machines)).items()
    }
    job, cron = files["label-reviews.rayjob.yaml"], files["label-reviews.raycronjob.yaml"]

    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert (cron["apiVersion"], cron["kind"]) == ("ray.io/v1", "RayCronJob")
    assert cron["spec"] == {"schedule": "0 2 * * *", "jobTemplate": job["spec"]}
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 2
    for group in (cluster["headGroupSpec"], workers):
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"] == "example.org/b2batch"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert job["spec"]["preRunningDeadlineSeconds"] > 0
    stop = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]
    assert stop == stop_environment(JOB.drain_grace_s), "as `submit` tells Ray"


@pytest.mark.parametrize(("ended", "told"), [(0, 0), (1, 1), (99, 0)])
def test_entrypoint_of_a_ray_job(tmp_path: Path, ended: int, told: int) -> None:
    program = write_program(tmp_path / "b2batch", ended)
    job = with_arguments(["a b.yaml"], directory=str(tmp_path), program=str(program))
    manifest = yaml.safe_load(rendered(Kind.RAY_JOB, job)["label-reviews.rayjob.yaml"])

    code = subprocess.run(
        manifest["spec"]["entrypoint"], shell=True, executable="/bin/bash", check=False, env={**os.environ}
    ).returncode

    assert code == told
    assert (tmp_path / "arguments").read_text() == "run\na b.yaml\n--address\nauto\n"
