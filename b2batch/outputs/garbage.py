"""What nobody needs any more in an output directory: left by dead attempts, or by runs that were replaced.

Never the parts of the run that the directory holds, nor its record, newest plan, account and newest lease;
nor what is younger than a policy says; nor anything while a driver works there; nor a file that is not
b2batch's; nor what ``verify`` set aside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from b2batch.outputs.generation import Generation, latest_generation, parts_of
from b2batch.outputs.layout import META, QUARANTINE, RunKeys, parse_generation_key
from b2batch.outputs.lease import LEASE_TTL_S
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.store import Store, open_store

_OWN_ID = "gc"  # staging of its own: to make the run's again would let its stray writers in


@dataclass(frozen=True, slots=True)
class Garbage:
    """What was found, by key; ``num_bytes`` in all. ``was_removed`` is False after a dry run."""

    output: str
    keys: tuple[str, ...]
    num_bytes: int
    was_removed: bool


def collect_garbage(path: str, older_than_s: float, *, dry_run: bool = False) -> Garbage:
    """Remove what nobody needs and was last written ``older_than_s`` ago, by the store's clock.

    What dead writers staged goes as soon as no lease can cover it.

    Raises:
        OutputError: the directory holds no run, or cannot be written.
        RunLocked: a driver works on it.
    """
    directory = RunDirectory.existing(open_store(path, _OWN_ID))
    store = directory.store
    store.probe()
    try:
        with directory.take_epoch() as epoch:
            generation = latest_generation(store) or directory.generation  # again, under the lease
            found = dict(_garbage(store, generation, max(older_than_s, LEASE_TTL_S)))
            for key in found if not dry_run else ():
                epoch.beat()
                store.delete(key)
            for run8 in {key.split("/")[1] for key in found if key.count("/") > 1} if not dry_run else ():
                if run8 not in _ids_in_use(generation):
                    store.delete_tree(RunKeys(run8).root)  # the directories, where the store has such
    finally:
        store.delete_tree(RunKeys(_OWN_ID).root)
    return Garbage(store.uri, tuple(sorted(found)), sum(found.values()), not dry_run)


def _ids_in_use(generation: Generation) -> set[str]:
    return {generation.run8, *generation.kept, _OWN_ID}


def _garbage(store: Store, generation: Generation, older_than_s: float) -> Iterator[tuple[str, int]]:
    """(key, size in bytes) of each object to remove."""
    in_use = _ids_in_use(generation)
    sizes = dict(store.list(""))
    replaced = tuple(run8 for run8 in generation.replaces if run8 not in in_use)
    for key in parts_of(store, replaced):  # by late writers: readers take them in
        yield key, sizes[key]
    for key, size in sizes.items():
        min_age_s = _min_age_s(key, generation, in_use, older_than_s)
        if min_age_s is not None and store.age_s(key) > min_age_s:
            yield key, size


def _min_age_s(key: str, generation: Generation, in_use: set[str], older_than_s: float) -> float | None:
    """From which age on ``key`` is garbage; None: at none."""
    if not key.startswith(f"{META}/") or key.startswith(f"{QUARANTINE}/"):
        return None
    run = RunKeys(generation.run8)
    if run.is_later_plan(key):
        return None if key == run.later_plan(generation.plan_digest) else older_than_s
    number = parse_generation_key(key)
    if number is not None:
        return older_than_s if number < generation.number else None
    _, name, *below = key.split("/")
    if not below:
        return LEASE_TTL_S if name.startswith("probe-") else None
    if key.startswith(f"{RunKeys(name).staging}/"):
        return LEASE_TTL_S
    return None if name in in_use else older_than_s
