"""A Ray cluster on this machine whose parts can be killed: a head, and nodes that carry one replica each."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ray.cluster_utils import Cluster

# Nodes are declared dead after about 4 s instead of 15.
_QUICK_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_DEDUP_LOGS": "0",
    "RAY_raylet_start_wait_time_s": "120",  # a busy machine takes its time
    "RAY_memory_monitor_refresh_ms": "0",  # other processes of this machine are not part of the test
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    "OMP_NUM_THREADS": "1",
}
_OBJECT_STORE_BYTES = 80 << 20
_END_TIMEOUT_S = 10.0
_REPLICA_TITLE = "ray::_Replica"  # its siblings are agents, without which the node ends


class FaultCluster:
    """``num_nodes`` nodes of one CPU beside the head. A context: leaving it ends every process of it.

    ``environment`` is what drivers and nodes run with. Never ``ray stop``: other clusters of this
    machine are not ours.
    """

    def __init__(self, num_nodes: int, home: Path, python_path: Path | None = None) -> None:
        self._num_nodes = num_nodes
        self.environment = {**os.environ, **_ENVIRONMENT, "HOME": str(home)}  # Ray writes a token there
        self.environment.pop("RAY_ADDRESS", None)
        if python_path is not None:
            paths = [str(python_path), os.environ.get("PYTHONPATH", "")]
            self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self._cluster: Any = None
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._nodes: list[Any] = []
        self._strays: list[int] = []  # replicas whose node was killed
        self._is_gcs_dead = False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def address(self) -> str:
        """For ``cluster.address``."""
        return str(self._cluster.address)

    def start(self) -> None:
        """A new cluster; about 20 s. Its files are its own, so nobody takes it for the machine's cluster."""
        self._directory = tempfile.TemporaryDirectory(prefix="b2f-", ignore_cleanup_errors=True)
        self.environment["RAY_TMPDIR"] = self._directory.name
        with self._as_environment():
            head = {
                "num_cpus": 0,
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
                "_system_config": _QUICK_HEALTH_CHECKS,
            }
            self._cluster = Cluster(initialize_head=True, connect=False, head_node_args=head)
        self._nodes, self._is_gcs_dead = [], False
        self.fill_up()

    def fill_up(self) -> None:
        """Add nodes for those that were killed, unless the whole cluster is to be started again."""
        while not self._is_gcs_dead and len(self._nodes) < self._num_nodes:
            with self._as_environment():
                node = self._cluster.add_node(num_cpus=1, object_store_memory=_OBJECT_STORE_BYTES, wait=False)
            self._nodes.append(node)

    def close(self) -> None:
        """End every process of the cluster, dead or alive."""
        for node in [*self._nodes, self._cluster and self._cluster.head_node]:
            if node is not None:
                _end(node)
        for pid in self._strays:
            if _is_replica(pid):
                os.kill(pid, signal.SIGKILL)
        self._cluster, self._nodes, self._strays = None, [], []
        if self._directory is not None:
            self._directory.cleanup()

    @property
    def is_alive(self) -> bool:
        """Whether a driver can connect: its GCS was not killed."""
        return not self._is_gcs_dead

    def kill_gcs(self) -> None:
        """The cluster cannot be used after it; ``close`` and ``start`` again."""
        self._cluster.head_node.all_processes["gcs_server"][0].process.kill()
        self._is_gcs_dead = True

    def raylet_pids(self) -> list[int]:
        """Of the nodes that carry replicas, oldest first."""
        return [_raylet(node).pid for node in self._nodes]

    def end_raylet(self, pid: int, number: signal.Signals, *, reap: bool) -> None:
        """By a signal. Reaped, its workers end within a second; not reaped, they go on for up to a minute."""
        [node] = [node for node in self._nodes if _raylet(node).pid == pid]
        self._strays += _replicas_of(pid)
        os.kill(pid, number)
        if reap:
            _wait(_raylet(node))
        self._nodes.remove(node)

    def replica_pids(self) -> list[int]:
        """The replicas of all nodes that are up."""
        return [pid for raylet in self.raylet_pids() for pid in _replicas_of(raylet)]

    def replica_pids_of(self, raylet: int) -> list[int]:
        """The replicas of one node."""
        return _replicas_of(raylet)

    def forget(self, raylet: int) -> None:
        """Do not count on this node any more: it was declared dead. What is left of it ends."""
        for node in [node for node in self._nodes if _raylet(node).pid == raylet]:
            self._nodes.remove(node)
            self._strays += _replicas_of(raylet)
            _end(node)

    @contextlib.contextmanager
    def _as_environment(self) -> Iterator[None]:
        before = dict(os.environ)
        os.environ.update(self.environment)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def _wait(process: Any) -> None:
    """Until it has ended; kill -9 if it takes its time."""
    try:
        process.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _raylet(node: Any) -> Any:
    return node.all_processes["raylet"][0].process


def _end(node: Any) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(_raylet(node).pid, signal.SIGCONT)  # one that is stopped would not be waited for
    node.kill_all_processes(check_alive=False, allow_graceful=False)


def _replicas_of(raylet: int) -> list[int]:
    return [pid for pid in _all_pids() if _is_replica(pid) and _parent(pid) == raylet]


def _is_replica(pid: int) -> bool:
    return _title(pid).startswith(_REPLICA_TITLE)


def _all_pids() -> list[int]:
    return sorted(int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it ended meanwhile
        return 0


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
