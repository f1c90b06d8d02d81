"""An engine that launches a step before it has read the last one answers as one that waits."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from b2batch.engine.engine import Engine
from b2batch.engine.request import AnyRequest, EmbedRequest, Finished, Request, ScoreRequest
from b2batch.engine.scheduler import Step
from b2batch.models.vocabulary import ByteVocabulary
from b2batch.spec import SamplingSpec
from engine.serving import engine_of
from engine.test_cuda_runner import VOCAB, random_model

END, DAMAGED = 2, 96  # the token that ends an answer, and one whose embedding is not a number
MAX_LEN = 96
GRAMMAR = "start: /[a-f]{2,5}/"
Answers = dict[str, Finished]


@cache
def damaged_model() -> Any:
    """A model of random weights; whoever reads or writes token 96 has no finite logits from there on."""
    model = copy.deepcopy(random_model("grouped"))
    model.get_input_embeddings().weight[DAMAGED] = math.nan
    return model


def text_of(tokens: Any) -> str:
    return "".join(chr(32 + token) for token in tokens)


def make_vocabulary() -> Any:
    """Every token but the last two is a character."""
    letters = [bytes([32 + token]) for token in range(VOCAB - 2)] + [b"<s>", b"<damaged>"]
    encode: Callable[[str], list[int]] = lambda text: [ord(letter) - 32 for letter in text]  # noqa: E731
    return ByteVocabulary(letters, [END, VOCAB - 2, DAMAGED], END, encode).build(VOCAB, {END})


class Watched:
    """A runner that counts the steps launched with tokens that the host had not read, and runs out of memory.

    ``full_at`` are the numbers of the runs that fail.
    """

    def __init__(self, engine: Engine, full_at: frozenset[int] = frozenset()) -> None:
        self._runner, self._full_at, self._num_runs = engine.runner, full_at, 0
        self.num_ahead = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def run(self, step: Step, unread: Tensor | None = None) -> Tensor:
        self._num_runs += 1
        if self._num_runs in self._full_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.num_ahead += any(token < 0 for chunk in step.chunks for token in chunk.tokens)
        return self._runner.run(step, unread)


@dataclass(frozen=True)
class Load:
    """Requests by the number of the step before which they come, and what disturbs them."""

    arrivals: list[tuple[int, AnyRequest]]
    limits: Mapping[str, Any] = field(default_factory=dict)
    cancelled: Mapping[str, int] = field(default_factory=dict)  # before which step
    full_at: frozenset[int] = frozenset()


def play(load: Load, runs_ahead: bool) -> tuple[Answers, Watched, Engine]:
    engine = engine_of(
        damaged_model(),
        **{"max_model_len": MAX_LEN, "kv_cache_tokens": 4 * MAX_LEN, "max_num_seqs": 4, **load.limits},
        stop_token_ids=[END],
        decode=text_of,
        make_vocabulary=make_vocabulary,
        runs_ahead=runs_ahead,
    )
    watched = Watched(engine, load.full_at)
    engine.runner = watched  # type: ignore[assignment]
    late = sorted(load.arrivals, key=lambda arrival: arrival[0])
    answers: Answers = {}
    number = 0
    while late or engine.has_work:
        while late and (late[0][0] <= number or not engine.has_work):
            engine.add(late.pop(0)[1])
        for name in [name for name, at in load.cancelled.items() if at == number]:
            engine.cancel(name)
            answers.pop(name, None)
        try:
            found = engine.step()
        except torch.OutOfMemoryError:
            found = []
            assert engine.shrink() is None
        assert not answers.keys() & {finished.request_id for finished in found}
        answers |= {finished.request_id: finished for finished in found}
        number += 1
        assert number < 3000
    assert engine.num_running == engine.num_waiting == 0
    engine._scheduler.check_integrity()
    for name in load.cancelled:  # a step earlier or later, it may have been done already
        answers.pop(name, None)
    return answers, watched, engine


def assert_same(found: Answers, expected: Answers) -> None:
    """All but the last bits of the numbers."""
    assert found.keys() == expected.keys()
    for name, finished in expected.items():
        ours = found[name]
        assert ours.num_prompt_tokens == finished.num_prompt_tokens
        assert len(ours.completions) == len(finished.completions)
        for mine, other in zip(ours.completions, finished.completions, strict=True):
            assert [strip(mine)] == [strip(other)], name
            assert (mine.logprobs is None) is (other.logprobs is None)
            for entry, wanted in zip(mine.logprobs or (), other.logprobs or (), strict=True):
                assert entry.token_id == wanted.token_id
                assert entry.logprob == pytest.approx(wanted.logprob, abs=1e-3)
                assert list(entry.top.values()) == pytest.approx(list(wanted.top.values()), abs=1e-3)
        for score, scored in zip(ours.scores, finished.scores, strict=True):
            assert score.num_tokens == scored.num_tokens
            assert score.loglikelihood == pytest.approx(scored.loglikelihood, abs=1e-3, nan_ok=True)
        assert ours.embedding == pytest.approx(finished.embedding, abs=1e-3, nan_ok=True)


def strip(completion: Any) -> tuple[Any, ...]:
    names = ("token_ids", "num_text_tokens", "finish_reason", "stop_text", "num_cut_chars", "error")
    return tuple(getattr(completion, name) for name in names)


def compare(load: Load) -> tuple[Answers, Watched, Engine]:
    expected, waiting, engine = play(load, runs_ahead=False)
    assert waiting.num_ahead == 0
    found, watched, ahead = play(load, runs_ahead=True)
    assert_same(found, expected)
    if not load.cancelled and not load.full_at:
        assert ahead.stats.num_generated_tokens == engine.stats.num_generated_tokens
    return found, watched, ahead


def tokens_of(seed: int, count: int) -> list[int]:
    return torch.randint(3, DAMAGED, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def rows(count: int = 6, grammar: str | None = None, head: int = 0, **sampling: Any) -> list[AnyRequest]:
    spec = SamplingSpec(**{"max_tokens": 14, **sampling})
    shared = tokens_of(99, head)
    return [Request(f"row {i}", shared + tokens_of(i, 3 + 2 * i), spec, grammar) for i in range(count)]


def at_once(requests: list[AnyRequest], **limits: Any) -> Load:
    return Load([(0, request) for request in requests], limits)


SCORED: list[AnyRequest] = [
    ScoreRequest("scored", tokens_of(50, 20), [[5, 6], [7]]),
    ScoreRequest("spoilt", [*tokens_of(51, 9), DAMAGED], [[8]]),
    EmbedRequest("embedded", tokens_of(52, 9), "mean"),
]
DRAWN: dict[str, Any] = {"temperature": 1.0, "seed": 5}
LOADS: dict[str, Load] = {
    "greedy": at_once(rows()),
    "drawn": at_once(rows(**DRAWN)),
    "drawn from few": at_once(rows(**DRAWN, top_k=7, top_p=0.9)),
    "log-probabilities": at_once(rows(**DRAWN, logprobs=3)),
    "stop tokens": at_once(rows(**DRAWN, stop_token_ids=tuple(range(0, 60, 4)))),
    "stop strings": at_once(rows(**DRAWN, stop=("a", "B", "?", "k", "z", "0"), min_tokens=3)),
    "penalties": at_once(
        rows(temperature=0.5, repetition_penalty=1.7, frequency_penalty=0.8, presence_penalty=0.3)
    ),
    "several samples": at_once(rows(**DRAWN, n=3)),
    "one token each": at_once(rows(max_tokens=1, logprobs=0)),
    "two tokens each": at_once(rows(max_tokens=2), max_num_batched_tokens=16),
    "a shared prefix": at_once(rows(head=40, **DRAWN)),
    "chunks": at_once(rows(head=40), max_num_batched_tokens=8),
    "preemption": at_once(rows(max_tokens=80, ignore_eos=True), kv_cache_tokens=150),
    "late arrivals": Load([(3 * i, request) for i, request in enumerate(rows(**DRAWN))]),
    "cancelled": Load(
        [(0, request) for request in rows(**DRAWN, ignore_eos=True)],
        cancelled={"row 1": 4, "row 2": 5, "row 5": 1},
    ),
    "out of memory": Load([(0, request) for request in rows(ignore_eos=True)], full_at=frozenset({4, 9, 17})),
    "not finite": at_once(
        [
            Request("bad", [5, DAMAGED], SamplingSpec(max_tokens=5)),
            *rows(**DRAWN, logit_bias={DAMAGED: 6.0}, logprobs=1),
        ],
        kv_cache_tokens=100,
    ),
    "scored among written": at_once([*rows(), *SCORED]),
    "one grammar among others": at_once([*rows(), Request("bound", [9], SamplingSpec(**DRAWN), GRAMMAR)]),
}


@pytest.fixture(autouse=True)
def _small_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that spans must grow, and sequences move and go, in short answers too."""
    monkeypatch.setattr("b2batch.engine.scheduler._FIRST_RESERVE", 4)


@pytest.mark.parametrize("name", LOADS)
def test_answers_are_those_of_an_engine_that_waits(name: str) -> None:
    answers, watched, engine = compare(LOADS[name])
    assert (watched.num_ahead > 0) is (name != "one token each")
    assert all(token >= 0 for x in answers.values() for c in x.completions for token in c.token_ids)
    assert all(cache.isfinite().all() for pair in engine.runner.caches for cache in pair)
    assert engine.scheduler_stats.num_preempted > 0 or name not in ("preemption", "out of memory")


def test_the_loads_hold_what_they_are_for() -> None:
    reasons = {
        name: {c.finish_reason.name for x in play(LOADS[name], True)[0].values() for c in x.completions}
        for name in ("stop tokens", "stop strings", "not finite")
    }
    assert "STOP" in reasons["stop tokens"]
    assert "STOP" in reasons["stop strings"]
    assert "ERROR" in reasons["not finite"]


def test_a_grammar_waits_for_every_token() -> None:
    answers, watched, _ = compare(at_once(rows(grammar=GRAMMAR, **DRAWN)))
    assert watched.num_ahead == 0
    texts = [text_of(finished.completions[0].token_ids) for finished in answers.values()]
    assert all(re.match("[a-f]{2,5}", text) for text in texts)


def test_nothing_is_computed_twice_nor_for_a_full_answer() -> None:
    load = at_once(rows(max_tokens=9, ignore_eos=True, stop=()), max_num_seqs=8)
    _, _, waiting = play(load, runs_ahead=False)
    _, _, ahead = play(load, runs_ahead=True)
    assert ahead.stats == waiting.stats


def test_an_answer_that_ends_unseen_costs_one_row_more() -> None:
    load = at_once(rows(1, stop_token_ids=tuple(range(VOCAB))))
    _, _, waiting = play(load, runs_ahead=False)
    _, _, ahead = play(load, runs_ahead=True)
    assert (waiting.stats.num_generated_tokens, ahead.stats.num_generated_tokens) == (1, 1)
    assert ahead.stats.num_computed_tokens == waiting.stats.num_computed_tokens + 1


@pytest.mark.parametrize("number", range(1, 9))
def test_whatever_ends_while_a_request_is_cancelled_or_memory_is_short(number: int) -> None:
    """Answers of 1 to 6 tokens: at each step some are over, and in flight."""
    requests = [request for i in range(1, 7) for request in rows(i, max_tokens=i)[-1:]]
    arrivals: list[tuple[int, AnyRequest]] = [(0, request) for request in requests]
    compare(Load(arrivals, cancelled={"row 3": number}))
    compare(Load(arrivals, cancelled={"row 5": number}))
    compare(Load(arrivals, full_at=frozenset({number})))


def test_a_request_that_was_cancelled_may_come_again() -> None:
    engine = engine_of(damaged_model(), kv_cache_tokens=600, runs_ahead=True)
    (request,) = rows(1)
    engine.add(request)
    for _ in range(3):
        engine.step()
    engine.cancel("row 0")
    assert not engine.has_work
    engine.add(request)
    again = [finished for _ in iter(lambda: engine.has_work, False) for finished in engine.step()]
    assert_same({x.request_id: x for x in again}, play(at_once([request]), runs_ahead=False)[0])


@st.composite
def random_requests(draw: st.DrawFn, name: str) -> AnyRequest:
    """Own tokens begin with one that no other request has, so that a prefix is all of a template."""
    template = tokens_of(99, 40)[: draw(st.sampled_from([0, 0, 20, 40]))]
    own = [3 + int(name), *draw(st.lists(st.integers(0, VOCAB - 1), max_size=12))]
    prompt = template + own
    kind = draw(st.sampled_from(["written"] * 6 + ["scored", "embedded"]))
    if kind == "scored":
        return ScoreRequest(name, prompt, [[5], [6, 7]])
    if kind == "embedded":
        return EmbedRequest(name, prompt, draw(st.sampled_from(["mean", "last"])))
    max_tokens = draw(st.integers(1, 30))
    sampling = SamplingSpec(
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, min(4, max_tokens))),
        temperature=draw(st.sampled_from([0.0, 1.0])),
        top_k=draw(st.sampled_from([0, 6])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.5])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.7])),
        stop=draw(st.sampled_from([(), ("a", "B", "?", "kk")])),
        stop_token_ids=draw(st.sampled_from([(), tuple(range(0, 60, 5))])),
        n=draw(st.sampled_from([1, 1, 2])),
        logprobs=draw(st.sampled_from([None, 0, 2])),
        seed=draw(st.integers(0, 9)),
    )
    return Request(name, prompt, sampling, draw(st.sampled_from([None] * 5 + [GRAMMAR])))


@st.composite
def loads(draw: st.DrawFn) -> Load:
    names = [str(i) for i in range(draw(st.integers(1, 8)))]
    max_num_seqs = draw(st.integers(1, 5))
    full_at = draw(st.frozensets(st.integers(3, 40), max_size=1))  # a second one might be a request's fault
    limits = {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": draw(st.integers(17 if full_at else max_num_seqs, 60)),
        "kv_cache_tokens": MAX_LEN + draw(st.integers(0, 150)),
        "enable_prefix_caching": draw(st.booleans()),
    }
    arrivals = [(draw(st.integers(0, 12)), draw(random_requests(name))) for name in names]
    cancelled = draw(st.dictionaries(st.sampled_from(names), st.integers(0, 30), max_size=2))
    return Load(arrivals, limits, cancelled, full_at)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(load=loads())
def test_any_load_has_the_same_answers(load: Load) -> None:
    compare(load)
