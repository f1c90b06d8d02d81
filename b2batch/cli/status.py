"""``b2batch status``."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from b2batch.cli.options import Json, Target, Verbose, is_job_file, log_to_stderr
from b2batch.cli.overview import overview_facts
from b2batch.cli.printing import print_facts, print_json

if TYPE_CHECKING:
    from b2batch.outputs.store import Store


def status(target: Target, as_json: Json = False, verbose: Verbose = False) -> None:
    """Show how a run stands, from what lies in its output."""
    log_to_stderr(verbose)
    from b2batch.outputs.overview import overview

    view = overview(_open(target), datetime.now(UTC))
    if as_json:
        print_json(view)
    else:
        print_facts(overview_facts(view))


def _open(target: str) -> Store:
    if is_job_file(target):
        from b2batch.job import open_output
        from b2batch.spec import load_spec

        return open_output(load_spec(target))
    from b2batch.outputs.store import open_store

    return open_store(target)
