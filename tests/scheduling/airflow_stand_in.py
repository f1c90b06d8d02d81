"""As much of Airflow as a DAG file needs: what it was given, and the template of its command."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Self
from unittest.mock import patch

from jinja2 import Environment


class AirflowFailException(Exception):
    """Fails a task without another try."""


@dataclass
class BashOperator:
    task_id: str
    bash_command: str
    output_processor: Any
    skip_on_exit_code: int
    retries: int
    retry_delay: Any

    def __post_init__(self) -> None:
        DAG.last.operator = self

    def rendered_command(self) -> str:
        return Environment().from_string(self.bash_command).render()


@dataclass
class DAG:
    dag_id: str
    schedule: str
    start_date: Any
    catchup: bool
    max_active_runs: int
    operator: BashOperator = field(init=False)

    def __post_init__(self) -> None:
        DAG.last = self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def load_dag(source: str) -> DAG:
    """Run a DAG file; it imports what stands here."""
    modules = {
        "airflow": {},
        "airflow.sdk": {"DAG": DAG},
        "airflow.sdk.exceptions": {"AirflowFailException": AirflowFailException},
        "airflow.providers": {},
        "airflow.providers.standard": {},
        "airflow.providers.standard.operators": {},
        "airflow.providers.standard.operators.bash": {"BashOperator": BashOperator},
        "pendulum": {"datetime": lambda *date, tz: (date, tz), "duration": lambda minutes: minutes},
    }
    stand_ins = {name: ModuleType(name) for name in modules}
    for name, members in modules.items():
        vars(stand_ins[name]).update(members)
    with patch.dict(sys.modules, stand_ins):
        exec(compile(source, "dag.py", "exec"), {"__name__": "dag"})
    return DAG.last
