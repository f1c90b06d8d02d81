"""Which run an output directory holds: ``gen-0001.json`` and its successors, the highest counts.

A directory holds one run. To replace it is to create the next generation, which names the runs that go,
and then to erase them; the erasure is done again from the start when it was cut short.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Self

from b2batch.errors import IntegrityError
from b2batch.outputs.document import encode_document, read_document
from b2batch.outputs.layout import (
    META,
    PART_PREFIX,
    SUCCESS,
    RunKeys,
    generation_key,
    parse_generation_key,
    parse_part_name,
)
from b2batch.outputs.store import Store


class GenerationKind(StrEnum):
    """How the run came into the directory."""

    NEW = "new"
    OVERWRITE = "overwrite"


@dataclass(frozen=True, slots=True)
class Generation:
    """One run's turn in a directory.

    ``replaces`` holds the short ids of all runs before it, the latest last; ``erased`` says that
    nothing is left of them. A finished run that is done again replaces itself.
    """

    number: int
    run_id: str
    kind: GenerationKind = GenerationKind.NEW
    replaces: tuple[str, ...] = ()
    erased: bool = True

    @property
    def run8(self) -> str:
        """The short id that stands in part names."""
        return self.run_id[:8]

    def successor(self, run_id: str) -> Generation:
        """The generation that puts ``run_id`` in this one's place."""
        earlier = [run8 for run8 in self.replaces if run8 != self.run8]
        return Generation(
            self.number + 1, run_id, GenerationKind.OVERWRITE, (*earlier, self.run8), erased=False
        )

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Read it back; IntegrityError when it is damaged."""
        try:
            fields = dict(document)
            return cls(
                kind=GenerationKind(fields.pop("kind")), replaces=tuple(fields.pop("replaces")), **fields
            )
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"a gen-*.json is damaged: {error}") from error


def latest_generation(store: Store) -> Generation | None:
    """The run that the directory holds now, or None when no run was ever started there."""
    numbers = [parse_generation_key(key) for key, _ in store.list(f"{META}/gen-")]
    last = max((number for number in numbers if number is not None), default=None)
    return None if last is None else Generation.from_document(read_document(store, generation_key(last)))


def create_generation(store: Store, generation: Generation) -> bool:
    """Claim the directory for ``generation``; False when another driver was first."""
    return store.put_if_absent(generation_key(generation.number), encode_document(asdict(generation)))


def erase_replaced(store: Store, generation: Generation, beat: Callable[[], None]) -> None:
    """Remove what the runs before ``generation`` left; files of no run are not touched.

    ``_SUCCESS`` goes first, so that nobody takes a half-erased output for a finished one; then the
    staging directories, so that a stray writer can add nothing; then the parts. ``beat`` is called
    between removals, to keep the lease under which this happens.
    """
    replaced = [run8 for run8 in generation.replaces if run8 != generation.run8]
    if not generation.erased:
        store.delete(SUCCESS)
        for run8 in replaced:
            store.delete_tree(RunKeys(run8).staging)
        for key in parts_of(store, generation.replaces):
            beat()
            store.delete(key)
    for run8 in replaced:
        store.delete_tree(RunKeys(run8).root)
    done = Generation(generation.number, generation.run_id, generation.kind, generation.replaces, erased=True)
    store.put(generation_key(generation.number), encode_document(asdict(done)))


def parts_of(store: Store, run8s: tuple[str, ...]) -> list[str]:
    """The names of all parts of the given runs."""
    names = ((key, parse_part_name(key)) for key, _ in store.list(PART_PREFIX))
    return [key for key, name in names if name is not None and name.run8 in run8s]
