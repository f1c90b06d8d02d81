"""``b2batch schedule`` as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest

from .command import b2batch, write_job

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "configs" / "clusters"
OFTEN = ["--cron", "0 2 * * *"]
ON_MACHINE = ["--directory", "/srv/labels", "--program", "/opt/b2batch/bin/b2batch"]
IN_IMAGE = ["--directory", "/srv/labels", "--image", "example.org/b2batch:0.1.0"]
SLURM = ["--nodes", "2", "--gpus", "4", "--cpus", "32", "--memory-gib", "128"]
COMMANDS = {
    "cron": ["cron", *ON_MACHINE],
    "systemd": ["systemd", *ON_MACHINE],
    "slurm": ["slurm", *ON_MACHINE, *SLURM],
    "airflow": ["airflow", *ON_MACHINE, "--time-zone", "Asia/Shanghai"],
    "kubernetes": ["kubernetes", *IN_IMAGE],
    "ray-job": ["kubernetes", *IN_IMAGE, "--ray-job", "--nodes", "3"],
}


def write_example(kind: str, directory: Path) -> None:
    command, *options = COMMANDS[kind]
    overrides = ["--set", "output.path=out/label_reviews/{run8}"]
    job = ["jobs/label_reviews.yaml", *OFTEN, *overrides]
    ended = b2batch("schedule", command, *job, *options, "-o", directory)
    assert ended.exit_code == 0, ended.output


def test_examples_are_what_the_verb_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for kind in COMMANDS:
        write_example(kind, tmp_path)

    written = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_text(encoding="utf-8") for path in EXAMPLES.iterdir()}


def test_files_go_to_a_directory_and_the_next_times_are_told(tmp_path: Path) -> None:
    job = write_job(tmp_path, [])

    ended = b2batch("schedule", "systemd", job, "--cron", "30 4 1 1 *", "-o", tmp_path / "units")

    assert ended.exit_code == 0
    assert {path.name for path in (tmp_path / "units").iterdir()} == {"job.service", "job.timer"}
    assert ended.stdout.count("-01-01 04:30") == 3
    assert "enable --now job.timer" in ended.stdout


def test_stdout_has_the_files_alone(tmp_path: Path) -> None:
    ended = b2batch("schedule", "cron", write_job(tmp_path, []), *OFTEN)

    lines = ended.stdout.splitlines()
    assert [line for line in lines if not line.startswith("#")] == lines[-1:]
    assert lines[-1].startswith("0 2 * * * cd ")
    assert "02:00" in ended.stderr


def test_fixed_output_is_told_of(tmp_path: Path) -> None:
    job = write_job(tmp_path, [])

    assert "{run8}" in b2batch("schedule", "cron", job, *OFTEN).stderr
    of_each_run = ["--set", "output.path=out/{run8}"]
    assert "{run8}" not in b2batch("schedule", "cron", job, *OFTEN, *of_each_run).stderr


def test_same_again_is_no_fault_but_a_changed_file_is_not_replaced(tmp_path: Path) -> None:
    job = write_job(tmp_path, [])
    command = ["schedule", "cron", job, *OFTEN, "-o", tmp_path]
    assert b2batch(*command).exit_code == b2batch(*command).exit_code == 0
    (tmp_path / "job.crontab").write_text("mine")

    ended = b2batch(*command)

    assert ended.exit_code == 2
    assert "exists and differs" in ended.stderr
    assert (tmp_path / "job.crontab").read_text() == "mine"


@pytest.mark.parametrize("kind", COMMANDS)
def test_no_value_of_the_environment_is_written(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUCKET_KEY", "hunter2hunter2")
    job = write_job(tmp_path, [], input={"path": "s3://${env:BUCKET_KEY}@store/rows.jsonl"})
    command, *options = COMMANDS[kind]

    ended = b2batch("schedule", command, job, *OFTEN, *options)

    assert ended.exit_code == 0, ended.output
    assert "BUCKET_KEY" in ended.stdout  # where it goes is told
    assert "hunter2" not in ended.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["cron", "--cron", "61 * * * *"], "Bad minute"),
        (["cron", *OFTEN, "--gpus", "1"], "--gpus: of no use for cron"),
        (["systemd", *OFTEN, "--image", "x"], "--image: of no use for systemd"),
        (
            ["kubernetes", *OFTEN, "--image", "x", "--nodes", "2"],
            "--nodes: of no use for kubernetes as asked",
        ),
        (["kubernetes", *OFTEN], "--image: kubernetes needs an image"),
        (["slurm", *OFTEN, "--ray-job"], "--ray-job is of kubernetes"),
        (["cron", *OFTEN, "--time-zone", "UTC"], "takes that of the machine"),
        (["airflow", *OFTEN, "--time-zone", "Mars/Olympus"], "is none that is known here"),
        (["systemd", *OFTEN, "--program", "b2batch"], "needs an absolute path"),
        (["cron", *OFTEN, "--set", "nosuch.key=1"], "nosuch"),
        (["cron", *OFTEN, "--set", "output.path=s3://key:secretsecret@bucket/out"], "a password or key"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_written(
    options: list[str], message: str, tmp_path: Path
) -> None:
    job = write_job(tmp_path, [])
    kind, *rest = options

    ended = b2batch("schedule", kind, job, *rest, "-o", tmp_path / "files")

    assert ended.exit_code == 2
    assert message in ended.stderr
    assert not (tmp_path / "files").exists()


TICKING = ["input: {path: in, incremental: true}", 'schedule: {cron: "0 2 * * *", timezone: Asia/Shanghai}']


def write_ticking(directory: Path, *lines: str) -> Path:
    path = directory / "ticking.yaml"
    model = "model: {model: baichuan2-tiny}\nprompt: {column: text}\nsampling: {max_tokens: 4}\n"
    path.write_text(model + "\n".join(lines or (*TICKING, "output: {path: out}")))
    return path


def test_a_job_of_ticks_is_run_by_them_on_its_own_cron(tmp_path: Path) -> None:
    job = write_ticking(tmp_path)

    timer = b2batch("schedule", "systemd", job)
    line = b2batch("schedule", "cron", job, "--cron", "0 18 * * *").stdout.splitlines()[-1]

    assert "OnCalendar=*-*-* 02:00:00 Asia/Shanghai" in timer.stdout
    assert f'"{job}" "--tick" "auto"' in timer.stdout
    assert line.startswith("0 18 * * * cd ")
    assert f"{job} --tick auto >>" in line


def test_a_job_whose_ticks_would_share_an_output_is_refused(tmp_path: Path) -> None:
    job = write_ticking(tmp_path, "input: {path: in}", TICKING[1], "output: {path: out}")

    ended = b2batch("schedule", "cron", job)

    assert ended.exit_code == 2
    assert "each tick needs an output of its own" in ended.output


def test_without_any_cron_nothing_is_written(tmp_path: Path) -> None:
    ended = b2batch("schedule", "cron", write_job(tmp_path, []))

    assert ended.exit_code == 2
    assert "--cron: is needed" in ended.output


@pytest.mark.parametrize("kind", ["cron", "systemd", "airflow", "kubernetes"])
def test_a_job_is_submitted_to_a_cluster_that_stands(kind: str, tmp_path: Path) -> None:
    command, *options = COMMANDS[kind]
    url = "http://ray-head:8265"
    ended = b2batch(
        "schedule",
        command,
        write_job(tmp_path, []),
        *OFTEN,
        *options,
        "--submit",
        url,
        "-o",
        tmp_path / "out",
    )

    assert ended.exit_code == 0, ended.output
    text = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "out").iterdir())
    words = text.replace('"', " ").replace("'", " ").replace(",", " ").replace("- ", " ").split()
    assert words[words.index("submit") :][:5:2] == ["submit", "--address", "--wait"]
    assert url in words


@pytest.mark.parametrize("kind", ["slurm", "ray-job"])
def test_what_starts_its_own_cluster_submits_to_none(kind: str, tmp_path: Path) -> None:
    command, *options = COMMANDS[kind]
    ended = b2batch(
        "schedule", command, write_job(tmp_path, []), *OFTEN, *options, "--submit", "http://ray-head:8265"
    )
    assert ended.exit_code == 2
    assert "--submit" in ended.output
