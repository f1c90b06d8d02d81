"""Which Ray cluster a run uses, and how many replicas of which size it can carry.

An existing cluster must have the same environment on its nodes, b2batch included: the code is not
shipped with the job.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

import ray
from ray.exceptions import AuthenticationError
from ray.util.placement_group import placement_group, remove_placement_group

from b2batch.errors import ClusterError
from b2batch.spec import ClusterSpec

logger = logging.getLogger(__name__)

# Units and receipts are small and stay out of the object store; it holds the worker's arguments.
_OBJECT_STORE_BYTES = 100 << 20
_PROBE_TIMEOUT_S = 5.0
_ACCELERATOR, _ACCELERATOR_SHARE = "accelerator_type:", 0.001  # how Ray marks a node's accelerator
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "RAYON_NUM_THREADS",
)


@dataclass(frozen=True, slots=True)
class Node:
    """What one node of the cluster has in all, used or not; ``resources`` beside CPUs and GPUs."""

    num_cpus: float
    num_gpus: float
    resources: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Placement:
    """How many replicas to ask for, and what each one takes; ``resources`` beside CPUs and GPUs."""

    num_replicas: int
    num_cpus: float
    num_gpus: float
    resources: Mapping[str, float] = field(default_factory=dict)

    @property
    def bundle(self) -> dict[str, float]:
        """What one replica takes, by Ray's names."""
        amounts = {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.resources}
        return {name: amount for name, amount in amounts.items() if amount}

    def room(self, nodes: Sequence[Node]) -> int:
        """How many such replicas these nodes carry."""
        return sum(_fits(node, self) for node in nodes)

    def avoidable(self, avoided: frozenset[str], nodes: Mapping[str, Node]) -> frozenset[str]:
        """Which of the ``avoided`` nodes, by id, to keep a replica from: none if no other could carry it."""
        others = [node for node_id, node in nodes.items() if node_id not in avoided]
        return avoided if self.room(others) else frozenset()

    @property
    def env_vars(self) -> MappingProxyType[str, str]:
        """Set before the replica's process starts: torch reads its thread counts once, on import."""
        num_threads = str(max(1, int(self.num_cpus)))
        variables = dict.fromkeys(_THREAD_VARIABLES, num_threads)
        return MappingProxyType(variables | {"TOKENIZERS_PARALLELISM": "false"})


@dataclass(frozen=True, slots=True)
class Cluster:
    """A connection to Ray. ``is_own``: it was started for this run and ends with it."""

    is_own: bool

    def nodes(self) -> list[Node]:
        """The nodes that are alive."""
        return list(nodes_by_id().values())

    def place(
        self, spec: ClusterSpec, device: str, num_units: int, while_waiting: Callable[[], None]
    ) -> Placement:
        """The replicas this cluster carries; waits for nodes up to ``spec.start_timeout_s``.

        ``while_waiting`` is called every second of it; what it raises ends the wait. Meanwhile an
        autoscaler sees that one replica's resources are asked for.

        Raises:
            ClusterError: no node is large enough for one replica.
        """

        def sleep(seconds: float) -> None:
            time.sleep(seconds)
            while_waiting()

        found = plan_replicas(self.nodes(), spec, device, num_units)
        timeout_s = 0.0 if self.is_own else spec.start_timeout_s  # nobody adds nodes to our own
        must_wait = not found.num_replicas and timeout_s > 0
        with _asked_for(found) if must_wait else nullcontext():
            return wait_for_placement(self.nodes, spec, device, num_units, timeout_s, time.monotonic, sleep)

    def watch(self, spec: ClusterSpec, placement: Placement, num_units: int) -> Callable[[], int] | None:
        """How many replicas there are to be now, where that follows the nodes; 1 to ``num_units``.

        None where it is fixed: those of them that find no room wait in Ray for nodes that join.
        """
        if self.is_own or spec.replicas != "auto":
            return None
        return lambda: max(1, min(num_units, placement.room(self.nodes())))


def nodes_by_id() -> dict[str, Node]:
    """The nodes of the connected cluster that are alive."""
    found = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    return {
        name: Node(amounts.get("CPU", 0.0), amounts.get("GPU", 0.0), amounts)
        for name, amounts in found.items()
    }


@contextmanager
def connect(spec: ClusterSpec) -> Iterator[Cluster]:
    """Connect to the cluster that ``spec.address`` names, or start one on this machine.

    ``auto`` takes the connection this process has, else ``RAY_ADDRESS``, else the cluster that
    ``ray start`` left running here, else a cluster of our own. Ray's own handler of SIGTERM is
    put back to what it was before.

    Raises:
        ClusterError: the cluster cannot be reached.
    """
    if ray.is_initialized() and spec.address == "auto":
        yield Cluster(is_own=False)
        return
    with _signals_kept():
        cluster = _connect(spec.address)
    try:
        yield cluster
    finally:
        ray.shutdown()


def plan_replicas(nodes: Sequence[Node], spec: ClusterSpec, device: str, num_units: int) -> Placement:
    """The shape and number of replicas; ``num_replicas`` is 0 when no node can carry one.

    ``auto`` is a GPU a replica where there are GPUs, else cores; never more replicas than units.
    ``device`` is ``auto``, ``cpu`` or ``cuda``.
    """
    num_gpus = _gpus_per_replica(nodes, spec, device)
    resources = dict(spec.resources)
    if spec.accelerator_type is not None:
        resources[_ACCELERATOR + spec.accelerator_type] = _ACCELERATOR_SHARE
    shape = Placement(0, spec.cpus_per_replica, num_gpus, resources)
    room = shape.room(nodes)
    wanted = min(spec.max_replicas or room, max(1, num_units))
    return replace(shape, num_replicas=wanted if room else 0)


def wait_for_placement(
    nodes: Callable[[], Sequence[Node]],
    spec: ClusterSpec,
    device: str,
    num_units: int,
    timeout_s: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> Placement:
    """``plan_replicas`` as soon as some node can carry a replica; ClusterError says what is missing."""
    deadline_s = clock() + timeout_s
    is_told = False
    while True:
        found = nodes()
        placement = plan_replicas(found, spec, device, num_units)
        if placement.num_replicas:
            return placement
        shortage = _describe_shortage(found, placement)
        if clock() >= deadline_s:
            raise ClusterError(shortage)
        if not is_told:
            logger.warning("%s; waiting up to %.0f s for a node that joins", shortage, timeout_s)
            is_told = True
        sleep(1.0)


def _gpus_per_replica(nodes: Sequence[Node], spec: ClusterSpec, device: str) -> float:
    if spec.gpus_per_replica != "auto":
        return spec.gpus_per_replica
    if device == "auto":
        return 1.0 if any(node.num_gpus for node in nodes) else 0.0
    return 1.0 if device == "cuda" else 0.0


@contextmanager
def _asked_for(replica: Placement) -> Iterator[None]:
    """Let an autoscaler know that a node is wanted; without one it changes nothing."""
    wish = placement_group([replica.bundle], name="b2batch waits for a node")
    try:
        yield
    finally:
        remove_placement_group(wish)


def _fits(node: Node, replica: Placement) -> int:
    """How many replicas the node carries; Ray counts in 1/10000, so a rounding error is forgiven."""
    rooms = [int(node.num_cpus / replica.num_cpus + 1e-4)]
    rooms += [int(node.resources.get(name, 0.0) / need + 1e-4) for name, need in replica.resources.items()]
    if replica.num_gpus >= 1:
        rooms.append(int(node.num_gpus / replica.num_gpus + 1e-4))
    elif replica.num_gpus:  # a share is of one device
        rooms.append(int(node.num_gpus) * int(1 / replica.num_gpus + 1e-4))
    return min(rooms)


def _describe_shortage(nodes: Sequence[Node], replica: Placement) -> str:
    need = f"a replica needs {_amount(replica, replica)}"
    if not nodes:
        return f"{need}, and the cluster has no node"
    largest = max(nodes, key=lambda node: (_share(node, replica), node.num_gpus, node.num_cpus))
    which = "the largest node has" if not replica.resources else "the node that comes closest has"
    return f"{need}, and {which} {_amount(largest, replica)}"


def _share(node: Node, replica: Placement) -> int:
    """How many of the other resources that a replica needs the node has enough of."""
    return sum(node.resources.get(name, 0.0) >= need for name, need in replica.resources.items())


def _amount(holder: Node | Placement, replica: Placement) -> str:
    """What a node has, or a replica needs, of all that a replica needs."""
    told = [f"{holder.num_gpus:g} GPUs", f"{holder.num_cpus:g} CPUs"]
    for name in replica.resources:
        amount = holder.resources.get(name, 0.0)
        kind = name.removeprefix(_ACCELERATOR)
        told.append(f"{amount:g} {name}" if kind == name else f"{'' if amount else 'no '}accelerator {kind}")
    return f"{', '.join(told[:-1])} and {told[-1]}"


def _connect(address: str) -> Cluster:
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or address_of_ray_start() or "local"
    try:
        if address == "local":
            return _start_own()
        _probe(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        return Cluster(is_own=False)
    except (ConnectionError, RuntimeError, ValueError, OSError, AuthenticationError) as error:
        raise ClusterError(f"cluster.address {address}: Ray cannot be reached or started: {error}") from error


def address_of_ray_start() -> str | None:
    """Where ``ray start`` says that its cluster is, if it still answers.

    Not ``ray.init(address="auto")``: that also joins the private cluster of any process on this
    machine, which ends when that process does.
    """
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    try:
        address = note.read_text().strip()
        _probe(address)
    except (OSError, ValueError):
        return None
    return address or None


def _probe(address: str) -> None:
    """OSError when nobody listens at ``address``: Ray itself needs minutes to say so."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.hostname and parts.port:
        socket.create_connection((parts.hostname, parts.port), timeout=_PROBE_TIMEOUT_S).close()


def _start_own() -> Cluster:
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=_OBJECT_STORE_BYTES,
    )
    return Cluster(is_own=True)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray's init puts its own handler on SIGTERM, which would end a run without draining."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
