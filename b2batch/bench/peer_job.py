"""What a peer is asked to do in one round and what it answers, as JSON between two processes.

Standard library only: a peer may run under another interpreter that has none of b2batch's dependencies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One prompt: a chat, how many tokens its answer may have, and the choices a score workload rates."""

    row_id: str
    messages: Sequence[Mapping[str, str]]
    max_tokens: int
    choices: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class PeerJob:
    """One round. ``size`` is the number in a peer's name (``static16``), 0 where there is none.

    ``device`` and ``dtype`` are settled (no ``auto``). ``answer_prefix`` stands between a prompt and its
    choices; ``gguf`` is the file of weights for llama.cpp.
    """

    kind: str
    size: int
    model: str
    device: str
    dtype: str
    threads: int
    max_model_len: int
    rows: Sequence[BenchRow]
    warmup_rows: Sequence[BenchRow]
    n: int = 1
    temperature: float = 0.0
    seed: int = 0
    ignore_eos: bool = False
    answer_prefix: str = ""
    gguf: str = ""

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """The job that ``dataclasses.asdict`` wrote."""
        rows = {name: [BenchRow(**row) for row in document[name]] for name in ("rows", "warmup_rows")}
        return cls(**{**document, **rows})


@dataclass(frozen=True, slots=True)
class Answer:
    """What a peer made of one row: the ids of each sample, stop token included, or the chosen label."""

    num_prompt_tokens: int
    samples: Sequence[Sequence[int]] = ()
    texts: Sequence[str] = ()
    label: int | None = None


@dataclass(frozen=True, slots=True)
class Answers:
    """A round's answers in row order, and what the peer says about itself.

    ``wall_s`` and ``cpu_s`` are set by a peer that cannot load its model before the clock starts, and
    so takes the time itself.
    """

    answers: Sequence[Answer]
    facts: Mapping[str, float] = field(default_factory=dict)
    wall_s: float | None = None
    cpu_s: float | None = None
    peak_bytes: int = 0  # of other processes than the peer's own


class Peer(Protocol):
    """A loaded model that answers rows."""

    def answer(self, rows: Sequence[BenchRow]) -> Answers:
        """Chat template, tokenisation, model and detokenisation: the timed region."""
        ...


@dataclass(frozen=True, slots=True)
class PeerRound:
    """One measured round of one peer. Wall and CPU seconds are of the timed region alone."""

    wall_s: float
    cpu_s: float
    load_s: float
    num_prompt_tokens: int
    num_generated_tokens: int
    peak_bytes: int
    samples: Sequence[Sequence[Sequence[int]]]
    labels: Sequence[int | None]
    facts: Mapping[str, float]
    versions: Mapping[str, str]
