"""``doctor``: whether this machine has what a run needs, a line a check."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from b2batch.errors import B2BatchError

_PACKAGES = ("b2batch", "torch", "transformers", "ray", "pyarrow", "sentencepiece", "pydantic", "typer")
_FEW_BYTES = 2 << 30


class Verdict(StrEnum):
    """``warn``: a run may go on with it. ``fail``: it cannot."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at."""

    name: str
    verdict: Verdict
    detail: str


def examine(output: str | None = None) -> Iterator[Check]:
    """Look at one thing after another; ``output`` is a directory in which a write is tried."""
    checks: list[Callable[[], Check]] = [_python, _packages, _torch, _ray, _cluster, _exposure, _memory]
    for check in checks:
        yield check()
    yield _disk(Path(output) if output else Path.cwd())
    if output is not None:
        yield _output(output)


def _python() -> Check:
    return Check("python", Verdict.OK, f"{platform.python_version()} at {sys.executable}")


def _packages() -> Check:
    found = {name: _version(name) for name in _PACKAGES}
    missing = [name for name, number in found.items() if number is None]
    if missing:
        return Check("packages", Verdict.FAIL, f"not installed: {', '.join(missing)}")
    return Check("packages", Verdict.OK, ", ".join(f"{name} {number}" for name, number in found.items()))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torch() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a CUDA library that cannot be loaded
        return Check("torch", Verdict.FAIL, f"cannot be imported: {error}")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Check("torch", Verdict.OK, f"{len(names)} GPUs: {', '.join(names)}")
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    return Check("torch", Verdict.WARN, f"no CUDA device: models run on the CPU, {threads}")


def _ray() -> Check:
    try:
        import b2batch.cluster.placement  # noqa: F401
    except ImportError as error:
        return Check("ray", Verdict.FAIL, f"cannot be imported: {error}")
    return Check("ray", Verdict.OK, "can be imported")


def _cluster() -> Check:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return Check("cluster", Verdict.OK, "RAY_ADDRESS is not set: a run uses the cluster here or its own")
    from b2batch.cluster.placement import connect
    from b2batch.spec import ClusterSpec

    try:
        with connect(ClusterSpec()) as cluster:
            nodes = cluster.nodes()
    except B2BatchError as error:
        return Check("cluster", Verdict.FAIL, str(error))
    num_cpus, num_gpus = sum(node.num_cpus for node in nodes), sum(node.num_gpus for node in nodes)
    return Check(
        "cluster", Verdict.OK, f"{address}: {len(nodes)} nodes, {num_cpus:g} CPUs, {num_gpus:g} GPUs"
    )


def _exposure() -> Check:
    """Whoever reaches an open port of Ray can run code on the cluster (CVE-2023-48022)."""
    from b2batch.cluster.placement import address_of_ray_start
    from b2batch.exposure import dashboard_urls, open_dashboard, open_head

    cluster = os.environ.get("RAY_ADDRESS") or address_of_ray_start()
    dashboards = [found for url in dashboard_urls(cluster) if (found := open_dashboard(url))]
    head = open_head(cluster) if cluster and os.environ.get("RAY_AUTH_MODE") != "token" else None
    exposed = [port.place for port in dashboards if not port.is_local]
    advice = "set RAY_AUTH_MODE=token on all nodes, or close the port"
    if exposed:
        return Check("exposure", Verdict.FAIL, f"{', '.join(exposed)} takes orders without a token: {advice}")
    if head is not None and not head.is_local:
        return Check("exposure", Verdict.WARN, f"{head.place} may take orders without a token: {advice}")
    if dashboards:
        everyone = "takes orders from every user of this machine"
        return Check("exposure", Verdict.WARN, f"{dashboards[0].place} {everyone}: {advice}")
    return Check("exposure", Verdict.OK, "no Ray port was found that answers without a token")


def _memory() -> Check:
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    verdict = Verdict.OK if free_bytes >= _FEW_BYTES else Verdict.WARN
    return Check("memory", verdict, f"{free_bytes / 2**30:.1f} GiB free")


def _disk(place: Path) -> Check:
    existing = next(parent for parent in (place.absolute(), *place.absolute().parents) if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    verdict = Verdict.OK if free_bytes >= _FEW_BYTES else Verdict.WARN
    return Check("disk", verdict, f"{free_bytes / 2**30:.1f} GiB free at {existing}")


def _output(output: str) -> Check:
    """Write there as a commit does, and remove what was written."""
    from b2batch.outputs.store import open_store

    place = Path(output)
    existed = place.exists()
    try:
        open_store(output, "0" * 64).probe()
    except (B2BatchError, OSError) as error:
        return Check("output", Verdict.FAIL, str(error))
    open_store(output).delete_tree("__b2batch/00000000")
    if not existed:
        (place / "__b2batch").rmdir()
        place.rmdir()
    return Check("output", Verdict.OK, f"{output}: written, and created exclusively")
