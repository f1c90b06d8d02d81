"""``b2batch verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from b2batch.cli.options import Json, Target, Verbose, is_job_file, log_to_stderr, of_now
from b2batch.cli.printing import plural, print_facts, print_json
from b2batch.errors import IntegrityError

if TYPE_CHECKING:
    from b2batch.outputs.verify import VerifyReport


def verify(
    target: Target,
    with_input: Annotated[
        bool, typer.Option("--input/--no-input", help="Read the input again and compare its rows.")
    ] = True,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove damaged parts, so that the next run makes them again.")
    ] = False,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Move parts of other runs out of the readers' sight.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Prove a finished output: every planned row once, no byte changed, made from this input. Exit 0 or 4."""
    log_to_stderr(verbose)
    report = _verify(target, with_input, repair, quarantine)
    if as_json:
        print_json(report)
    else:
        _print(report, with_input)
    if not report.is_proved:
        raise typer.Exit(IntegrityError.exit_code)


def _verify(target: str, with_input: bool, repair: bool, quarantine: bool) -> VerifyReport:
    from b2batch.proof import verify_job, verify_output

    if is_job_file(target):
        from b2batch.spec import load_spec

        return verify_job(
            of_now(load_spec(target)), with_input=with_input, repair=repair, quarantine=quarantine
        )
    return verify_output(target, with_input=with_input, repair=repair, quarantine=quarantine)


def _print(report: VerifyReport, with_input: bool) -> None:
    print_facts(("problem" if not index else "", line) for index, line in enumerate(report.problems))
    if report.removed:
        print_facts([("removed", ", ".join(report.removed)), ("", "run the job again to make them again")])
    if report.set_aside:
        print_facts([("set aside", f"{', '.join(report.set_aside)} under __b2batch/quarantine")])
    if report.foreign:
        print_facts([("foreign", f"not b2batch's, left alone: {', '.join(report.foreign)}")])
    verdict = "proved" if report.is_proved else "not proved"
    against = "its plan, its digests and the input" if with_input else "its plan and its digests"
    held = f"{plural(report.num_rows, 'row')} in {plural(report.num_parts, 'part')}"
    print_facts([(verdict, f"{held}, compared with {against}")])
