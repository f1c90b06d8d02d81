"""The replicas of a run: what each holds, when it last answered, when its engine last moved."""

from __future__ import annotations

from dataclasses import dataclass, field

from b2batch.cluster.policy import LEASES_BEGUN, DispatchPolicy


@dataclass(frozen=True, slots=True)
class Held:
    """A lease that a replica holds."""

    attempt: int
    since_s: float


@dataclass(slots=True)
class Member:
    """One replica, from being asked for until it is gone."""

    is_placed: bool = False  # it has a process: it answered
    loads_since_s: float | None = None
    is_ready: bool = False
    node_id: str = ""  # known once it is ready
    leases: dict[int, Held] = field(default_factory=dict)  # by unit, the oldest first
    answered_s: float = 0.0
    moved_s: float = 0.0
    num_steps: int = -1


class Roster:
    """All replicas by id; ids are never used twice."""

    def __init__(self) -> None:
        self._members: dict[int, Member] = {}
        self._next_id = 0
        self.num_ready = 0  # kept, not counted: it is asked for with every answer
        self.hungry: dict[int, None] = {}  # ready, with room for which there was no unit

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, replica_id: int) -> Member:
        return self._members[replica_id]

    def get(self, replica_id: int) -> Member | None:
        """The replica, if it is not gone."""
        return self._members.get(replica_id)

    @property
    def num_leases(self) -> int:
        """Leases now held, copies included."""
        return sum(len(member.leases) for member in self._members.values())

    def add(self) -> int:
        """A replica that is starting: its id."""
        replica_id = self._next_id
        self._next_id += 1
        self._members[replica_id] = Member()
        return replica_id

    def note_loading(self, replica_id: int, now_s: float) -> None:
        """It has begun to load its model; told with every answer until it is ready."""
        member = self._members.get(replica_id)
        if member is not None and not member.is_ready and member.loads_since_s is None:
            member.loads_since_s = now_s

    def note_ready(self, replica_id: int, node_id: str, now_s: float) -> bool:
        """Whether it is news that this replica can work."""
        member = self._members.get(replica_id)
        if member is None or member.is_ready:
            return False
        member.is_placed = member.is_ready = True
        member.node_id = node_id
        member.answered_s = member.moved_s = now_s
        self.num_ready += 1
        return True

    def remove(self, replica_id: int) -> Member | None:
        """Forget a replica; what it was."""
        member = self._members.pop(replica_id, None)
        self.hungry.pop(replica_id, None)
        if member is not None and member.is_ready:
            self.num_ready -= 1
        return member

    def note_answer(self, replica_id: int, num_steps: int, now_s: float) -> None:
        """It answered; ``num_steps`` grows with each step of its engine."""
        member = self._members.get(replica_id)
        if member is None:
            return
        member.is_placed = True
        member.answered_s = now_s
        if num_steps != member.num_steps:
            member.num_steps = num_steps
            member.moved_s = now_s

    def unplaced(self) -> list[int]:
        """Replicas without a process, the newest first: no node has room for them yet."""
        return [replica_id for replica_id, member in reversed(self._members.items()) if not member.is_placed]

    def loading_since(self, before_s: float) -> list[int]:
        """Replicas that began to load then or earlier, and are not ready."""
        return [
            replica_id
            for replica_id, member in self._members.items()
            if not member.is_ready and member.loads_since_s is not None and member.loads_since_s <= before_s
        ]

    def give(self, replica_id: int, unit_index: int, attempt: int, now_s: float) -> None:
        """Book a lease."""
        member = self._members[replica_id]
        if not member.leases:
            member.moved_s = now_s
        member.leases[unit_index] = Held(attempt, now_s)

    def end_lease(self, replica_id: int, unit_index: int, attempt: int) -> Held | None:
        """The lease, if the replica holds it with this attempt; it is over then."""
        member = self._members.get(replica_id)
        held = member.leases.get(unit_index) if member else None
        if member is None or held is None or held.attempt != attempt:
            return None
        return member.leases.pop(unit_index)

    def idle(self) -> list[int]:
        """Ready replicas that hold nothing."""
        return [replica_id for replica_id in self.hungry if not self._members[replica_id].leases]

    def leases(self) -> list[tuple[int, Held, int]]:
        """Each unit that is held, how, and how many older leases its replica has to work on."""
        return [
            (unit_index, held, position)
            for member in self._members.values()
            for position, (unit_index, held) in enumerate(member.leases.items())
        ]

    def take_unbegun(self) -> list[tuple[int, int, Held]]:
        """End the leases that no replica has come to: replica, unit, lease."""
        return [
            (replica_id, unit_index, member.leases.pop(unit_index))
            for replica_id, member in self._members.items()
            for unit_index in list(member.leases)[LEASES_BEGUN:]
        ]

    def forgive_pause(self, pause_s: float) -> None:
        """The driver slept: none of them is dead or slow for it."""
        for member in self._members.values():
            member.answered_s += pause_s
            member.moved_s += pause_s
            if member.loads_since_s is not None:
                member.loads_since_s += pause_s

    def hung(self, now_s: float, policy: DispatchPolicy) -> list[tuple[int, str]]:
        """The replicas that hold leases and do nothing, and how that shows."""
        max_silence_s = policy.max_silence_s
        found = [
            (replica_id, _hang_reason(member, now_s, max_silence_s, policy.step_timeout_s))
            for replica_id, member in self._members.items()
            if member.leases
        ]
        return [(replica_id, reason) for replica_id, reason in found if reason]


def _hang_reason(member: Member, now_s: float, max_silence_s: float, step_timeout_s: float) -> str:
    silent_s = now_s - member.answered_s
    if silent_s >= max_silence_s:
        return f"it has not answered for {silent_s:.0f} s"
    stalled_s = now_s - member.moved_s
    if stalled_s >= step_timeout_s:
        return f"its engine has not finished a step for {stalled_s:.0f} s (cluster.step_timeout_s)"
    return ""
