"""The ``b2batch`` command: its verbs, and how errors become messages and exit codes."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from b2batch.cli.bench import bench
from b2batch.cli.compact import compact
from b2batch.cli.doctor import doctor
from b2batch.cli.export import export
from b2batch.cli.gc import gc
from b2batch.cli.init import init
from b2batch.cli.list_jobs import list_jobs
from b2batch.cli.lock import lock
from b2batch.cli.logs import logs
from b2batch.cli.models import models
from b2batch.cli.notify import notify
from b2batch.cli.plan import plan
from b2batch.cli.preview import preview
from b2batch.cli.run import run
from b2batch.cli.schedule import schedule
from b2batch.cli.status import status
from b2batch.cli.stop import stop
from b2batch.cli.submit import submit
from b2batch.cli.validate import validate
from b2batch.cli.verify import verify
from b2batch.errors import B2BatchError

_INTERRUPTED = 130


class Verbs(TyperGroup):
    """Ends with the exit code of an error raised on purpose, and its message alone."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except B2BatchError as error:
            from b2batch.spec import mask_env

            typer.echo(f"error: {mask_env(str(error))}", err=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(_INTERRUPTED) from None


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Distributed batch inference for Baichuan 2 and other causal LMs: every input row exactly once.",
)
_VERBS = (
    init, validate, plan, preview, run, status, verify, export, compact, gc, schedule, notify, doctor, bench,
)  # fmt: skip
_CLUSTER_VERBS = (submit, list_jobs, logs, stop)
for verb in (*_VERBS, *_CLUSTER_VERBS):
    app.command("list" if verb is list_jobs else None)(verb)  # `list` is Python's
app.add_typer(lock, name="lock")
app.add_typer(models, name="models")


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"b2batch {version('b2batch')}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; what nobody raised on purpose ends with its traceback and code 1."""
    try:
        app()
    except Exception as error:
        traceback.print_exc()
        typer.echo(
            f"error: b2batch failed unexpectedly: {type(error).__name__}: {error}\n"
            "What was committed stays; the same command goes on from there.",
            err=True,
        )
        sys.exit(1)
