"""Several answers of one row → the one that most of them give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Vote:
    """The majority's ``value``, the ``share`` of all answers that gave it, and the share of pairs that agree.

    Answers without a value count in both shares and agree with none.
    """

    value: Any
    share: float
    agreement: float

    def columns(self) -> dict[str, Any]:
        """What stands in the row's columns."""
        return {"vote": self.value, "vote_share": self.share, "agreement": self.agreement}


def majority(values: Sequence[Hashable | None]) -> Vote:
    """The commonest value, the first given of equals; None when no answer has one."""
    counts = Counter(value for value in values if value is not None)
    if not counts:
        return Vote(None, 0.0, 0.0)
    value, count = counts.most_common(1)[0]  # in the order of their first answer
    pairs = len(values) * (len(values) - 1)
    agreeing = sum(n * (n - 1) for n in counts.values())
    return Vote(value, count / len(values), agreeing / pairs if pairs else 1.0)


def pick(value: Any, path: Sequence[str]) -> Any:
    """The member of a parsed answer that ``path`` leads to; None where one on the way is null."""
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
