"""``b2batch lock``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from b2batch.cli.options import Json, Target, Verbose, log_to_stderr, output_path
from b2batch.cli.printing import print_facts, print_json

if TYPE_CHECKING:
    from b2batch.outputs.lease import Lease
    from b2batch.outputs.lock import Lock

lock = typer.Typer(help="Show or break the lock that lets one driver at a time work on an output.")


@lock.command("show")
def show(target: Target, as_json: Json = False, verbose: Verbose = False) -> None:
    """Show who holds the lock of an output: host, process, since when, last heartbeat, epoch.

    Exit codes: 0 whether it is held or free; 2 no run is there.
    """
    log_to_stderr(verbose)
    from b2batch.outputs.lock import find_lock

    found = find_lock(output_path(target))
    if as_json:
        print_json(_document(found))
    else:
        print_facts(_facts(found))


@lock.command("break")
def break_(
    target: Target,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also when its holder is alive.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Take the lock from its holder, so that the next run need not wait for the lease to end.

    A holder that still lives is fenced: when it next renews its lease, within some 10 s, it stops with
    exit code 1. Parts that it commits until then are whole, and of the same run; it cannot finish the run.

    Exit codes: 0 broken, or free already; 1 not confirmed; 2 no run is there; 99 its holder is alive.
    """
    log_to_stderr(verbose)
    from b2batch.outputs.lock import break_lock, find_lock_to_break

    path = output_path(target)
    found = find_lock_to_break(path)
    if not as_json:
        print_facts(_facts(found))
    broken_by = None
    if found.lease is not None and found.is_held:
        if not yes:
            typer.confirm("Break this lock?", abort=True, err=True)
        broken_by = break_lock(path, found.lease, force=force)
    if as_json:
        print_json({**_document(found), "broken_by_epoch": broken_by})
    elif broken_by is None:
        print_facts([("", "nothing to break")])
    else:
        what = "its holder, if it lives, stops with exit code 1 within some 10 s and cannot finish the run"
        print_facts([("broken", f"by epoch {broken_by}: {what}"), ("", "the next `b2batch run` goes on")])


def _document(found: Lock) -> dict[str, Any]:
    """What ``--json`` says; the members of ``holder`` are of the newest lease, also once it is free."""
    lease = found.lease
    return {
        "output": found.output,
        "run_id": found.run_id,
        "held": found.is_held,
        "epoch": lease and lease.epoch,
        "holder": lease and {name: value for name, value in asdict(lease.owner).items() if name in _TOLD},
        "silent_s": lease and round(lease.silent_s, 1),
        "ends_in_s": lease and round(lease.ends_in_s, 1),
    }


_TOLD = ("host", "pid", "job_id", "started")


def _facts(found: Lock) -> Iterator[tuple[str, str]]:
    yield "lock", f"{'held' if found.is_held else 'free'}: run {found.run_id[:8]} in {found.output}"
    if found.lease is None:
        yield "", "no driver has started yet"
    else:
        yield from _lease_facts(found.lease)


def _lease_facts(lease: Lease) -> Iterator[tuple[str, str]]:
    yield "holder" if lease.is_held else "last holder", f"{lease.owner}"
    yield "epoch", str(lease.epoch)
    yield "heartbeat", f"{max(0.0, lease.silent_s):.0f} s ago"
    if lease.is_held:
        yield "lease", f"ends in {lease.ends_in_s:.0f} s if nothing more is heard of its holder"
