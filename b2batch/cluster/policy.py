"""How much is borne before a replica, a unit or the run is given up."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

LEAST_CONDEMNED = 10
LEASES_BEGUN = 2  # of those that a replica holds: the oldest
_SILENCE_S = 60.0


class Loss(Enum):
    """Why a replica is gone, and with it what that says about the rows it was computing."""

    CRASH = "its process died"
    HANG = "it hangs"
    SUSPECT = "its model gives no finite logits"
    MEMORY = "its node ran out of memory"
    NODE = "its node died"

    @property
    def may_be_a_row(self) -> bool:
        """Whether one of its rows may have done it; never so for what befalls a whole node."""
        return self in (Loss.CRASH, Loss.HANG)

    @property
    def may_be_a_node(self) -> bool:
        """Whether the node it ran on may be bad, and is still there."""
        return self in (Loss.CRASH, Loss.HANG, Loss.SUSPECT)


@dataclass(frozen=True, slots=True)
class DispatchPolicy:
    """Budgets and limits. Times are seconds of the clock that the events carry."""

    num_replicas: int
    start_timeout_s: float  # until the first work, and of one replica to load
    step_timeout_s: float = 900.0  # the longest that one step of an engine may take
    max_attempts: int = 3  # of a unit that fails by an error
    max_condemned: int = LEAST_CONDEMNED  # rows that take replicas down, over the whole run
    straggler_factor: float = 1.5  # of the mean lease: older ones are tried elsewhere at the end
    max_leases: int = 0  # of a replica; 0: by the number of replicas
    min_replicas: int = 1  # no unit is leased before so many are ready; then it goes on with any

    @property
    def leases_per_replica(self) -> int:
        """Two, so that the next unit's rows fill the batch while the last one's drain.

        Up to eight where there are many replicas: each then has news for the driver more seldom.
        """
        return self.max_leases or LEASES_BEGUN + min(6, self.num_replicas // 125)

    @property
    def max_silence_s(self) -> float:
        """How long a replica with leases may be silent: a poll's wait, and a minute for its answer."""
        return poll_timeout_s(self.num_replicas) + min(_SILENCE_S, self.step_timeout_s)

    @property
    def max_deaths(self) -> int:
        """Replica deaths in a row, without a commit between them, that a run survives."""
        return 3 + 3 * self.num_replicas


def poll_timeout_s(num_replicas: int) -> float:
    """How long a replica that has no news may be silent: with many longer, as each answer costs the driver.

    About five answers a second, so that a thousand replicas cost it well under one per cent of a core.
    """
    return min(200.0, max(1.0, num_replicas / 5))
