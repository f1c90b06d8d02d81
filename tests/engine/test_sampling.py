"""The processors against a slow reference, one row and one token at a time, in numpy."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from b2batch.engine.sampling import distribution, read_logprobs, sample, token_logprobs, uniform
from b2batch.engine.sequence import Sequence
from b2batch.spec import SamplingSpec

VOCAB = 24


@dataclass(frozen=True)
class Row:
    """One row of a batch: its logits, what it has seen and written, and its settings."""

    logits: list[float]
    prompt: list[int]
    written: list[int]
    stops: frozenset[int]
    sampling: SamplingSpec
    request_id: str = "row"

    def sequence(self) -> Sequence:
        sequence = Sequence(self.request_id, 0, list(self.prompt), self.sampling, 100, self.stops)
        sequence.tokens += self.written
        return sequence


def draw(rows: list[Row]) -> list[int | None]:
    logits = torch.tensor([row.logits for row in rows])
    tokens = sample(logits, [row.sequence() for row in rows]).tolist()
    return [None if token == -1 else token for token in tokens]


def processed(row: Row) -> np.ndarray:
    """Penalties, bias, forbidden stops and temperature, each as its definition says."""
    s = row.sampling
    scores = np.array(row.logits, dtype=np.float64)
    for token in set(row.prompt + row.written):
        scores[token] *= s.repetition_penalty if scores[token] < 0 else 1 / s.repetition_penalty
    for token, count in Counter(row.written).items():
        scores[token] -= s.presence_penalty + s.frequency_penalty * count
    for token, bias in s.logit_bias.items():
        scores[token] += bias
    if len(row.written) < s.min_tokens:
        scores[list(row.stops)] = -np.inf
    return scores / (s.temperature or 1.0)


def expected_distribution(row: Row) -> dict[int, float]:
    """top_k, then top_p and min_p, of the processed scores: the tokens that may be drawn."""
    s, scores = row.sampling, processed(row)
    if s.temperature == 0:
        return {int(scores.argmax()): 1.0}
    order = sorted(range(VOCAB), key=lambda token: -scores[token])
    kept = order[: s.top_k] if s.top_k > 0 else order
    weights = {token: math.exp(scores[token] - scores[order[0]]) for token in kept}
    probabilities = {token: weight / sum(weights.values()) for token, weight in weights.items()}
    chosen: dict[int, float] = {}
    before = 0.0
    for rank, token in enumerate(kept):
        inside_top_p = rank == 0 or s.top_p == 1 or before < s.top_p
        if inside_top_p and probabilities[token] >= s.min_p * probabilities[kept[0]]:
            chosen[token] = probabilities[token]
        before += probabilities[token]
    return {token: p / sum(chosen.values()) for token, p in chosen.items() if p > 0}


def noise(row: Row, token: int) -> float:
    """splitmix64 of the row's hash and the token id, as a number between 0 and 1."""
    key = f"{row.sampling.seed}\0{row.request_id}\0{0}\0{len(row.prompt + row.written)}"
    mask = (1 << 64) - 1
    word = (xxhash.xxh3_64_intdigest(key.encode()) + token * 0x9E3779B97F4A7C15) & mask
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
    return (((word ^ (word >> 31)) >> 12) + 0.5) / 2**52


def expected_token(row: Row) -> int:
    chosen = expected_distribution(row)
    return max(chosen, key=lambda token: math.log(chosen[token]) - math.log(-math.log(noise(row, token))))


def is_a_tie(row: Row) -> bool:
    """Whether float32 may decide otherwise than float64: two scores, or a cut, on a rounding error."""
    s, scores = row.sampling, np.sort(processed(row))[::-1]
    scores = scores[np.isfinite(scores)]
    weights = np.exp(scores - scores[0])
    kept = weights[: s.top_k] if s.top_k > 0 else weights
    before = np.cumsum(kept) / kept.sum()
    return bool(
        (np.abs(np.diff(scores)) < 1e-4).any()
        or (s.top_p < 1 and (np.abs(before - s.top_p) < 1e-4).any())
        or (s.min_p > 0 and (np.abs(weights - s.min_p) < 1e-4).any())
    )


@st.composite
def rows(draw: st.DrawFn) -> Row:
    tokens = st.integers(0, VOCAB - 1)
    logits = [x / 7 for x in draw(st.permutations(range(-VOCAB // 2, VOCAB // 2)))]  # no two are equal
    sampling = SamplingSpec(
        temperature=draw(st.sampled_from([0.0, 0.5, 1.0, 1.7])),
        top_k=draw(st.sampled_from([0, -1, 1, 3, 10, 100])),
        top_p=draw(st.sampled_from([1.0, 0.9, 0.51, 0.01])),
        min_p=draw(st.sampled_from([0.0, 0.13, 0.6])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.13, 2.03, 0.7])),
        presence_penalty=draw(st.sampled_from([0.0, 0.53, -1.31])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.37, -0.81])),
        min_tokens=draw(st.integers(0, 6)),
        logit_bias=draw(st.dictionaries(tokens, st.sampled_from([-100.0, 1.17, 4.03]), max_size=3)),
        seed=draw(st.integers(0, 1000)),
    )
    return Row(
        logits,
        draw(st.lists(tokens, min_size=1, max_size=8)),
        draw(st.lists(tokens, max_size=8)),
        frozenset(draw(st.lists(tokens, max_size=3))),
        sampling,
        str(draw(st.integers(0, 10**6))),
    )


@settings(max_examples=150)
@given(batch=st.lists(rows(), min_size=1, max_size=5))
def test_tokens_are_those_of_the_slow_reference(batch: list[Row]) -> None:
    for row, token in zip(batch, draw(batch), strict=True):
        assert is_a_tie(row) or token == expected_token(row)


@settings(max_examples=100)
@given(batch=st.lists(rows(), min_size=2, max_size=5))
def test_a_row_does_not_depend_on_its_neighbours(batch: list[Row]) -> None:
    together = draw(batch)
    assert together == [draw([row])[0] for row in batch]
    assert together[::-1] == draw(batch[::-1])


@settings(max_examples=100)
@given(batch=st.lists(rows(), min_size=1, max_size=5))
def test_a_token_that_only_the_device_knows_counts_as_any_other(batch: list[Row]) -> None:
    """The newest one, of every second row; the step that sampled it had more rows than go on."""
    sequences, newest = [row.sequence() for row in batch], []
    for index, sequence in enumerate(sequences):
        newest += [-1, sequence.tokens[-1]]
        if index % 2 and sequence.num_generated:
            sequence.tokens[-1] = -1 - (len(newest) - 1)
    logits = torch.tensor([row.logits for row in batch])
    found = sample(logits, sequences, torch.tensor(newest))
    assert found.tolist() == [-1 if token is None else token for token in draw(batch)]


def settings_of(**sampling: Any) -> Row:
    logits = [3.0, 2.0, 1.0] + [0.0] * (VOCAB - 3)
    return Row(logits, [VOCAB - 1], [], frozenset(), SamplingSpec(**sampling))


def test_drawn_tokens_come_as_often_as_they_are_probable() -> None:
    row = settings_of(temperature=1.0, top_k=3)
    expected = expected_distribution(row)
    batch = [Row(row.logits, row.prompt, [], row.stops, row.sampling, str(i)) for i in range(4000)]
    counts = Counter(draw(batch))
    assert set(counts) == {0, 1, 2}
    for token, probability in expected.items():
        assert counts[token] / 4000 == pytest.approx(probability, abs=0.03)


def test_ties_go_to_the_lower_token() -> None:
    """In greedy decoding and where top_k cuts, so that a sort's whim cannot move a token."""
    logits = [0.0] * VOCAB
    greedy = Row(logits, [1], [], frozenset(), SamplingSpec())
    assert draw([greedy]) == [0]
    scaled = torch.zeros(1, VOCAB)
    row = Row(logits, [1], [], frozenset(), SamplingSpec(temperature=1.0, top_k=2)).sequence()
    probabilities, ids = distribution(scaled, [row])
    assert ids[0, :2].tolist() == [0, 1]
    assert probabilities[0].tolist() == [0.5, 0.5] + [0.0] * (VOCAB - 2)


@pytest.mark.parametrize("logit", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"repetition_penalty": 1.2}])
def test_logits_that_are_not_numbers_give_no_token(logit: float, sampling: dict[str, float]) -> None:
    row = settings_of(**sampling)
    bad = Row([*row.logits[:-1], logit], row.prompt, [], row.stops, row.sampling)
    assert draw([bad, settings_of()]) == [None, 0]
    nothing = Row([float("-inf")] * VOCAB, row.prompt, [], row.stops, row.sampling)
    assert draw([settings_of(), nothing]) == [0, None]


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 1e-300])
def test_a_temperature_next_to_nothing_is_greedy(temperature: float) -> None:
    assert draw([settings_of(temperature=temperature), settings_of(temperature=1e30)])[0] == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "sampling",
    [
        {"logit_bias": dict.fromkeys(range(VOCAB), float("-inf"))},
        {"logit_bias": {3: float("nan")}},
        {"logit_bias": {3: float("inf")}},
        {"repetition_penalty": 1e-300, "logit_bias": {VOCAB - 1: 1.0}},
    ],
)
def test_settings_that_leave_no_finite_logit_fail_their_row_only(
    sampling: dict[str, Any], temperature: float
) -> None:
    bad = settings_of(temperature=temperature, **sampling)
    bad = Row([*bad.logits[:-1], 5.0], bad.prompt, [], bad.stops, bad.sampling)
    assert draw([bad, settings_of()]) == [None, 0]


def test_an_end_token_that_the_model_does_not_have_is_never_met() -> None:
    row = settings_of(min_tokens=3)
    assert draw([Row(row.logits, row.prompt, [], frozenset({0, VOCAB + 7}), row.sampling)]) == [1]


def test_alternatives_are_at_most_the_vocabulary() -> None:
    (row,) = token_logprobs(torch.zeros(1, VOCAB), torch.tensor([0]), VOCAB + 5).tolist()
    assert set(read_logprobs(row, 0, VOCAB + 5).top) == set(range(VOCAB))


def test_the_batch_is_left_as_it_was() -> None:
    row = settings_of(temperature=1.0, repetition_penalty=2.0, logit_bias={0: -5.0})
    logits = torch.tensor([row.logits])
    sample(logits, [row.sequence()])
    assert logits[0].tolist() == row.logits


@given(seed=st.integers(0, (1 << 63) - 1), request=st.text(), index=st.integers(0, 1023))
def test_random_numbers_are_in_range_and_a_function_of_their_arguments(
    seed: int, request: str, index: int
) -> None:
    ids = torch.tensor([3, 125_695, 0, 3])
    numbers = uniform(seed, request, index, 5, ids)
    assert ((numbers > 0) & (numbers < 1)).all()
    assert len(set(numbers.tolist())) == 3
    assert uniform(seed, request, index, 5, ids[1:2]).tolist() == numbers[1:2].tolist()
    others = [(seed + 1, request, index, 5), (seed, request + "x", index, 5)]
    others += [(seed, request, index + 1, 5), (seed, request, index, 6)]
    assert all((uniform(*other, ids) != numbers).all() for other in others)


@pytest.mark.parametrize("across", ["tokens", "rows"])
def test_random_numbers_are_spread_evenly(across: str) -> None:
    if across == "tokens":
        numbers = uniform(0, "row", 0, 9, torch.arange(20_000)).tolist()
    else:
        token = torch.tensor([7])
        numbers = [uniform(0, f"row-{i % 50}", i % 7, i, token).item() for i in range(20_000)]
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    assert counts.min() > 850
    assert counts.max() < 1150


def test_rounding_of_the_logits_hardly_ever_moves_a_draw() -> None:
    """What the batch changes in their last bits must not show in the answers, flat as they may be."""
    logits = torch.randn(500, 4000, generator=torch.Generator().manual_seed(1)) * 0.05
    sampling = SamplingSpec(temperature=1.0)
    sequences = [Sequence(str(i), 0, [1], sampling, 9) for i in range(len(logits))]
    jittered = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)) * 1e-6
    assert sample(jittered, sequences).tolist() == sample(logits, sequences).tolist()


def test_logprobs_are_before_any_processor() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    expected = logits.double().log_softmax(-1)
    found, tokens = token_logprobs(logits, torch.tensor([4, 0, 9]), 3).tolist(), [4, 0, 9]
    for row, (values, token) in enumerate(zip(found, tokens, strict=True)):
        entry = read_logprobs(values, token, [0, 1, 3][row])
        assert entry.logprob == pytest.approx(expected[row, entry.token_id].item(), abs=1e-5)
        best = expected[row].argsort(descending=True)[: [0, 1, 3][row]].tolist()
        assert list(entry.top) == best
