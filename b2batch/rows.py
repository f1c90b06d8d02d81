"""The values that travel: a unit of rows to a replica, a row through it, a report back.

All are frozen; none holds a tensor or an Arrow object, so each can cross a process or be printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from b2batch.errors import RowFailure


class FinishReason(StrEnum):
    """Why a sequence ended. ``LENGTH`` means the text was cut: by ``max_tokens`` or the context."""

    STOP = "stop"
    LENGTH = "length"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """A range of rows of one input file: the grain of lease, retry and commit.

    ``first_row`` is the ordinal of the first row within its file (0-based, blank lines not
    counted). ``start`` and ``stop`` say where the rows stand: for JSONL a byte range of the
    *decompressed* file, for Parquet a half-open range of row ordinals. ``num_blank_before`` counts
    the blank lines of the file before the first row: what turns an ordinal into a line number.
    """

    index: int
    file_index: int
    first_row: int
    num_rows: int
    start: int
    stop: int
    num_blank_before: int = 0


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One input record as the reader found it.

    ``columns`` holds the record's own values as plain Python; it is empty when ``failure`` says
    that the record could not be read. ``row_hash`` is the xxh128 of the raw line (JSONL) or of the
    canonical row (Parquet): the identity that ``verify`` checks. ``tick`` is the one whose run planned it.
    """

    row_id: str
    row_hash: bytes
    columns: Mapping[str, Any]
    failure: RowFailure | None = None
    tick: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one generated token, with the most likely alternatives (id → logprob)."""

    token_id: int
    logprob: float
    top: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """One generated continuation. ``token_ids`` ends with the stop token when one was met."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """What the engine made of one prompt: ``samples[0]`` is the answer, the rest are ``n > 1``.

    A task that writes no text has no samples. ``prompt_truncated`` says that ``prompt.on_too_long``
    cut the prompt. ``columns`` holds what stands in the task's own columns, such as a label.
    """

    num_input_tokens: int
    samples: tuple[Sample, ...]
    prompt_truncated: bool = False
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_generated_tokens(self) -> int:
        return sum(len(sample.token_ids) for sample in self.samples)


@dataclass(frozen=True, slots=True)
class ResultRow:
    """One output row: exactly one of ``generation`` and ``failure`` is set."""

    row_id: str
    generation: Generation | None = None
    failure: RowFailure | None = None


@dataclass(frozen=True, slots=True)
class UnitCounts:
    """What a committed unit holds; the sum over all units is the run's account."""

    num_ok: int = 0
    num_error: int = 0
    num_length: int = 0  # rows cut by max_tokens or the context
    num_input_tokens: int = 0
    num_generated_tokens: int = 0

    @property
    def num_rows(self) -> int:
        return self.num_ok + self.num_error

    def __add__(self, other: UnitCounts) -> UnitCounts:
        return UnitCounts(
            self.num_ok + other.num_ok,
            self.num_error + other.num_error,
            self.num_length + other.num_length,
            self.num_input_tokens + other.num_input_tokens,
            self.num_generated_tokens + other.num_generated_tokens,
        )


@dataclass(frozen=True, slots=True)
class UnitReport:
    """What a replica tells the driver about a unit: a receipt, or why there is none.

    ``newly_committed`` is False when the part stood there already (a lost reply, a race won by
    another replica). ``error`` is (code, message, traceback) of a failed attempt, as plain
    strings: an exception object may not survive the trip between processes.
    """

    unit_index: int
    attempt: int
    counts: UnitCounts = UnitCounts()
    newly_committed: bool = True
    error: tuple[str, str, str] | None = None


@dataclass(frozen=True, slots=True)
class CondemnedRow:
    """A row that takes its replica down when it runs alone; ``offset`` is its place within its unit."""

    offset: int
    num_deaths: int
    detail: str


@dataclass(frozen=True, slots=True)
class Caution:
    """How to compute a unit that took a replica down.

    ``condemned`` rows become errors without being run. The others run piece by piece (offsets within
    the unit), each only once the one before it is answered and the driver knows that it comes next.
    """

    condemned: tuple[CondemnedRow, ...]
    pieces: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class PieceBegun:
    """A replica tells that it begins a piece of a unit under ``Caution``, by the piece's number."""

    unit_index: int
    attempt: int
    number: int
