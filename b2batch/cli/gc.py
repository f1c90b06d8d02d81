"""``b2batch gc``."""

from __future__ import annotations

from typing import Annotated

import typer

from b2batch.cli.options import Json, Target, Verbose, log_to_stderr, output_path
from b2batch.cli.printing import plural, print_facts, print_json, size

_DAY_S = 86_400.0


def gc(
    target: Target,
    older_than: Annotated[
        float, typer.Option(metavar="DAYS", min=0.0, help="Records of replaced runs are kept this long.")
    ] = 7.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Remove what dead attempts and replaced runs left; never what a reader or a run uses.

    Exit codes: 0 done; 2 no run is there; 99 a driver works on it.
    """
    log_to_stderr(verbose)
    from b2batch.outputs.garbage import collect_garbage

    found = collect_garbage(output_path(target), older_than * _DAY_S, dry_run=dry_run)
    if as_json:
        print_json(found)
        return
    print_facts(("" if index else "garbage", key) for index, key in enumerate(found.keys))
    verdict = "removed" if found.was_removed else "would go"
    print_facts([(verdict, f"{plural(len(found.keys), 'file')}, {size(found.num_bytes)}")])
