"""Is a larger step worth its memory? From the seconds that steps of a few sizes take. No tensors, no clock.

first       two small steps: what a row costs at most, so which sizes the budget allows
rounds      every size once a round, so that a slow moment meets all of them; the least time counts
choice      the smallest size nearly as fast as the best, or the default where that gains little
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

_ROUNDS = 3
_LEAST_GAIN = 1.1  # over the default; the same step twice differs by half of that on a host that others use
_NEARLY = 0.95  # of the best throughput


def time_sizes(
    time_step_s: Callable[[int], float],
    sizes: Sequence[int],
    *,
    num_warmups: int,
    budget_s: float,
) -> dict[int, float]:
    """The least seconds of a step of each size; empty where there is no time to compare two.

    Args:
        time_step_s: runs a step of a size and returns its seconds.
        sizes: ascending; the default first.
        num_warmups: steps of each size that do not count, at least 1.
        budget_s: what all of it may take, but for the two first steps of a quarter of the default.
    """
    probe = max(1, sizes[0] // 4)
    time_step_s(probe)
    row_s = time_step_s(probe) / probe
    warm_s: dict[int, float] = {}  # of a step
    spent_s = 0.0
    for size in sizes:
        expected_s = row_s * size  # at most: a larger step takes no longer a row
        rounds_s = _ROUNDS * (sum(warm_s.values()) + expected_s)
        if spent_s + num_warmups * expected_s + rounds_s > budget_s:
            break
        taken_s = [time_step_s(size) for _ in range(num_warmups)]
        spent_s += sum(taken_s)
        warm_s[size] = taken_s[-1]
        row_s = taken_s[-1] / size
    return _rounds(time_step_s, list(warm_s), budget_s - spent_s) if len(warm_s) > 1 else {}


def _rounds(time_step_s: Callable[[int], float], sizes: Sequence[int], budget_s: float) -> dict[int, float]:
    """The least seconds of each size in as many rounds as the budget lets begin."""
    least_s: dict[int, float] = {}
    for _ in range(_ROUNDS):
        if budget_s < 0:
            break  # more was expected of the larger steps
        taken_s = {size: time_step_s(size) for size in sizes}
        least_s = {size: min(step_s, least_s.get(size, step_s)) for size, step_s in taken_s.items()}
        budget_s -= sum(taken_s.values())
    return least_s


def choose_size(least_s: Mapping[int, float], default: int) -> int:
    """The size to run with, of those timed; ``default`` where nothing was, or nothing is clearly better."""
    if default not in least_s:
        return default
    per_s = {size: size / step_s for size, step_s in least_s.items()}
    best = max(per_s.values())
    if best < _LEAST_GAIN * per_s[default]:
        return default
    return min(size for size in per_s if per_s[size] >= _NEARLY * best)
