"""Which prompts begin alike, and how much of that is worth computing once. A pure function."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

MIN_PREFIX_TOKENS = 32  # below this, a separate attention call costs more than the tokens it saves


def shared_prefix_lengths(prompts: Sequence[Sequence[int]]) -> list[int]:
    """For each prompt the length of the prefix it should share with others, 0 for none.

    Sorting brings prompts that begin alike together; a stretch of neighbours then either shares
    its common prefix as one group or falls apart, where that prefix ends, into groups that share
    more. What saves more tokens, (rows - 1) x length summed over groups, is taken. A prefix is never
    the whole of a prompt: each keeps a token of its own, whose logits start the answer.
    """
    order = sorted(range(len(prompts)), key=lambda i: list(prompts[i]))
    common = [_common_length(prompts[a], prompts[b]) for a, b in pairwise(order)]
    lengths = [0] * len(prompts)
    for first, last, length in _best_groups(common):
        for index in order[first : last + 1]:
            lengths[index] = length
    return lengths


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that two prompts share from the start, at most all but the last of the shorter one."""
    limit = min(len(a), len(b)) - 1
    if limit <= 0:
        return 0
    if a[:limit] == b[:limit]:
        return limit
    low, high = 0, limit  # a[:low] == b[:low], a[:high] != b[:high]
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _best_groups(common: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first, last, prefix length) of the groups to form; ``common[i]`` is between rows i and i + 1.

    A stack of open stretches with rising prefix lengths, closed when a shorter one comes (the
    stretches are the internal nodes of the prompts' prefix tree). Closing compares the stretch as
    one group with the best groups found inside it.
    """
    groups: list[tuple[int, int, int]] = []
    stack: list[tuple[int, int, int]] = []  # (first row, prefix length, number of groups before it)
    for row, length in enumerate([*common, 0]):
        first, before = row, len(groups)
        while stack and stack[-1][1] > length:
            first, inner_length, before = stack.pop()
            inside = sum((last - start) * size for start, last, size in groups[before:])
            if (row - first) * inner_length >= inside:
                groups[before:] = [(first, row, inner_length)]
        if length >= MIN_PREFIX_TOKENS and (not stack or stack[-1][1] < length):
            stack.append((first, length, before))
    return groups
