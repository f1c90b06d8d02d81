"""The DAG file, with a stand-in for Airflow; its command run by bash."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from b2batch.scheduling.manifest import Kind

from .airflow_stand_in import AirflowFailException, BashOperator, load_dag
from .jobs import NASTY, rendered, with_arguments
from .programs import write_program


def execute(operator: BashOperator) -> int:
    """As the BashOperator: the exit code, or what its output processor raises after code 0."""
    ended = subprocess.run(
        ["bash", "-c", operator.rendered_command()], stdout=subprocess.PIPE, text=True, check=False
    )
    if ended.returncode == 0:
        operator.output_processor(ended.stdout.splitlines()[-1])
    return ended.returncode


def operator_in(directory: Path, code: int, *arguments: str) -> BashOperator:
    program = write_program(directory / "b2batch", code)
    job = with_arguments(arguments or ("job.yaml",), directory=str(directory), program=str(program))
    return load_dag(rendered(Kind.AIRFLOW, job)["label-reviews.py"]).operator


def test_dag_runs_one_at_a_time_and_makes_up_for_nothing() -> None:
    dag = load_dag(rendered(Kind.AIRFLOW)["label-reviews.py"])

    assert (dag.dag_id, dag.schedule, dag.start_date[1]) == ("label-reviews", "0 2 * * *", "Etc/UTC")
    assert (dag.catchup, dag.max_active_runs) == (False, 1)
    assert dag.operator.skip_on_exit_code == 99
    assert dag.operator.retries > 0


@pytest.mark.parametrize("code", [0, 1, 75, 99, 143])
def test_codes_that_are_skipped_or_tried_again_are_told(tmp_path: Path, code: int) -> None:
    assert execute(operator_in(tmp_path, code)) == code


@pytest.mark.parametrize("code", [2, 3, 4])
def test_codes_that_would_come_again_are_not_tried_again(tmp_path: Path, code: int) -> None:
    with pytest.raises(AirflowFailException, match=f"b2batch ended with {code}"):
        execute(operator_in(tmp_path, code))


def test_words_come_through_templates_and_bash(tmp_path: Path) -> None:
    assert execute(operator_in(tmp_path, 0, *NASTY)) == 0

    assert (tmp_path / "arguments").read_text(encoding="utf-8").splitlines() == ["run", *NASTY]


def test_directory_that_is_not_there_is_a_failure_that_is_told(tmp_path: Path) -> None:
    operator = operator_in(tmp_path, 0)
    for file in tmp_path.iterdir():
        file.unlink()
    tmp_path.rmdir()

    assert execute(operator) == 2
