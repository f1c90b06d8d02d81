"""The replicas as Ray actors: start, lease, wait for news, kill. No decision is taken here."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from b2batch.cluster.load_turn import LoadTurn
from b2batch.cluster.placement import Placement, nodes_by_id
from b2batch.cluster.policy import Loss, poll_timeout_s
from b2batch.cluster.replica import MakeWorker, Order, Replica, ReplicaUpdate
from b2batch.cluster.verdict import ErrorText

logger = logging.getLogger(__name__)

_NODE_DIED = "node has died"  # stands in Ray's message; the error's type does not tell
_LOW_MEMORY = "low on memory"  # likewise, of Ray's memory monitor
_WATCH_S = 3.0
_NODE_LABEL = "ray.io/node-id"
_ANSI_COLOUR = re.compile("\x1b\\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class Answer:
    """A replica answered a poll."""

    replica_id: int
    update: ReplicaUpdate


@dataclass(frozen=True, slots=True)
class Lost:
    """A replica's process is gone."""

    replica_id: int
    loss: Loss
    detail: str


@dataclass(frozen=True, slots=True)
class NotStarted:
    """The actor could not be created: its node lacks b2batch, or what ``make_worker`` is made of."""

    replica_id: int
    error: ErrorText


@dataclass(frozen=True, slots=True)
class Target:
    """Nodes have joined or left: so many replicas there are to be now."""

    num_replicas: int


FleetEvent = Answer | Lost | NotStarted | Target


class Fleet(Protocol):
    """What the driver needs of replicas, whatever runs them."""

    def start(self, replica_id: int, avoided: frozenset[str]) -> None:
        """Begin to start a replica, not on the ``avoided`` nodes where others can carry it."""

    def order(self, replica_id: int, order: Order) -> None:
        """Hand a replica a unit, or have it leave one, with its next poll."""

    def kill(self, replica_id: int) -> None:
        """End a replica without asking it; nothing more is heard of it."""

    def wait(self, timeout_s: float) -> list[FleetEvent]:
        """News of all replicas, after at most ``timeout_s`` seconds."""
        ...

    def close(self, grace_s: float) -> None:
        """End all replicas; those that can finish their step within ``grace_s`` do."""


@dataclass(slots=True)
class _Member:
    replica_id: int
    actor: Any
    num_known: int = 0
    outbox: list[Order] = field(default_factory=list)
    poll: Future[ReplicaUpdate] | None = None  # the outstanding call
    sent: tuple[Order, ...] = ()


class _ReplicaActor(Replica):
    """A replica that knows its node, and waits there for its turn to load."""

    def __init__(self, make_worker: MakeWorker, load_bytes: int) -> None:
        super().__init__(make_worker, ray.get_runtime_context().get_node_id(), LoadTurn(load_bytes))


class RayFleet:
    """Replicas of one shape on the connected Ray cluster.

    A replica has one poll outstanding at any time; its answer comes by itself. They are spread over the
    nodes, so that the death of one costs few.
    """

    def __init__(
        self,
        placement: Placement,
        make_worker: MakeWorker,
        *,
        load_bytes: int = 0,
        target: Callable[[], int] | None = None,
    ) -> None:
        """``make_worker`` is pickled once; it must be importable, or picklable by value, on the nodes.

        Args:
            load_bytes: host memory that one replica takes while it loads; see ``LoadTurn``.
            target: how many replicas there are to be now; asked for now and then, off the driver's thread.
        """
        self._actor_class = ray.remote(_ReplicaActor)
        self._actor_options = {
            "num_cpus": placement.num_cpus,
            "num_gpus": placement.num_gpus,
            "resources": dict(placement.resources),
            "scheduling_strategy": "SPREAD",
            "max_restarts": 0,  # a death is told at once, and the dispatcher replaces it
            "max_task_retries": 0,
            "max_concurrency": 4,  # poll, wake and stop do not wait for one another
            "runtime_env": {"env_vars": dict(placement.env_vars)},
        }
        self._placement = placement
        self._arguments = (ray.put(make_worker), load_bytes)
        self._members: dict[int, _Member] = {}
        self._to_poll: list[_Member] = []
        self._answers: SimpleQueue[tuple[_Member, Future[ReplicaUpdate]] | Target] = SimpleQueue()
        self._is_closed = threading.Event()
        if target is not None:
            watch = partial(_watch_target, target, placement.num_replicas, self._answers.put, self._is_closed)
            threading.Thread(target=watch, name="b2batch-nodes", daemon=True).start()

    def start(self, replica_id: int, avoided: frozenset[str]) -> None:
        """Create the actor; Ray places it when there is room."""
        member = self._members[replica_id] = _Member(replica_id, self.make_actor(replica_id, avoided))
        self._to_poll.append(member)

    def order(self, replica_id: int, order: Order) -> None:
        """Queue for the next poll; one that is waiting is cut short. Nothing for a replica just lost."""
        member = self._members.get(replica_id)
        if member is None:  # its loss was collected with the news that led to this order
            return
        if member.poll is not None and not member.outbox:
            member.actor.wake.remote()
        member.outbox.append(order)

    def kill(self, replica_id: int) -> None:
        """SIGKILL; a process that is stopped ends about 5 s later."""
        member = self._members.pop(replica_id, None)
        if member is not None:
            self.kill_actor(member.actor)

    def wait(self, timeout_s: float) -> list[FleetEvent]:
        """Poll whoever is not being polled, then collect every answer that is there."""
        for member in self._to_poll:
            self._send_poll(member)
        self._to_poll.clear()
        answers = []
        with suppress(Empty):
            answers.append(self._answers.get(timeout=timeout_s))
            while True:
                answers.append(self._answers.get_nowait())
        events = (item if isinstance(item, Target) else self._receive(*item) for item in answers)
        return [event for event in events if event is not None]

    def close(self, grace_s: float) -> None:
        """Ask all to stop, wait, and kill whoever is left. Safe to call twice."""
        self._is_closed.set()
        if grace_s > 0 and self._members:
            stops = [member.actor.stop.remote(grace_s) for member in self._members.values()]
            ray.wait(stops, num_returns=len(stops), timeout=grace_s)
        for replica_id in list(self._members):
            self.kill(replica_id)

    def make_actor(self, replica_id: int, avoided: frozenset[str]) -> Any:
        """A handle with the methods of ``Replica``."""
        avoided = avoided and self._placement.avoidable(avoided, nodes_by_id())
        options = self._actor_options
        if not avoided:
            return self._actor_class.options(**options).remote(*self._arguments)
        logger.warning("replica=%d: not on nodes %s, where replicas died", replica_id, sorted(avoided))
        elsewhere = {_NODE_LABEL: f"!in({','.join(sorted(avoided))})"}
        return self._actor_class.options(**options, label_selector=elsewhere).remote(*self._arguments)

    def kill_actor(self, actor: Any) -> None:
        """End what ``make_actor`` made."""
        ray.kill(actor)

    def _send_poll(self, member: _Member) -> None:
        if member.replica_id not in self._members:
            return  # lost with its last answer
        member.sent = (*member.sent, *member.outbox)  # an unanswered poll's orders go again
        member.outbox.clear()
        timeout_s = poll_timeout_s(max(self._placement.num_replicas, len(self._members)))
        ref = member.actor.poll.remote(member.num_known, member.sent, timeout_s)
        # Being called costs less than asking a thousand references whether one of them is there.
        member.poll = ref.future()
        member.poll.add_done_callback(lambda answer: self._answers.put((member, answer)))

    def _receive(self, member: _Member, answer: Future[ReplicaUpdate]) -> FleetEvent | None:
        replica_id = member.replica_id
        if replica_id not in self._members:
            return None  # it was killed meanwhile
        member.poll = None
        self._to_poll.append(member)
        try:
            update = answer.result()
        except ActorUnavailableError as error:
            logger.warning("replica=%d cannot be reached just now: %s", replica_id, _first_line(error))
            return None  # polled again; one that never comes back is found by its silence
        except RayError as error:
            self._members.pop(replica_id)
            if isinstance(error, RayActorError) and error.actor_init_failed:
                return NotStarted(replica_id, _start_error_text(error))
            return Lost(replica_id, _loss_of(error), _describe(error))
        member.sent = ()
        member.num_known = update.num_news
        return Answer(replica_id, update)


def _watch_target(
    target: Callable[[], int], num_now: int, tell: Callable[[Target], None], is_closed: threading.Event
) -> None:
    """Tell each change until closed; while Ray does not answer there is none."""
    while not is_closed.wait(_WATCH_S):
        try:
            num_wanted = target()
        except Exception as error:
            logger.debug("the nodes cannot be listed just now: %s", error)
            continue
        if num_wanted != num_now:
            num_now = num_wanted
            tell(Target(num_now))


def _loss_of(error: RayError) -> Loss:
    if isinstance(error, RayActorError) and (error.preempted or _NODE_DIED in str(error)):
        return Loss.NODE
    return Loss.MEMORY if _LOW_MEMORY in str(error) else Loss.CRASH


def _start_error_text(error: RayError) -> ErrorText:
    """Ray quotes the traceback of the creation; its last line is the error."""
    text = _ANSI_COLOUR.sub("", str(error)).strip()
    code, _, message = text.splitlines()[-1].partition(": ")
    return code, message, text[-8000:]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _describe(error: RayError) -> str:
    """Ray's own account in one line, bounded, without the identifiers before and the guesses after."""
    text = " ".join(_ANSI_COLOUR.sub("", str(error)).split())
    cause = text[max(0, text.find("The actor is dead because")) :]
    return cause.partition(" Some common causes include")[0][:1000]
