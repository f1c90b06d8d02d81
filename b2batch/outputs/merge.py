"""Merging the small parts of a finished run into few large ones, so that a crash at any step loses nothing.

    merge.json       which parts become which, with their sha256; written first
    gen-NNNN.json    kind compact: from here on the merge is to be completed, by whoever comes next
    _SUCCESS away    what follows is not a finished output, and does not look like one
    per new part     made from the old ones, created, then the old ones removed
    gen-NNNN.json    settled; then finalise accounts for the parts that are there, and signs them

At every moment each row stands in at least one part, and a new part replaces whole old ones, so what was
done before a crash is seen from the names alone. Parts of which one is damaged are left as they are.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from b2batch.errors import IntegrityError, RunLocked
from b2batch.outputs.document import encode_document, read_document
from b2batch.outputs.footer import FOOTER_KEY, PartFooter, encode_footers, read_footers
from b2batch.outputs.generation import Generation, create_generation, settle_generation
from b2batch.outputs.layout import PART_PREFIX, SUCCESS, RunKeys, parse_part_name, part_name
from b2batch.outputs.store import Store
from b2batch.outputs.success import Success
from b2batch.parquet_bytes import read_parquet

_ROWS_PER_GROUP = 64 * 1024
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Merge:
    """New part → the old parts that it replaces, in the order of their rows, each with its sha256.

    ``partial`` and ``num_skipped_blank`` are those of the ``_SUCCESS`` that it replaces.
    """

    merge8: str
    parts: Mapping[str, Mapping[str, str]]
    partial: bool
    num_skipped_blank: int

    @property
    def num_replaced(self) -> int:
        """How many parts go."""
        return sum(len(sources) for sources in self.parts.values())

    def to_document(self) -> dict[str, Any]:
        """The content of ``merge.json``; the order of the old parts is that of their names."""
        return {
            "merge8": self.merge8,
            "parts": self.parts,
            "partial": self.partial,
            "num_skipped_blank": self.num_skipped_blank,
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Read it back; IntegrityError when it is damaged."""
        try:
            return cls(**document)
        except TypeError as error:
            raise IntegrityError(f"merge.json is damaged: {error}") from error


def plan_merge(store: Store, success: Success, target_bytes: int) -> Merge | None:
    """Which neighbouring parts of a finished run to merge, so that none exceeds ``target_bytes``.

    None when no two parts fit into one. The same output and target give the same merge.
    """
    sizes = {name: size for name, size in store.list(PART_PREFIX) if name in success.parts}
    groups = [
        group for group in _group(sorted(sizes, key=_first_unit), sizes, target_bytes) if len(group) > 1
    ]
    if not groups:
        return None
    sources = [{name: success.parts[name].sha256 for name in group} for group in groups]
    identity = json.dumps([success.run_id, sources], sort_keys=True).encode()
    merge8 = hashlib.sha256(identity).hexdigest()[:8]
    parts = {
        part_name(_first_unit(group[0]), merge8): hashes
        for group, hashes in zip(groups, sources, strict=True)
    }
    return Merge(merge8, parts, success.partial, success.num_skipped_blank)


def _first_unit(name: str) -> int:
    parsed = parse_part_name(name)
    if parsed is None:
        raise IntegrityError(f"{SUCCESS} lists {name}, which is no part")
    return parsed.unit_index


def _group(names: Sequence[str], sizes: Mapping[str, int], target_bytes: int) -> Iterator[list[str]]:
    group: list[str] = []
    held = 0
    for name in names:
        if group and held + sizes[name] > target_bytes:
            yield group
            group, held = [], 0
        group.append(name)
        held += sizes[name]
    yield group


def begin_merge(store: Store, generation: Generation, merge: Merge) -> None:
    """Make ``merge`` what the next generation is to complete; call it under the run's lease.

    A stray writer of the run could give a unit its old name again once the part is merged: it is fenced
    first.

    Raises:
        RunLocked: somebody else made the next generation.
    """
    store.put_if_absent(RunKeys(merge.merge8).merge, encode_document(merge.to_document()))
    store.delete_tree(RunKeys(generation.run8).staging)
    if not create_generation(store, generation.compacted(merge.merge8)):
        raise RunLocked(f"{store.uri}: run {generation.run8} is being changed by another command")


def read_merge(store: Store, generation: Generation) -> Merge:
    """The merge that made ``generation``, which is one of kind compact."""
    return Merge.from_document(read_document(store, RunKeys(generation.kept[-1]).merge))


def complete_merge(store: Store, generation: Generation, beat: Callable[[], None]) -> None:
    """Do what ``merge.json`` says, or what is left of it. ``beat`` is called between removals.

    Raises:
        Fenced: from ``beat``: another driver goes on with it.
    """
    merge = read_merge(store, generation)
    store.delete(SUCCESS)
    for name, sources in merge.parts.items():
        beat()
        if not _create(store, name, sources):
            continue
        for source in sources:
            beat()
            store.delete(source)
    settle_generation(store, generation)


def _create(store: Store, name: str, sources: Mapping[str, str]) -> bool:
    """Whether the new part stands there now, whoever made it."""
    if store.exists(name):
        return True
    try:
        store.put_if_absent(name, _merged(store, sources))
    except (FileNotFoundError, IntegrityError) as error:  # merging is a convenience; whole parts are not
        _log.warning("%s: %d parts are not merged: %s", store.uri, len(sources), error)
        return store.exists(name)
    return True


def _merged(store: Store, sources: Mapping[str, str]) -> bytes:
    """One part with the rows and footers of ``sources``, each read with its checksums."""
    parts = [_read_signed(store, name, sources[name]) for name in sorted(sources, key=_first_unit)]
    footers = [footer for name, data in parts for footer in read_footers(data, name)]
    tables = [_read_rows(name, data).replace_schema_metadata() for name, data in parts]
    return _encode_merged(tables, footers)


def trim_part(data: bytes, footers: Sequence[PartFooter], kept: Collection[PartFooter], name: str) -> bytes:
    """A merged part with the rows of the units in ``kept`` alone.

    Raises:
        IntegrityError: a page of it does not have its checksum.
    """
    rows, first, tables = _read_rows(name, data).replace_schema_metadata(), 0, []
    for footer in footers:
        if footer in kept:
            tables.append(rows.slice(first, footer.num_rows))
        first += footer.num_rows
    return _encode_merged(tables, [footer for footer in footers if footer in kept])


def _encode_merged(tables: Sequence[pa.Table], footers: Sequence[PartFooter]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.concat_tables(tables).replace_schema_metadata({FOOTER_KEY: encode_footers(footers)}),
        sink,
        row_group_size=_ROWS_PER_GROUP,
        compression="zstd",
        write_page_checksum=True,
    )
    return bytes(sink.getvalue())


def _read_signed(store: Store, name: str, sha256: str) -> tuple[str, bytes]:
    data = store.read(name)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise IntegrityError(f"{name} is not as it was signed in {SUCCESS}")
    return name, data


def _read_rows(name: str, data: bytes) -> pa.Table:
    try:
        return read_parquet(data)
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError(f"{name} is damaged: {error}") from error
