"""``b2batch doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from b2batch.cli.options import Json, Verbose, log_to_stderr
from b2batch.cli.printing import print_json

if TYPE_CHECKING:
    from b2batch.doctor import Check

_COLOURS = {"ok": typer.colors.GREEN, "warn": typer.colors.YELLOW, "fail": typer.colors.RED}


def doctor(
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="DIR", help="Try a write there, as a commit does.")
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Check that this machine has what a run needs. Exit 1 when it has not."""
    log_to_stderr(verbose)
    from dataclasses import asdict

    from b2batch.doctor import Verdict, examine

    checks = []
    for check in examine(output):
        checks.append(check)
        if not as_json:
            _print(check)
    if as_json:
        print_json([asdict(check) for check in checks])
    if any(check.verdict is Verdict.FAIL for check in checks):
        raise typer.Exit(1)


def _print(check: Check) -> None:
    verdict = typer.style(f"{check.verdict:<5}", fg=_COLOURS[check.verdict])
    typer.echo(f"{verdict} {check.name:<9} {check.detail}")
