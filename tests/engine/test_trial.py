"""Which size of step is chosen from what a few took."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from b2batch.engine.trial import choose_size, time_sizes

SIZES = [64, 128, 256]


class Device:
    """Steps that take ``fixed_s`` and ``row_s`` a row; ``noise`` may add to it, as another process does."""

    def __init__(self, fixed_s: float, row_s: float, noise: Callable[[], float] = lambda: 0.0) -> None:
        self.fixed_s, self.row_s, self.noise = fixed_s, row_s, noise
        self.steps: list[int] = []
        self.spent_s = 0.0

    def time_step_s(self, size: int) -> float:
        self.steps.append(size)
        step_s = self.fixed_s + self.row_s * size + self.noise()
        self.spent_s += step_s
        return step_s

    def choose(self, budget_s: float = 1.0) -> int:
        return choose_size(time_sizes(self.time_step_s, SIZES, num_warmups=1, budget_s=budget_s), SIZES[0])


@pytest.mark.parametrize(
    ("fixed_s", "row_s", "size"),
    [
        (0.010, 0.000_01, 256),  # the step itself costs most
        (0.001_3, 0.000_1, 128),  # 9 % more rows a second; 256 gives 15 %, which is nearly the same
        (0.000_1, 0.000_1, 64),  # rows cost most
        (0.0, 0.000_1, 64),
    ],
)
def test_a_larger_step_is_chosen_where_it_answers_more_a_second(
    fixed_s: float, row_s: float, size: int
) -> None:
    assert Device(fixed_s, row_s).choose() == size


@given(st.floats(1e-4, 1e-2), st.floats(1e-6, 1e-4), st.integers(0, 2**32), st.floats(1e-3, 10.0))
def test_a_slow_moment_moves_the_choice_to_nothing_slower(
    fixed_s: float, row_s: float, seed: int, longest_s: float
) -> None:
    """One step in three meets another process: what is chosen is no worse than the default is."""
    chance = random.Random(seed)
    device = Device(fixed_s, row_s)
    calm = {size: device.time_step_s(size) for size in SIZES}
    turns = iter(range(10**6))
    busy = Device(fixed_s, row_s, lambda: chance.random() * longest_s if next(turns) % 3 == 0 else 0.0)
    chosen = busy.choose(budget_s=1e6)
    assert calm[chosen] / chosen <= calm[64] / 64 * (1 + 1e-9)


@given(st.dictionaries(st.sampled_from([16, *SIZES, 512]), st.floats(1e-6, 1e3), min_size=1))
def test_the_choice_is_timed_and_at_least_nearly_as_fast_as_the_default(least_s: dict[int, float]) -> None:
    chosen = choose_size(least_s, 64)
    if 64 not in least_s or chosen == 64:
        assert chosen == 64
        return
    per_s = {size: size / step_s for size, step_s in least_s.items()}
    assert per_s[chosen] >= 1.04 * per_s[64]
    assert per_s[chosen] >= 0.95 * max(per_s.values()) * (1 - 1e-9)
    assert not [size for size in per_s if size < chosen and per_s[size] >= 0.95 * max(per_s.values())]


@given(st.floats(0.0, 10.0), st.floats(1e-6, 1.0), st.floats(0.01, 5.0))
def test_a_trial_keeps_to_its_budget_but_for_two_small_steps(
    fixed_s: float, row_s: float, budget_s: float
) -> None:
    device = Device(fixed_s, row_s)
    chosen = device.choose(budget_s)
    assert device.spent_s <= budget_s + 2 * (fixed_s + 16 * row_s) + 1e-9
    assert chosen in SIZES


def test_a_model_whose_steps_are_long_keeps_the_default_after_two_small_steps() -> None:
    device = Device(3.0, 0.2)
    assert device.choose() == 64
    assert device.steps == [16, 16]


def test_a_trial_ends_where_larger_steps_take_longer_than_small_ones_let_expect() -> None:
    device = Device(0.0, 0.000_1)
    took: Callable[[int], float] = device.time_step_s
    least_s = time_sizes(
        lambda size: took(size) * (1 if size < 256 else 100), SIZES, num_warmups=1, budget_s=1.0
    )
    assert least_s == {}
    assert device.steps == [16, 16, *SIZES]
