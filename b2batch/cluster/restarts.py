"""When a lost replica is replaced, and when no more are tried. Apart from what rows and units may cost.

Two budgets: replicas that cannot start, and replicas that die. Each commit shows that the cluster
works and restores both; a node on which only deaths happen is avoided.
"""

from __future__ import annotations

from collections import Counter

from b2batch.cluster.policy import DispatchPolicy
from b2batch.cluster.verdict import ErrorText, final_error_class

_MAX_DELAY_S = 30.0
_MANY_FAILURES = 16
_DEATHS_IN_START = 4
_DEATHS_ON_NODE = 3


class Restarts:
    """Counts starts that failed and replicas that died, in a row."""

    def __init__(self, policy: DispatchPolicy) -> None:
        self.policy = policy
        self._num_deaths = 0
        self._num_start_failures = 0
        self._deaths_by_node: Counter[str] = Counter()
        self._earliest_s = 0.0
        self._short_since_s: float | None = None
        self.was_ever_ready = False

    @property
    def num_deaths(self) -> int:
        """Replicas that died since the last commit."""
        return self._num_deaths

    @property
    def avoided_nodes(self) -> frozenset[str]:
        """Nodes on which replicas died and nothing was committed between."""
        return frozenset(node for node, deaths in self._deaths_by_node.items() if deaths >= _DEATHS_ON_NODE)

    @property
    def are_deaths_too_many(self) -> bool:
        return self._num_deaths > self.policy.max_deaths

    def note_ready(self) -> None:
        """A replica can work."""
        self.was_ever_ready = True
        self._num_start_failures = 0

    def note_enough(self) -> None:
        """As many replicas can work as the run needs."""
        self._short_since_s = None

    def note_short(self, now_s: float) -> None:
        """From now on fewer can."""
        if self._short_since_s is None:
            self._short_since_s = now_s

    def forgive_pause(self, pause_s: float) -> None:
        """The driver slept: nobody could become ready for it meanwhile."""
        if self._short_since_s is not None:
            self._short_since_s += pause_s

    def note_progress(self, node_id: str) -> None:
        """A replica on this node (empty: not known) has committed a unit, or a bad row was found."""
        self._num_deaths = 0
        self._deaths_by_node.pop(node_id, None)

    def note_death(self, node_id: str, now_s: float) -> None:
        """A replica died: the first round is replaced at once, later ones after 1, 2, 4 … 30 s."""
        self._num_deaths += 1
        if node_id:
            self._deaths_by_node[node_id] += 1
        num_rounds = (self._num_deaths - 1) // self.policy.num_replicas
        if num_rounds:
            self._earliest_s = now_s + min(_MAX_DELAY_S, 2.0 ** (num_rounds - 1))

    def note_start_failure(self, now_s: float) -> None:
        """A worker could not be built. Where it could be before, it is worth another try, not at once."""
        self._num_start_failures += 1
        if self.was_ever_ready:
            self._earliest_s = now_s + min(_MAX_DELAY_S, 2.0**self._num_start_failures)

    def note_death_in_start(self, now_s: float) -> None:
        """A process died before its worker was built."""
        self._num_start_failures += 1
        self._earliest_s = now_s + min(_MAX_DELAY_S, 2.0 ** (self._num_start_failures - 1))

    def may_start(self, now_s: float, num_replicas: int) -> bool:
        """Whether to replace what is missing beside the ``num_replicas`` that are there."""
        if now_s < self._earliest_s:
            return False
        return num_replicas == 0 or (self.was_ever_ready and not self.gave_up)

    def cannot_start(self, error: ErrorText, num_ready: int, num_replicas: int) -> bool:
        """No replica works, and enough of them said why that more would say the same."""
        if num_ready:
            return False
        if self.was_ever_ready:
            return self.gave_up and not num_replicas
        is_certain = final_error_class(error[0]) is not None or not num_replicas
        return is_certain or self._num_start_failures >= _MANY_FAILURES

    def is_start_deadly(self, num_ready: int, num_replicas: int) -> bool:
        """No replica works, and those that start die before they do."""
        if num_ready or (num_replicas and self._num_start_failures < _MANY_FAILURES):
            return False
        return self._num_start_failures >= _DEATHS_IN_START

    def has_timed_out(self, now_s: float) -> bool:
        """Whether too few replicas could work for longer than the start may take."""
        since_s = self._short_since_s
        return since_s is not None and now_s - since_s >= self.policy.start_timeout_s

    @property
    def gave_up(self) -> bool:
        """So many starts failed one after the other that what is missing is not replaced any more."""
        return self._num_start_failures > 3 + self.policy.num_replicas
