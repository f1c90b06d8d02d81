"""Whole jobs on real Ray actors: the promise that every input row comes back exactly once."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from b2batch.assets import REVIEWS_SAMPLE
from b2batch.errors import (
    Drained,
    DriftError,
    ErrorBudgetExceeded,
    Fenced,
    InputError,
    ModelError,
    RunLocked,
)
from b2batch.job import RunOptions, run_job
from b2batch.outputs import lease
from b2batch.outputs.footer import read_footer
from b2batch.outputs.lock import break_lock, find_lock
from b2batch.spec import parse_spec

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TEMPLATE = "请判断下面这条评论的情感倾向,只回答“正面”或“负面”。\n{{ text }}"


def make_spec(output, path=REVIEWS_SAMPLE, **sections):
    document = {
        "model": {"model": "baichuan2-tiny"},
        "input": {"path": str(path), "rows_per_unit": 20},
        "prompt": {"template": TEMPLATE},
        "sampling": {"max_tokens": 24, "temperature": 4.0, "seed": 3, "ignore_eos": True},
        "engine": {"max_num_seqs": 4},
        "output": {"path": str(output)},
        "cluster": {"replicas": 1},  # each costs ten seconds of a core to start
    }
    for name, keys in sections.items():
        document[name] = document.get(name, {}) | keys
    return parse_spec(document)


def read_rows(output):
    """The output without what tells how it was made: rows by id, in order."""
    table = pq.read_table(output)
    rows = sorted(table.to_pylist(), key=lambda row: int(row["row_id"].partition(":")[2]))
    assert len({row["row_id"] for row in rows}) == len(rows), "a row stands twice"
    return rows


def parts(output):
    return {path.name: path.stat().st_mtime_ns for path in Path(output).glob("part-*.parquet")}


def worker_pid(part):
    return int(read_footer(part.read_bytes(), part.name).worker_id.rpartition("-")[2])


@pytest.fixture(scope="module")
def calm(ray_cluster, tmp_path_factory):
    """An undisturbed run with one replica: its result and its rows."""
    output = tmp_path_factory.mktemp("calm") / "out"
    result = run_job(make_spec(output))
    return result, read_rows(output)


DRIVER = """
import sys
from b2batch.job import run_job
from b2batch.spec import load_spec
run_job(load_spec(sys.argv[1]))
"""


def start_driver(job_file, tmp_path):
    environment = os.environ | {"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(job_file)],
        env=environment,
        stderr=subprocess.PIPE,
    )


def descendants(pid):
    """The processes below ``pid``: those of the cluster that a driver started for itself."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return below - {pid}


def title(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def assert_gone(pids, timeout_s):
    deadline_s = time.monotonic() + timeout_s
    while left := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline_s, f"{left} outlived their driver"
        time.sleep(0.05)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@dataclass(frozen=True)
class KilledDriver:
    """What a driver with a cluster of its own left when it was killed in the middle of its run."""

    output: Path
    parts: dict[str, int]
    cluster: set[int]  # processes


@pytest.fixture(scope="module")
def killed_driver(calm, tmp_path_factory):
    directory = tmp_path_factory.mktemp("killed")
    output = directory / "out"
    spec = make_spec(output, cluster={"address": "local"})
    job_file = directory / "job.json"  # JSON is YAML
    job_file.write_text(json.dumps(spec.model_dump(mode="json")), encoding="utf-8")
    driver = start_driver(job_file, directory)
    deadline_s = time.monotonic() + 200
    while not parts(output) and driver.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.02)  # another process works: there is nothing else to wait on
    with pytest.raises(RunLocked, match=f"pid {driver.pid}"):
        run_job(spec)
    cluster = descendants(driver.pid)
    replicas = [pid for pid in cluster if "_ReplicaActor" in title(pid)]
    driver.kill()
    driver.communicate()
    assert replicas
    assert_gone(replicas, 10.0)
    return KilledDriver(output, parts(output), cluster)


def test_a_killed_driver_resumes_and_its_twin_is_locked_out(killed_driver, calm):
    before = killed_driver.parts
    assert 0 < len(before) < 10, "killed in the middle"
    result = run_job(make_spec(killed_driver.output))
    assert result.num_rows_resumed >= 20 * len(before)
    assert parts(killed_driver.output).items() >= before.items(), "committed units were not run again"
    assert read_rows(killed_driver.output) == calm[1]


def test_every_row_comes_back_once_and_a_second_run_does_nothing(ray_cluster, calm, tmp_path):
    spec = make_spec(tmp_path / "out", cluster={"replicas": 2})
    first = run_job(spec)
    before = parts(tmp_path / "out")
    second = run_job(spec)
    num_lines = len(REVIEWS_SAMPLE.read_text(encoding="utf-8").splitlines())
    assert first.counts.num_ok == num_lines
    assert second.num_rows_resumed == num_lines
    assert parts(tmp_path / "out") == before
    assert (tmp_path / "out" / "_SUCCESS").exists()
    assert read_rows(tmp_path / "out") == calm[1], "two replicas answer as one does"


def test_batch_size_does_not_change_answers(ray_cluster, calm, tmp_path):
    run_job(make_spec(tmp_path / "out", engine={"max_num_seqs": 64}, input={"rows_per_unit": 64}))
    assert read_rows(tmp_path / "out") == calm[1]


def test_a_killed_replica_is_replaced_and_nothing_is_lost(ray_cluster, calm, tmp_path):
    output = tmp_path / "out"
    killed = []

    def kill_a_replica(progress):
        there = sorted(output.glob("part-*.parquet"))
        if there and not killed:
            killed.append(worker_pid(there[0]))
            os.kill(killed[0], signal.SIGKILL)

    result = run_job(make_spec(output), RunOptions(on_progress=kill_a_replica))
    assert killed
    assert result.num_replicas_lost >= 1
    assert read_rows(output) == calm[1]


def test_one_row_in_a_thousand_that_kills_its_process_becomes_its_error(ray_cluster, poison, tmp_path):
    output, source = tmp_path / "out", tmp_path / "rows.jsonl"
    rows = [{"text": f"第{number}条评论很好"} for number in range(1000)]
    rows[700] = {"text": poison}
    source.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    spec = make_spec(
        output,
        source,
        input={"rows_per_unit": 256},
        prompt={"template": "{{ text }}", "chat": False},
        sampling={"max_tokens": 1},
        engine={"max_num_seqs": 64},
        cluster={"replicas": 2},
    )
    result = run_job(spec)
    assert (result.counts.num_ok, result.counts.num_error) == (999, 1)
    assert result.num_replicas_lost <= 5, "four, and one more if its unit was copied meanwhile"
    assert result.num_attempts <= 12
    assert len(parts(output)) == 4
    errors = [(row["row_id"], row["error"]) for row in read_rows(output) if row["error"]]
    assert [(row_id, error["type"], error["stage"]) for row_id, error in errors] == [
        ("0:700", "WORKER_CRASH", "crash")
    ]


def test_while_it_waits_for_nodes_it_keeps_its_lease_and_hears_a_stop(ray_cluster, tmp_path):
    output = tmp_path / "out"
    spec = make_spec(output, cluster={"gpus_per_replica": 64, "start_timeout_s": 60})
    asked = []

    def should_stop():
        asked.append(next(output.glob("__b2batch/*/heartbeat.json"), None))
        return len(asked) > 3

    with pytest.raises(Drained, match="while it waited for nodes"):
        run_job(spec, RunOptions(should_stop=should_stop))
    assert asked[-1] is not None
    status = json.loads(next(output.glob("__b2batch/*/status.json")).read_text())
    assert (status["state"], status["exit_code"]) == ("drained", 75)


def test_a_drained_run_goes_on_where_it_stopped(ray_cluster, calm, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(Drained):
        run_job(make_spec(output), RunOptions(should_stop=lambda: bool(parts(output))))
    before = parts(output)
    assert 0 < len(before) < 10
    assert not (output / "_SUCCESS").exists()
    result = run_job(make_spec(output))
    assert result.num_rows_resumed == 20 * len(before)
    assert parts(output).items() >= before.items(), "committed parts are left as they are"
    assert read_rows(output) == calm[1]


def test_a_run_whose_lock_is_broken_cannot_finish_and_the_next_one_does(
    ray_cluster, calm, tmp_path, monkeypatch
):
    monkeypatch.setattr(lease, "BEAT_INTERVAL_S", 0.0)
    output = tmp_path / "out"
    spec = make_spec(output)
    broken_by = []

    def break_its_lock(progress):
        if progress.num_units_committed and not broken_by:
            broken_by.append(break_lock(str(output), find_lock(str(output)).lease, force=True))

    with pytest.raises(Fenced, match="epoch 2 took it over"):
        run_job(spec, RunOptions(on_progress=break_its_lock))
    assert broken_by == [2]
    assert not (output / "_SUCCESS").exists()
    before = parts(output)
    assert 0 < len(before) < 10, "broken in the middle"
    result = run_job(spec)
    assert result.num_rows_resumed >= 20 * len(before)
    assert parts(output).items() >= before.items()
    assert read_rows(output) == calm[1]


def test_drift_is_refused_with_what_changed(ray_cluster, tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"text": "很好"}\n{"text": "不好"}\n', encoding="utf-8")
    run_job(make_spec(tmp_path / "out", source))
    with pytest.raises(DriftError, match=r"sampling\.temperature.*4\.0.*0\.5"):
        run_job(make_spec(tmp_path / "out", source, sampling={"temperature": 0.5}))
    source.write_text('{"text": "很好"}\n{"text": "还行"}\n', encoding="utf-8")
    with pytest.raises(DriftError, match=r"rows\.jsonl"):
        run_job(make_spec(tmp_path / "out", source))
    result = run_job(make_spec(tmp_path / "out", source), RunOptions(overwrite=True))
    assert result.counts.num_rows == 2
    assert [row["text"] for row in read_rows(tmp_path / "out")] == ["很好", "还行"]


def test_too_many_bad_rows_end_over_budget_with_all_rows_there(ray_cluster, tmp_path):
    source = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": "很好"})] * 5 + ["{"] * 20
    source.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ErrorBudgetExceeded, match="20 of 25 rows failed"):
        run_job(make_spec(tmp_path / "out", source))
    forgiven = run_job(make_spec(tmp_path / "out", source, errors={"max_error_rate": 0.9}))
    assert forgiven.num_rows_resumed == 25
    assert json.loads((tmp_path / "out" / "_SUCCESS").read_text())["partial"] is False
    statuses = [row["status"] for row in read_rows(tmp_path / "out")]
    assert statuses == ["ok"] * 5 + ["error"] * 20


def test_an_empty_input_is_a_finished_run_with_a_schema(ray_cluster, tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b"\n\n")
    spec = make_spec(tmp_path / "out", source, prompt={"template": "always the same"})
    result = run_job(spec)
    assert (result.counts.num_rows, result.num_skipped_blank) == (0, 2)
    assert "generated_text" in pq.read_table(tmp_path / "out").schema.names


def test_what_the_caller_got_wrong_is_refused_before_anything_is_written(tmp_path):
    output = tmp_path / "out"
    with pytest.raises(InputError, match=r"no/such"):
        run_job(make_spec(output, "no/such.jsonl"))
    with pytest.raises(ModelError, match=r"model\.model.*no-such-model"):
        run_job(make_spec(output, model={"model": "./no-such-model"}))
    assert not output.exists()


def test_nothing_of_a_killed_drivers_cluster_outlives_it(killed_driver):
    """The last test here: an agent of Ray that lost its cluster tries to say so for a minute."""
    assert_gone(killed_driver.cluster, 90.0)
