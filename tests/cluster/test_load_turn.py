"""Replicas of one node take turns in loading; as processes, as their locks are."""

import multiprocessing
from multiprocessing.connection import Connection, wait
from pathlib import Path

import pytest

from b2batch.cluster.load_turn import LoadTurn, num_loads

CONTEXT = multiprocessing.get_context("spawn")
GB = 10**9


@pytest.mark.parametrize(
    ("load_bytes", "node_bytes", "expected"),
    [(60 * GB, 512 * GB, 6), (60 * GB, 64 * GB, 1), (600 * GB, 64 * GB, 1), (0, GB, 32), (1, GB, 32)],
)
def test_so_many_load_at_once_as_fit_and_never_none(load_bytes, node_bytes, expected):
    assert num_loads(load_bytes, node_bytes) == expected


def load(directory: Path, test: Connection) -> None:
    with LoadTurn(10, directory, node_bytes=25):  # two at once
        test.send("loading")
        test.recv()


@pytest.mark.parametrize("is_killed", [False, True])
def test_who_comes_too_early_waits_until_another_has_loaded_or_died(tmp_path, is_killed):
    process_of = {}
    for _ in range(3):
        ours, theirs = CONTEXT.Pipe()
        process_of[ours] = CONTEXT.Process(target=load, args=(tmp_path / "places", theirs), daemon=True)
        process_of[ours].start()
    loading = [next_of(process_of, [])]
    loading.append(next_of(process_of, loading))
    assert not wait(process_of.keys() - loading, timeout=0.5)
    if is_killed:
        process_of[loading[0]].kill()
    else:
        loading[0].send("go on")
    last = next_of(process_of, loading)
    for pipe in (loading[1], last):
        pipe.send("go on")
    for process in process_of.values():
        process.join(timeout=60)
    assert sorted(process.exitcode for process in process_of.values()) == [-9 if is_killed else 0, 0, 0]


def next_of(pipes, loading):
    """Whoever else says that it loads."""
    ready = wait([pipe for pipe in pipes if pipe not in loading], timeout=60)
    assert ready, "nobody loads"
    assert ready[0].recv() == "loading"
    return ready[0]


def test_where_no_file_can_be_locked_everybody_loads(tmp_path):
    (tmp_path / "file").touch()
    with LoadTurn(10, tmp_path / "file", node_bytes=10), LoadTurn(10, tmp_path / "file", node_bytes=10):
        pass
