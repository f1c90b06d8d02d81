"""Which run an output directory holds: ``gen-0001.json`` and its successors, the highest counts.

A directory holds one run. Whatever takes committed parts away (to replace the run, to merge its parts) or
adds to what the run is made from is the next generation: its record, created exclusively, says what is to
go, and the removal is done again from the start when it was cut short.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Self

from b2batch.errors import IntegrityError
from b2batch.outputs.document import encode_document, read_document
from b2batch.outputs.layout import (
    META,
    PART_PREFIX,
    SUCCESS,
    PartName,
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
    COMPACT = "compact"
    EXTEND = "extend"


@dataclass(frozen=True, slots=True)
class Extension:
    """What a plan of an incremental run adds to the one before.

    Attributes:
        base_digest: of the plan that it goes on from; empty for the first.
        superseded: half-open ranges of the indexes of units whose rows it replaces.
        keys: the keys of its rows, to be stored beside the plan.
        tick: whose run this is; empty for none.
    """

    base_digest: str = ""
    superseded: tuple[tuple[int, int], ...] = ()
    keys: bytes | None = None
    tick: str = ""


@dataclass(frozen=True, slots=True)
class Generation:
    """One run's turn in a directory.

    ``replaces`` holds the short ids of all runs before it, the latest last; ``erased`` says that
    nothing that had to go is left. A finished run that is done again replaces itself. ``kept`` are
    further ids, beside the run's own, that stand in the names of its parts: those of its merges.

    Of an incremental run ``num_plans`` says how often its plan was made or extended, which rows tell as
    their generation; ``plan_digest`` is the plan that counts. The rows of ``superseded`` units (half-open
    ranges of their indexes) are no longer the run's. ``key_digests`` name the objects that hold keys of rows.
    """

    number: int
    run_id: str
    kind: GenerationKind = GenerationKind.NEW
    replaces: tuple[str, ...] = ()
    erased: bool = True
    kept: tuple[str, ...] = ()
    num_plans: int = 1
    plan_digest: str = ""
    superseded: tuple[tuple[int, int], ...] = ()
    key_digests: tuple[str, ...] = ()
    tick: str = ""

    @property
    def run8(self) -> str:
        """The short id that stands in part names."""
        return self.run_id[:8]

    @property
    def is_merging(self) -> bool:
        """Whether a compaction began and did not come to its end."""
        return self.kind is GenerationKind.COMPACT and not self.erased

    def holds(self, part: PartName) -> bool:
        """Whether a part of this name belongs to the run."""
        return part.run8 == self.run8 or part.run8 in self.kept

    def supersedes(self, unit_index: int) -> bool:
        """Whether the rows of a unit were replaced by those of a later one."""
        return any(first <= unit_index < stop for first, stop in self.superseded)

    def planned(self, plan_digest: str, extension: Extension) -> Generation:
        """The generation with the first plan of an incremental run."""
        keys = () if extension.keys is None else (key_digest(extension.keys),)
        return replace(self, plan_digest=plan_digest, key_digests=keys, tick=extension.tick)

    def extended(self, plan_digest: str, extension: Extension) -> Generation:
        """The generation of the same run with a plan that goes on from this one's.

        Merged parts that hold superseded rows are written anew without them, under a further id.
        """
        trimmed8 = hashlib.sha256(f"{self.run_id} {plan_digest}".encode()).hexdigest()[:8]
        keys = () if extension.keys is None else (key_digest(extension.keys),)
        return replace(
            self,
            number=self.number + 1,
            kind=GenerationKind.EXTEND,
            kept=(*self.kept, trimmed8) if extension.superseded and self.kept else self.kept,
            num_plans=self.num_plans + 1,
            plan_digest=plan_digest,
            superseded=(*self.superseded, *extension.superseded),
            key_digests=(*self.key_digests, *keys),
            tick=extension.tick,
        )

    def successor(self, run_id: str) -> Generation:
        """The generation that puts ``run_id`` in this one's place."""
        earlier = [run8 for run8 in self.replaces if run8 != self.run8]
        return Generation(
            self.number + 1, run_id, GenerationKind.OVERWRITE, (*earlier, *self.kept, self.run8), erased=False
        )

    def compacted(self, merge8: str) -> Generation:
        """The generation of the same run in which some parts are merged, into parts named ``merge8``."""
        return replace(
            self,
            number=self.number + 1,
            kind=GenerationKind.COMPACT,
            erased=False,
            kept=(*self.kept, merge8),
        )

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Read it back; IntegrityError when it is damaged."""
        try:
            fields = dict(document)
            return cls(
                kind=GenerationKind(fields.pop("kind")),
                replaces=tuple(fields.pop("replaces")),
                kept=tuple(fields.pop("kept", ())),
                superseded=tuple((first, stop) for first, stop in fields.pop("superseded", ())),
                key_digests=tuple(fields.pop("key_digests", ())),
                **fields,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"a gen-*.json is damaged: {error}") from error


def key_digest(data: bytes) -> str:
    """By which an object that holds keys of rows is named."""
    return hashlib.sha256(data).hexdigest()


def latest_generation(store: Store) -> Generation | None:
    """The run that the directory holds now, or None when no run was ever started there."""
    numbers = [parse_generation_key(key) for key, _ in store.list(f"{META}/gen-")]
    last = max((number for number in numbers if number is not None), default=None)
    return None if last is None else Generation.from_document(read_document(store, generation_key(last)))


def create_generation(store: Store, generation: Generation) -> bool:
    """Claim the directory for ``generation``; False when another driver was first."""
    key, document = generation_key(generation.number), encode_document(asdict(generation))
    return store.put_if_absent(key, document) or store.read(key) == document  # a lost reply is no lost race


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
    settle_generation(store, generation)


def settle_generation(store: Store, generation: Generation) -> None:
    """Note that nothing is left of what had to go."""
    done = replace(generation, erased=True)
    store.put(generation_key(generation.number), encode_document(asdict(done)))


def parts_of(store: Store, run8s: tuple[str, ...]) -> list[str]:
    """The names of all parts of the given runs."""
    names = ((key, parse_part_name(key)) for key, _ in store.list(PART_PREFIX))
    return [key for key, name in names if name is not None and name.run8 in run8s]
