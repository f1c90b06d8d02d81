"""What one benchmark run found: every round, the medians and spreads, and the ratios between peers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from b2batch.bench.environment import Environment
from b2batch.bench.peer_job import PeerRound
from b2batch.bench.peers import split_name

FORMAT = 1
_ENGINES = ("engine", "score-engine")
_LOOPS = ("loop", "score-loop")


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with the lowest and highest value it was taken from."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Round:
    """One round without its tokens."""

    wall_s: float
    cpu_s: float
    load_s: float
    num_prompt_tokens: int
    num_generated_tokens: int
    peak_bytes: int
    facts: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class PeerResult:
    """One peer over all rounds. ``error`` says why it has none, or why it stopped before the last.

    ``num_equal_rows`` counts rows whose tokens (or label) are our engine's in the first round; None where
    that is not to be expected (sampling, other weights, another dtype).
    """

    name: str
    num_rows: int
    rounds: Sequence[Round] = ()
    num_equal_rows: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    error: str = ""

    @property
    def rows_per_s(self) -> Spread:
        """Rows a second of wall time."""
        return Spread.of([self.num_rows / done.wall_s for done in self.rounds])

    @property
    def rows_per_cpu_s(self) -> Spread:
        """Rows a CPU second of all of the peer's threads and processes."""
        return Spread.of([self.num_rows / max(done.cpu_s, 1e-9) for done in self.rounds])

    @property
    def generated_tokens_per_s(self) -> Spread:
        """Tokens out a second of wall time."""
        return Spread.of([done.num_generated_tokens / done.wall_s for done in self.rounds])

    @property
    def peak_bytes(self) -> int:
        """The most memory of any round."""
        return max(done.peak_bytes for done in self.rounds)

    def fact(self, name: str) -> float | None:
        """The median of something that the peer says about itself; None where it does not say it."""
        values = [done.facts[name] for done in self.rounds if name in done.facts]
        return statistics.median(values) if values else None

    def to_document(self) -> dict[str, Any]:
        """Plain values, the derived ones included."""
        document = asdict(self)
        if self.rounds:
            document |= {
                "rows_per_s": asdict(self.rows_per_s),
                "rows_per_cpu_s": asdict(self.rows_per_cpu_s),
                "generated_tokens_per_s": asdict(self.generated_tokens_per_s),
                "peak_bytes": self.peak_bytes,
            }
        return document


@dataclass(frozen=True, slots=True)
class Comparison:
    """All peers of one run of one workload."""

    peers: Sequence[PeerResult]

    def ratio(self, peer: PeerResult, base: PeerResult, rate: Callable[[PeerResult], Spread]) -> float:
        """How many times faster ``peer`` is than ``base``, by their medians."""
        return rate(peer).median / rate(base).median

    @property
    def engine(self) -> PeerResult | None:
        """Ours, if it was measured."""
        return self._first(_ENGINES)

    @property
    def loop(self) -> PeerResult | None:
        """The plain loop, if it was measured."""
        return self._first(_LOOPS)

    def _first(self, kinds: Sequence[str]) -> PeerResult | None:
        return next((p for p in self.peers if p.rounds and split_name(p.name)[0] in kinds), None)

    def to_document(self) -> list[dict[str, Any]]:
        """Plain values, with each peer's ratios to ours and to the loop."""
        return [peer.to_document() | {"ratios": self._ratios(peer)} for peer in self.peers]

    def _ratios(self, peer: PeerResult) -> dict[str, dict[str, float]]:
        bases = {"engine": self.engine, "loop": self.loop}
        return {
            name: {
                "rows_per_s": self.ratio(peer, base, lambda p: p.rows_per_s),
                "rows_per_cpu_s": self.ratio(peer, base, lambda p: p.rows_per_cpu_s),
            }
            for name, base in bases.items()
            if base is not None and peer.rounds
        }


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One line of a results file. ``peers`` or ``measurements`` is filled, by the workload's kind."""

    time: str
    environment: Environment
    name: str
    workload: Mapping[str, Any]
    workload_digest: str
    device: str
    dtype: str
    model: str
    num_parameters: int
    peers: Sequence[Mapping[str, Any]] = ()
    measurements: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def append_to(self, path: Path) -> None:
        """Add this run as one JSON line."""
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(self), ensure_ascii=False) + "\n")


def read_round(found: PeerRound) -> Round:
    """What of a round is kept."""
    return Round(
        found.wall_s,
        found.cpu_s,
        found.load_s,
        found.num_prompt_tokens,
        found.num_generated_tokens,
        found.peak_bytes,
        found.facts,
    )
