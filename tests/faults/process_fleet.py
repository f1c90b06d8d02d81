"""Replicas as processes of this machine, without Ray: made from a server that has torch loaded already."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from b2batch import failpoints
from b2batch.cluster.fleet import Answer, FleetEvent, Lost
from b2batch.cluster.policy import Loss
from b2batch.cluster.replica import Order, Replica, ReplicaState
from b2batch.rows import UnitReport
from b2batch.worker_args import WorkerArgs
from b2batch.worker_start import start_worker

from .mutants import planted

POLL_S = 1.0
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["b2batch.worker", "b2batch.cluster.driver"])


@dataclass(frozen=True)
class ReplicaPlan:
    """What a replica is to suffer: a failpoint at which it ends or stops, a planted bug, another end."""

    failpoint: str = ""
    mutant: str = ""
    death: str = ""


def _exhaust_memory() -> None:
    """Less address space than there is, and a tensor that does not fit: what torch's allocator says."""
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    torch.ones(1 << 30)


def _exit() -> None:
    raise SystemExit(3)


DEATHS: dict[str, Callable[[], object]] = {
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "segfault": lambda: ctypes.string_at(0),
    "os._exit": lambda: os._exit(0),
    "SystemExit": _exit,
    "device-side assert": lambda: torch.embedding(torch.ones(2, 2), torch.tensor([7])),
    "out of memory": _exhaust_memory,
}


class _DyingWorker:
    """A worker whose first step with rows in it is the last thing that its process does."""

    def __init__(self, inner: Any, death: str) -> None:
        self._inner, self._death = inner, death

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def step(self) -> Any:
        DEATHS[self._death]()
        return self._inner.step()


def _make(args: WorkerArgs, plan: ReplicaPlan) -> Any:
    worker = start_worker(args)
    return _DyingWorker(worker, plan.death) if plan.death else worker


def serve(connection: Connection, args: WorkerArgs, plan: ReplicaPlan) -> None:
    """The replica's process: answer polls until the driver is gone."""
    if plan.failpoint:
        failpoints.arm(plan.failpoint)
    with planted(plan.mutant):
        replica = Replica(lambda: _make(args, plan))
        with contextlib.suppress(EOFError):
            while True:
                num_known, orders = connection.recv()
                connection.send(replica.poll(num_known, orders, POLL_S))


@dataclass
class Stray:
    """A replica that cannot be reached any more, and goes on one day."""

    process: BaseProcess
    connection: Connection
    num_known: int
    is_polled: bool

    def go_on(self) -> list[UnitReport]:
        """Continue it; what it has to say about its units."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGCONT)
        reports: list[UnitReport] = []
        while not reports:
            if not self.is_polled:
                self.connection.send((self.num_known, ()))
            update = self.connection.recv()
            assert update.state is not ReplicaState.FAILED, update.error
            reports = [item for item in update.news if isinstance(item, UnitReport)]
            self.num_known, self.is_polled = update.num_news, False
        self.process.kill()
        return reports


@dataclass
class _Member:
    process: BaseProcess
    connection: Connection
    num_known: int = 0
    outbox: list[Order] = field(default_factory=list)
    is_polled: bool = False


class ProcessFleet:
    """A Fleet of processes. One that is stopped counts as out of reach: its node is told to be lost.

    ``plan_of`` says what each replica is to suffer, by its id; ``on_lost`` is called after each loss.
    """

    def __init__(
        self, args: WorkerArgs, plan_of: Callable[[int], ReplicaPlan], on_lost: Callable[[], None]
    ) -> None:
        self._args, self._plan_of, self._on_lost = args, plan_of, on_lost
        self._members: dict[int, _Member] = {}
        self.strays: list[Stray] = []

    def start(self, replica_id: int, avoided: frozenset[str]) -> None:
        ours, theirs = FORKS.Pipe()
        target = (theirs, self._args, self._plan_of(replica_id))
        process = FORKS.Process(target=serve, args=target, daemon=True)
        process.start()
        theirs.close()
        self._members[replica_id] = _Member(process, ours)

    def order(self, replica_id: int, order: Order) -> None:
        if replica_id in self._members:
            self._members[replica_id].outbox.append(order)

    def kill(self, replica_id: int) -> None:
        member = self._members.pop(replica_id, None)
        if member is not None:
            member.process.kill()
            member.process.join()

    def wait(self, timeout_s: float) -> list[FleetEvent]:
        stopped = [key for key, member in self._members.items() if _is_stopped(member.process)]
        if stopped:
            return [self._lose_sight(replica_id) for replica_id in stopped]
        for member in self._members.values():
            if not member.is_polled:
                self._poll(member)
        ids: dict[Any, int] = {member.connection: key for key, member in self._members.items()}
        return [self._receive(ids[connection]) for connection in wait(list(ids), timeout_s)]

    def close(self, grace_s: float) -> None:
        for replica_id in list(self._members):
            self.kill(replica_id)

    def _poll(self, member: _Member) -> None:
        with contextlib.suppress(BrokenPipeError):  # its end is told by the answer that does not come
            member.connection.send((member.num_known, tuple(member.outbox)))
        member.outbox.clear()
        member.is_polled = True

    def _receive(self, replica_id: int) -> FleetEvent:
        member = self._members[replica_id]
        member.is_polled = False
        try:
            update = member.connection.recv()
        except (EOFError, ConnectionResetError):
            self.kill(replica_id)
            self._on_lost()
            return Lost(replica_id, Loss.CRASH, f"exit code {member.process.exitcode}")
        member.num_known = update.num_news
        if update.state is ReplicaState.FAILED:
            self._on_lost()
        return Answer(replica_id, update)

    def _lose_sight(self, replica_id: int) -> FleetEvent:
        member = self._members.pop(replica_id)
        self.strays.append(Stray(member.process, member.connection, member.num_known, member.is_polled))
        self._on_lost()
        return Lost(replica_id, Loss.NODE, "out of reach")


def _is_stopped(process: BaseProcess) -> bool:
    stat = Path(f"/proc/{process.pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "T"
