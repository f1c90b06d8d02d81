"""Identical requests run once and each is answered."""

from __future__ import annotations

import random
from collections import deque
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from b2batch.engine.deduplication import Deduplicator
from b2batch.engine.engine import Engine
from b2batch.engine.request import AnyRequest, Completion, Finished, Request, Score, ScoreRequest
from b2batch.rows import FinishReason
from b2batch.spec import SamplingSpec

GREEDY = SamplingSpec(max_tokens=4)


class EchoEngine:
    """Answers a request with its prompt, one a step, and counts what it ran."""

    max_num_seqs = 4

    def __init__(self) -> None:
        self.queue: deque[AnyRequest] = deque()
        self.num_run = 0

    @property
    def has_work(self) -> bool:
        return bool(self.queue)

    num_running = num_waiting = 0

    def add(self, request: AnyRequest) -> None:
        assert request.request_id not in [r.request_id for r in self.queue]
        self.queue.append(request)

    def cancel(self, request_id: str) -> None:
        self.queue = deque(r for r in self.queue if r.request_id != request_id)

    def shrink(self) -> str | None:
        return self.queue.popleft().request_id if self.queue else None

    def step(self) -> list[Finished]:
        request = self.queue.popleft()
        self.num_run += 1
        answer = Completion(tuple(request.prompt), len(request.prompt), FinishReason.STOP)
        if isinstance(request, ScoreRequest):
            return [Finished(request.request_id, 1, scores=(Score(-float(request.prompt[0]), 1, True),))]
        return [Finished(request.request_id, len(request.prompt), (answer,))]


def pair() -> tuple[EchoEngine, Deduplicator]:
    inner = EchoEngine()
    return inner, Deduplicator(cast(Engine, inner))


def finish(engine: Deduplicator) -> dict[str, Any]:
    found: dict[str, Any] = {}
    while engine.has_work:
        for done in engine.step():
            assert done.request_id not in found
            found[done.request_id] = done.completions[0].token_ids if done.completions else done.scores
    return found


def test_repeats_run_once_at_a_time_and_later() -> None:
    inner, engine = pair()
    for i in range(6):
        engine.add(Request(str(i), [1 + i % 2], GREEDY))
    assert finish(engine) == {str(i): (1 + i % 2,) for i in range(6)}
    engine.add(Request("later", [1], GREEDY))
    assert finish(engine) == {"later": (1,)}
    assert (inner.num_run, engine.num_reused) == (2, 5)


@pytest.mark.parametrize(
    "other",
    [
        Request("b", [1], GREEDY.model_copy(update={"max_tokens": 5})),
        Request("b", [1], GREEDY, "a grammar"),
        Request("b", [1, 1], GREEDY),
        ScoreRequest("b", [1], [[2]]),
    ],
)
def test_what_differs_runs_by_itself(other) -> None:
    inner, engine = pair()
    engine.add(Request("a", [1], GREEDY))
    engine.add(other)
    assert len(finish(engine)) == inner.num_run == 2


def test_each_row_of_a_sampled_job_has_a_draw_of_its_own() -> None:
    inner, engine = pair()
    drawn = SamplingSpec(temperature=1.0)
    for name in "ab":
        engine.add(Request(name, [1], drawn))
    assert len(finish(engine)) == inner.num_run == 2


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000))
def test_nothing_is_lost_whatever_is_cancelled(seed) -> None:
    """Every request is answered once, with its own prompt, unless it was cancelled or did not fit."""
    rng = random.Random(seed)
    _, engine = pair()
    wanted: dict[str, tuple[int, ...]] = {}
    found: dict[str, Any] = {}
    for i in range(40):
        action = rng.random()
        if action < 0.6:
            wanted[str(i)] = (rng.randrange(3),)
            engine.add(Request(str(i), list(wanted[str(i)]), GREEDY))
        elif action < 0.75 and wanted:
            name = rng.choice(sorted(wanted))
            if name not in found:
                engine.cancel(name)
                del wanted[name]
        elif action < 0.8:
            alone = engine.shrink()
            wanted.pop(alone or "", None)
        elif engine.has_work:
            found |= {done.request_id: done.completions[0].token_ids for done in engine.step()}
    assert found | finish(engine) == wanted
