"""label-reviews, with b2batch. Two runs may meet: the second one ends with 99, and is skipped."""

import re
import shlex

import pendulum
from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG
from airflow.sdk.exceptions import AirflowFailException

DIRECTORY = "/srv/labels"
COMMAND = [
    "/opt/b2batch/bin/b2batch",
    "run",
    "jobs/label_reviews.yaml",
    "--set",
    "output.path=out/label_reviews/{run8}",
]
# NAME='value' lines of what the job reads from its environment; chmod 600.
ENV_FILE = "./label-reviews.env"

# The trap lets bash wait for the driver, which SIGTERM stops cleanly. 2, 3 and 4 are told by the last line.
SCRIPT = """\
cd "$1" || exit 2
if [ -f "$2" ]; then set -a; . "$2"; set +a; fi
shift 2
trap : TERM
"$@"
code=$?
case "$code" in
2 | 3 | 4) echo "b2batch ended with $code" ;;
*) exit "$code" ;;
esac
"""


def refuse(last_line):
    """Fail without another try where the next one would end the same way."""
    if re.fullmatch(r"b2batch ended with \d", last_line):
        raise AirflowFailException(f"{last_line}; see its message above")
    return last_line


def as_it_is(text):
    """Text that Airflow's templates leave alone."""
    return re.sub(r"\{[{%#]", r"{{ '\g<0>' }}", text)


with DAG(
    dag_id="label-reviews",
    schedule="0 2 * * *",
    start_date=pendulum.datetime(2026, 1, 1, tz="Asia/Shanghai"),
    catchup=False,
    max_active_runs=1,
) as dag:
    BashOperator(
        task_id="run",
        bash_command=as_it_is(f"set -- {shlex.join([DIRECTORY, ENV_FILE, *COMMAND])}\n{SCRIPT}"),
        output_processor=refuse,
        skip_on_exit_code=99,
        retries=4,
        retry_delay=pendulum.duration(minutes=5),
    )
