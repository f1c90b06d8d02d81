"""The verbs for jobs on a cluster, against one that only remembers: what is sent, said and returned."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest
import yaml
from fake_jobs import URL, FakeJobs

from b2batch.cluster import dashboard
from b2batch.cluster.package import JOB_FILE
from b2batch.cluster.submission import JobState, SubmittedJob

from .command import b2batch, write_job
from .finished_job import finish_job

ROWS = ['{"text": "很好"}']
END = {"exit_code": 3, "reason": "too many", "wall_s": 1.0, "run": None}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeJobs:
    jobs = FakeJobs()
    monkeypatch.setattr(dashboard, "Dashboard", lambda url: jobs)
    monkeypatch.setattr(dashboard, "find_dashboard", lambda address: URL)
    monkeypatch.setattr("b2batch.exposure.open_dashboard", lambda url: None)
    return jobs


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_job(tmp_path, ROWS)


def ends(code: int | None, state: JobState = JobState.FAILED) -> SubmittedJob:
    return SubmittedJob("", state, "/out", exit_code=code)


def sent_job(cluster: FakeJobs) -> dict[str, dict[str, object]]:
    content = cluster.requests[-1].working_dir
    assert isinstance(content, bytes)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return dict(yaml.safe_load(archive.read(JOB_FILE)))


def test_a_submitted_job_is_the_whole_job(cluster: FakeJobs, job: Path, tmp_path: Path) -> None:
    said = b2batch(
        "submit", job, "--set", "sampling.seed=7", "-n", "1", "--overwrite", "--json", "--tick", "auto"
    )

    assert said.exit_code == 0, said.output
    [request] = cluster.requests
    assert json.loads(said.stdout) == {
        "submission_id": request.submission_id,
        "address": URL,
        "output": str(tmp_path / "out"),
    }
    assert request.entrypoint == f"exec b2batch run {JOB_FILE} --overwrite --tick auto"
    assert (sent_job(cluster)["sampling"]["seed"], sent_job(cluster)["input"]["limit"]) == (7, 1)


def test_ray_gives_a_stopped_job_the_time_to_drain(cluster: FakeJobs, job: Path, tmp_path: Path) -> None:
    environment = tmp_path / "env.yaml"
    environment.write_text("pip: [wheel]\nenv_vars: {A: b}\n")

    b2batch("submit", job, "--set", "cluster.drain_grace_s=100", "--runtime-env", environment)

    assert cluster.requests[0].runtime_env == {
        "pip": ["wheel"],
        "env_vars": {"A": "b", "RAY_JOB_STOP_WAIT_TIME_S": "160"},
    }


@pytest.mark.parametrize("text", ["working_dir: x", "env_vars: {A: 1}", "env_vars: [A]", "- a"])
def test_a_wrong_environment_is_refused(cluster: FakeJobs, job: Path, tmp_path: Path, text: str) -> None:
    environment = tmp_path / "env.yaml"
    environment.write_text(text)

    assert b2batch("submit", job, "--runtime-env", environment).exit_code == 2
    assert cluster.requests == []


def test_a_zip_in_object_storage_has_the_job_file_in_it(cluster: FakeJobs, job: Path, tmp_path: Path) -> None:
    uri, overrides = "s3://bucket/jobs.zip", ["--set", "prompt.system='a b'"]

    assert b2batch("submit", job.name, "--working-dir", uri, *overrides).exit_code == 0
    assert b2batch("submit", job, "--working-dir", uri).exit_code == 2

    [request] = cluster.requests
    assert request.working_dir == uri
    assert request.entrypoint == (
        """exec b2batch run job.yaml --set 'prompt.system='"'"'a b'"'"'' """
        f"-i {tmp_path}/rows.jsonl -o {tmp_path}/out --address auto"
    )


def test_the_same_job_is_submitted_once_at_a_time(cluster: FakeJobs, job: Path) -> None:
    b2batch("submit", job)
    [first] = cluster.known

    again = b2batch("submit", job, "--wait")
    assert again.exit_code == 99
    assert f"running already, as {first}" in again.stderr

    cluster.end(first, JobState.STOPPED)
    assert b2batch("submit", job).exit_code == 0
    assert list(cluster.known) == [first, f"{first}-2"]
    assert b2batch("submit", job, "--submission-id", first).exit_code == 2
    assert b2batch("submit", job, "--submission-id", "mine").exit_code == 0


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 75, 99, 130, 143])
def test_waiting_ends_with_the_jobs_code(cluster: FakeJobs, job: Path, code: int) -> None:
    cluster.ends = [ends(code, JobState.FAILED if code else JobState.SUCCEEDED)]

    said = b2batch("submit", job, "--wait")

    assert said.exit_code == code
    assert f"(exit {code})" in said.stdout


def test_waiting_shows_the_log_and_tells_programs_the_end(cluster: FakeJobs, job: Path) -> None:
    cluster.ends = [ends(3)]
    b2batch("submit", job)
    [first] = cluster.known
    cluster.end(first, JobState.FAILED, 3)
    cluster.log[f"{first}-2"] = f"planning\n{json.dumps(END)}\n"
    cluster.ends = [ends(3)]

    said = b2batch("submit", job, "--wait", "--json")

    assert said.exit_code == 3
    assert "planning\n" in said.stderr
    told = json.loads(said.stdout)
    assert (told["exit_code"], told["reason"], told["job"]["submission_id"]) == (3, "too many", f"{first}-2")


def test_a_cluster_without_b2batch_is_told_as_such(cluster: FakeJobs, job: Path) -> None:
    cluster.ends = [ends(127)]

    said = b2batch("submit", job, "--wait")

    assert said.exit_code == 2
    assert "no command b2batch on the PATH" in said.stderr


def test_a_wrong_job_is_never_sent(cluster: FakeJobs, job: Path) -> None:
    assert b2batch("submit", job, "--set", "model.bogus=1").exit_code == 2
    assert b2batch("submit", "nowhere.yaml").exit_code == 2
    assert b2batch("submit", job, "--working-dir", "nowhere").exit_code == 2
    assert cluster.requests == []


def test_jobs_are_found_stopped_and_read_by_their_file(cluster: FakeJobs, job: Path) -> None:
    b2batch("submit", job)
    [first] = cluster.known
    cluster.log[first] = "planning\n"

    assert b2batch("logs", job).stdout == "planning\n"
    assert json.loads(b2batch("list", "--json").stdout)[0]["state"] == "running"
    stopped = json.loads(b2batch("stop", job, "--json").stdout)
    assert (stopped["exit_code"], stopped["job"]["state"]) == (75, "stopped")
    assert cluster.stopped == [first]
    again = b2batch("stop", first)
    assert again.exit_code == 0
    assert "stopped (exit 75)" in again.stdout
    assert cluster.stopped == [first], "it had ended"
    followed = json.loads(b2batch("logs", "-f", first, "--json").stdout)
    assert followed["log"].startswith("stopping")
    assert f"{first}  stopped" in b2batch("list").stdout
    other = b2batch("stop", job, "--no-wait", "--address", "x")
    assert other.exit_code == 0
    assert b2batch("logs", "never").exit_code == 2


def test_a_job_that_was_never_submitted_is_told_so(cluster: FakeJobs, job: Path) -> None:
    never = b2batch("stop", job)

    assert never.exit_code == 2
    assert "b2batch list" in never.stderr


def test_status_of_a_submission_is_that_of_its_run(cluster: FakeJobs, tmp_path: Path) -> None:
    finish_job(tmp_path, num_rows=4)
    cluster.add("x", output=str(tmp_path / "out"))

    said = b2batch("status", "x", "--address", URL)
    assert "job          x: running" in said.stdout
    assert "4: 4 ok, 0 errors" in said.stdout
    assert (
        json.loads(b2batch("status", "x", "--address", URL, "--json").stdout)["run"]["counts"]["num_ok"] == 4
    )

    cluster.add("y", output=str(tmp_path / "elsewhere"))
    assert "not seen from here" in b2batch("status", "y", "--address", URL).stdout


def test_status_finds_the_directory_that_a_run_named(cluster: FakeJobs, tmp_path: Path) -> None:
    finish_job(tmp_path, num_rows=4, output={"path": str(tmp_path / "out-{run8}")})
    [directory] = tmp_path.glob("out-*")
    cluster.add("x", output=str(tmp_path / "out-{run8}"))
    assert "names no run yet" in b2batch("status", "x", "--address", URL).stdout

    cluster.log["x"] = f"INFO run {directory.name.removeprefix('out-')} epoch 1: 4 rows in 2 units\n"

    assert "4: 4 ok" in b2batch("status", "x", "--address", URL).stdout


def test_an_open_dashboard_is_warned_of(
    cluster: FakeJobs, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from b2batch.exposure import OpenPort

    monkeypatch.setattr(
        "b2batch.exposure.open_dashboard", lambda url: OpenPort(f"the dashboard at {url}", is_local=False)
    )

    said = b2batch("submit", job)

    assert said.exit_code == 0
    assert "takes orders from everybody who reaches it: set RAY_AUTH_MODE=token" in said.stderr
