"""What must hold of an output directory at any moment and at the end, read as a stranger would read it.

Only pyarrow and json are used, none of the code that wrote the files: a mistake there cannot hide here.
Each violation is a line that begins with its number: I1 conservation, I2 no row twice, I3 no torn part,
I4 nothing visible changes, I5 content, I7 ``_SUCCESS``, I10 exit code, I11 leftovers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Seen:
    """A visible part as it was when it was first seen."""

    identity: tuple[int, int, int]  # inode, size, mtime_ns
    row_ids: tuple[str, ...]


class OutputWatch:
    """A reader that comes back again and again while a run is being disturbed."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._seen: dict[str, _Seen] = {}
        self._was_finished = False
        self._owner: dict[str, str] = {}  # row id → the part it stands in

    @property
    def num_parts(self) -> int:
        """Parts seen so far."""
        return len(self._seen)

    @property
    def num_rows(self) -> int:
        """Rows seen so far."""
        return len(self._owner)

    def look(self) -> list[str]:
        """Read what is new, compare what is known; the violations found this time."""
        there = {path.name: path for path in self._output.glob("part-*.parquet")}
        problems = [f"I4: {name} disappeared" for name in self._seen.keys() - there.keys()]
        for name in sorted(there):
            problems += self._look_at(name, there[name])
        if not self._was_finished and (self._output / "_SUCCESS").exists():
            self._was_finished = True
            problems += _check_success(self._output)
        return problems

    def _look_at(self, name: str, path: Path) -> list[str]:
        stat = path.stat()
        identity = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        known = self._seen.get(name)
        if known is not None:
            return [] if known.identity == identity else [f"I4: {name} changed"]
        try:
            table = pq.read_table(path, columns=["row_id"], page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            return [f"I3: {name} cannot be read: {str(error).partition(chr(10))[0]}"]
        row_ids = tuple(table.column(0).to_pylist())
        self._seen[name] = _Seen(identity, row_ids)
        twice = [row_id for row_id in row_ids if self._owner.setdefault(row_id, name) != name]
        return [f"I2: row {row_id} stands in {name} and in {self._owner[row_id]}" for row_id in twice]


def read_rows(output: Path) -> list[Row]:
    """Every visible row, in the input's order; a row that stands twice is there twice."""
    rows = [row for path in output.glob("part-*.parquet") for row in pq.read_table(path).to_pylist()]
    return sorted(rows, key=_place)


def check_finished(output: Path, expected: Sequence[Row]) -> list[str]:
    """The violations of a run that says that it is finished, against the rows of an undisturbed one."""
    rows = read_rows(output)
    problems = [*_compare(rows, expected), *_check_success(output)]
    staged = [path.name for path in output.glob("__b2batch/*/tmp/*")]
    return problems + [f"I11: left behind: {name}" for name in staged]


def check_exit(output: Path, exit_code: int) -> list[str]:
    """I10: ``status.json`` must tell the exit code of the driver that was the last to write it."""
    statuses = list(output.glob("__b2batch/*/status.json"))
    told = [json.loads(path.read_bytes())["exit_code"] for path in statuses]
    return [] if exit_code in told else [f"I10: it ended with {exit_code}, status.json says {told}"]


def _place(row: Row) -> tuple[int, int]:
    file_index, _, ordinal = str(row["row_id"]).partition(":")
    return int(file_index), int(ordinal)


def _compare(rows: Sequence[Row], expected: Sequence[Row]) -> list[str]:
    wanted = {row["row_id"]: row for row in expected}
    found = {row["row_id"]: row for row in rows}
    problems = [f"I2: {len(rows) - len(found)} rows stand twice"] if len(rows) != len(found) else []
    problems += [f"I1: row {row_id} is lost" for row_id in wanted.keys() - found.keys()]
    problems += [f"I1: row {row_id} is not of the input" for row_id in found.keys() - wanted.keys()]
    shared = wanted.keys() & found.keys()
    return problems + [f"I5: row {row_id} differs" for row_id in shared if found[row_id] != wanted[row_id]]


def _check_success(output: Path) -> list[str]:
    try:
        success = json.loads((output / "_SUCCESS").read_bytes())
    except FileNotFoundError:
        return ["I7: _SUCCESS is missing"]
    listed = {name: part["sha256"] for name, part in success["parts"].items()}
    there = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.glob("part-*.parquet")
    }
    return [] if listed == there else ["I7: _SUCCESS does not list the parts that are there"]
