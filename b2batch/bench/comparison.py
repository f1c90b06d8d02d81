"""Peers in turn on the same rows: A B C, A B C, …; each round in a process of its own.

A fresh process a round costs a load each time and buys three things: no peer finds the last round's
rows in its prefix cache, nobody's idle threads disturb the others, and the rounds are independent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from b2batch.bench.child_process import run_child
from b2batch.bench.peer_job import BenchRow, PeerJob, PeerRound
from b2batch.bench.peers import PEERS, Needs, split_name
from b2batch.bench.prompts import warmup_rows
from b2batch.bench.record import Comparison, PeerResult, Round, read_round
from b2batch.bench.workload import GenerateWorkload, ScoreWorkload
from b2batch.errors import MeasurementFailed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tools:
    """What some peers need and b2batch does not bring along."""

    vllm_python: str = ""
    gguf: str = ""

    def has(self, needs: Needs) -> bool:
        """Whether a peer with these needs can run."""
        match needs:
            case Needs.VLLM:
                return bool(self.vllm_python)
            case Needs.LLAMA_CPP:
                return bool(self.gguf)
            case Needs.NOTHING:
                return True


@dataclass(frozen=True, slots=True)
class Setting:
    """On what a workload's peers are run."""

    model: Path
    device: str
    dtype: str
    tools: Tools = field(default_factory=Tools)


@dataclass(slots=True)
class _Measured:
    """A peer while its rounds come in."""

    name: str
    rounds: list[Round] = field(default_factory=list)
    first: PeerRound | None = None
    error: str = ""


def compare(
    workload: GenerateWorkload | ScoreWorkload,
    rows: Sequence[BenchRow],
    setting: Setting,
    on_round: Callable[[str, int], None] = lambda peer, number: None,
) -> Comparison:
    """Measure the workload's peers; one that fails is in the result with its reason.

    Args:
        on_round: called with a peer's name and the round, from 1, before each.
    """
    measured = [_Measured(name) for name in workload.peers]
    for number in range(1, workload.repeats + 1):
        for peer in measured:
            if not peer.error:
                on_round(peer.name, number)
                _measure(peer, workload, rows, setting)
    ours = next((peer.first for peer in measured if peer.name in ("engine", "score-engine")), None)
    is_exact = _temperature(workload) == 0 and setting.dtype == "float32"
    return Comparison([_result(peer, len(rows), ours if is_exact else None) for peer in measured])


def _measure(
    peer: _Measured, workload: GenerateWorkload | ScoreWorkload, rows: Sequence[BenchRow], setting: Setting
) -> None:
    kind, _ = split_name(peer.name)
    needs = PEERS[kind].needs
    if not setting.tools.has(needs):
        peer.error = f"left out: needs {needs.value}"
        return
    python = {"python": setting.tools.vllm_python} if needs is Needs.VLLM else {}
    job = make_job(peer.name, workload, rows, setting)
    try:
        document = run_child("peer_main", asdict(job), threads=workload.threads, **python)
    except MeasurementFailed as error:
        peer.error = f"failed: {error}"
        logger.warning("%s %s", peer.name, peer.error)
        return
    found = PeerRound(**document)
    peer.first = peer.first or found
    peer.rounds.append(read_round(found))


def make_job(
    name: str, workload: GenerateWorkload | ScoreWorkload, rows: Sequence[BenchRow], setting: Setting
) -> PeerJob:
    """What the peer is told for a round."""
    kind, size = split_name(name)
    sampling = (
        {
            "n": workload.n,
            "temperature": workload.temperature,
            "seed": workload.seed,
            "ignore_eos": workload.ignore_eos,
        }
        if isinstance(workload, GenerateWorkload)
        else {"answer_prefix": workload.answer_prefix}
    )
    return PeerJob(
        kind=kind,
        size=size,
        model=str(setting.model.absolute()),
        device=setting.device,
        dtype=setting.dtype,
        threads=workload.threads,
        max_model_len=workload.max_model_len,
        rows=rows,
        warmup_rows=warmup_rows(workload),
        gguf=setting.tools.gguf,
        **sampling,
    )


def _temperature(workload: GenerateWorkload | ScoreWorkload) -> float:
    return workload.temperature if isinstance(workload, GenerateWorkload) else 0.0


def _result(peer: _Measured, num_rows: int, ours: PeerRound | None) -> PeerResult:
    equal = None if peer.first is None or ours is None else num_equal_rows(peer.first, ours)
    versions = peer.first.versions if peer.first else {}
    return PeerResult(peer.name, num_rows, peer.rounds, equal, versions, peer.error)


def num_equal_rows(one: PeerRound, other: PeerRound) -> int | None:
    """Rows with the same tokens and label in both; None where a peer does not tell its tokens."""
    if any(-1 in ids for row in one.samples for ids in row):
        return None
    pairs = zip(one.samples, other.samples, one.labels, other.labels, strict=True)
    return sum(list(a) == list(b) and la == lb for a, b, la, lb in pairs)
