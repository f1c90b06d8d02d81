"""kill -9 and SIGSTOP of a replica at every step of its work, with the real model and driver, without Ray.

The driver's own steps F1-F3 and F7-F13 are in ``tests/outputs/test_crash.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from b2batch.bench.invariants import OutputWatch, Row, check_finished, read_rows
from b2batch.errors import B2BatchError
from b2batch.proof import verify_output

from .local_job import NUM_REPLICAS, NUM_ROWS, make_spec, run_locally
from .mutants import MUTANTS, planted
from .process_fleet import DEATHS, ReplicaPlan

pytestmark = pytest.mark.slow

DIRECTED = {  # where a replica must suffer so that the bug shows
    "write in place": "F7:kill",
    "marker before data": "F9:kill",
    "attempt-unique names": "F6:stop",
}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Row]:
    output = tmp_path_factory.mktemp("calm")
    run_locally(make_spec(output))
    return read_rows(output)


def suffer_first(failpoint: str, mutant: str = "") -> Callable[[int], ReplicaPlan]:
    """The first replicas suffer, those that replace them are well; all have the same bug."""
    return lambda replica_id: ReplicaPlan(failpoint if replica_id < NUM_REPLICAS else "", mutant)


def find_violations(output: Path, calm: Sequence[Row], failpoint: str, mutant: str) -> list[str]:
    """What a reader finds wrong while and after a replica suffers; strays go on when the run has ended."""
    watch, problems = OutputWatch(output), []
    try:
        with planted(mutant):
            run = run_locally(
                make_spec(output), suffer_first(failpoint, mutant), lambda: problems.extend(watch.look())
            )
    except (B2BatchError, OSError) as error:
        return [*problems, str(error)]
    for stray in run.strays:
        stray.go_on()
    return [*problems, *watch.look(), *check_finished(output, calm)]


@pytest.mark.parametrize("failpoint", ["F4:kill", "F4:kill:2", "F5:kill", "F6:kill", "F7:kill", "F8:kill"])
def test_a_replica_killed_at_any_step_costs_work_and_no_row(tmp_path: Path, calm, failpoint: str) -> None:
    assert find_violations(tmp_path, calm, failpoint, mutant="") == []
    assert verify_output(str(tmp_path)).problems == ()


def test_a_unit_that_was_committed_before_the_kill_is_not_computed_again(tmp_path: Path, calm) -> None:
    run = run_locally(make_spec(tmp_path), suffer_first("F9:kill"))
    assert run.totals.num_replicas_lost >= 1, "the other may have come too late to suffer"
    assert run.totals.counts.num_ok == NUM_ROWS
    assert check_finished(tmp_path, calm) == []


def test_the_commit_of_a_late_zombie_loses(tmp_path: Path, calm) -> None:
    run = run_locally(make_spec(tmp_path), suffer_first("F6:stop"))
    watch = OutputWatch(tmp_path)
    watch.look()
    assert run.strays
    for zombie in run.strays:
        assert not zombie.go_on()[0].newly_committed
    assert [*watch.look(), *check_finished(tmp_path, calm)] == []


@pytest.mark.parametrize("death", DEATHS)
def test_a_replica_that_dies_in_any_way_is_replaced(tmp_path: Path, calm, death: str) -> None:
    run = run_locally(
        make_spec(tmp_path), lambda replica_id: ReplicaPlan(death=death if replica_id < NUM_REPLICAS else "")
    )
    assert run.totals.num_replicas_lost >= 1
    assert check_finished(tmp_path, calm) == []


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_planted_bug_is_found(tmp_path: Path, calm, mutant: str) -> None:
    assert find_violations(tmp_path, calm, DIRECTED[mutant], mutant)
