"""``b2batch compact``."""

from __future__ import annotations

from typing import Annotated

import typer

from b2batch.cli.options import Json, Target, Verbose, log_to_stderr, output_path
from b2batch.cli.printing import count, plural, print_facts, print_json


def compact(
    target: Target,
    part_mib: Annotated[
        int, typer.Option(metavar="MIB", min=1, help="Merge parts up to this many MiB each.")
    ] = 128,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Merge the small parts of a finished output; after any stop the same command goes on.

    Exit codes: 0 done, or nothing to merge; 2 not a finished output; 4 damaged; 99 a driver works on it.
    """
    log_to_stderr(verbose)
    from b2batch.compaction import compact_output

    report = compact_output(output_path(target), part_mib << 20)
    if as_json:
        print_json(report)
        return
    merged = f"{plural(report.num_parts_before, 'part')}, now {count(report.num_parts)}"
    held = "nothing to merge" if report.num_parts == report.num_parts_before else merged
    print_facts([("compact", f"{held}: {plural(report.num_rows, 'row')} in {report.output}")])
