"""Which beginnings are shared, against a slow and obvious count of what sharing saves."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import example, given
from hypothesis import strategies as st

from b2batch.engine.prefixes import MIN_PREFIX_TOKENS, shared_prefix_lengths


def saved(prompts: list[list[int]], lengths: list[int]) -> int:
    """Prompt tokens that need not be computed, when each prefix is computed once."""
    users: dict[tuple[int, ...], int] = defaultdict(int)
    for prompt, length in zip(prompts, lengths, strict=True):
        users[tuple(prompt[:length])] += 1
    return sum((count - 1) * len(prefix) for prefix, count in users.items())


def best_of_one_prefix(prompts: list[list[int]]) -> int:
    """The most that a single shared beginning can save; every one is tried."""
    users: dict[tuple[int, ...], int] = defaultdict(int)
    for prompt in prompts:
        for length in range(MIN_PREFIX_TOKENS, len(prompt)):
            users[tuple(prompt[:length])] += 1
    return max(((count - 1) * len(prefix) for prefix, count in users.items()), default=0)


@st.composite
def prompt_sets(draw: st.DrawFn) -> list[list[int]]:
    """Prompts grown from each other, so that beginnings of many lengths are shared."""
    prompts: list[list[int]] = [[]]
    for _ in range(draw(st.integers(1, 10))):
        parent = draw(st.sampled_from(prompts))
        cut = draw(st.integers(0, len(parent)))
        token, count = draw(st.integers(0, 2)), draw(st.integers(1, 50))
        prompts.append(parent[:cut] + [token] * count)
    return draw(st.permutations(prompts[1:]))


@given(prompts=prompt_sets())
@example(prompts=[[1] * 40, [1] * 40])  # equal prompts: each keeps a token of its own
@example(prompts=[[1] * 100 + [2], [1] * 100 + [3]] + [[1] * 40 + [i] for i in range(4, 9)])
def test_sharing_saves_at_least_what_any_one_prefix_would(prompts: list[list[int]]) -> None:
    lengths = shared_prefix_lengths(prompts)
    assert saved(prompts, lengths) >= best_of_one_prefix(prompts)


def test_jobs_with_templates_of_their_own_each_share_theirs() -> None:
    first, second = [1] * 60, [2] * 40
    prompts = [[*(first if i % 2 else second), 100 + i] for i in range(10)]
    assert shared_prefix_lengths(prompts) == [60 if i % 2 else 40 for i in range(10)]


@given(prompts=prompt_sets())
def test_a_prefix_is_shared_long_enough_and_never_a_whole_prompt(prompts: list[list[int]]) -> None:
    lengths = shared_prefix_lengths(prompts)
    users: dict[tuple[int, ...], int] = defaultdict(int)
    for prompt, length in zip(prompts, lengths, strict=True):
        assert length == 0 or MIN_PREFIX_TOKENS <= length < len(prompt)
        users[tuple(prompt[:length])] += 1
    assert all(count >= 2 for prefix, count in users.items() if prefix)


def test_none_and_one() -> None:
    assert shared_prefix_lengths([]) == []
    assert shared_prefix_lengths([[1] * 100]) == [0]
    assert shared_prefix_lengths([[1] * 100, [2] * 100]) == [0, 0]


def test_the_template_of_a_job_is_found() -> None:
    template = list(range(50))
    prompts = [[*template, 100 + i, *range(7)] for i in range(20)]
    assert shared_prefix_lengths(prompts) == [50] * 20
