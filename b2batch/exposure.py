"""Whether a Ray cluster can be used by whoever reaches its ports: who does can run code on every node."""

from __future__ import annotations

import ipaddress
import os
import socket
import urllib.error
import urllib.request
from dataclasses import dataclass
from urllib.parse import urlsplit

_DASHBOARD_PORT = 8265
_TIMEOUT_S = 3.0
_NOWHERE = ("192.0.2.1", 9)  # an address for documentation: nothing is sent, it only picks the route


@dataclass(frozen=True, slots=True)
class OpenPort:
    """A port of a cluster that answers without a token. ``is_local``: only on this machine."""

    place: str
    is_local: bool


def dashboard_urls(cluster: str | None) -> list[str]:
    """Where dashboards may answer: as the environment says, at the cluster's head, and on this machine."""
    named = [
        os.environ[name]
        for name in ("RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS")
        if os.environ.get(name)
    ]
    if named:
        return [address if "://" in address else f"http://{address}" for address in named]
    hosts = [host_of(cluster)] if cluster else []
    hosts += ["127.0.0.1", own_address()]
    return [f"http://{host}:{_DASHBOARD_PORT}" for host in dict.fromkeys(hosts) if host]


def open_dashboard(url: str) -> OpenPort | None:
    """The dashboard at ``url``, if it lists its jobs to a caller without a token."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url.rstrip('/')}/api/jobs/", timeout=_TIMEOUT_S):
            return OpenPort(f"the dashboard at {url}", is_loopback(host_of(url)))
    except (OSError, ValueError, urllib.error.HTTPError):  # 401, or nobody there
        return None


def open_head(cluster: str) -> OpenPort | None:
    """The head's own port, if it answers; whether it wants a token, only the cluster's settings say."""
    parts = urlsplit(cluster if "://" in cluster else f"//{cluster}")
    try:
        socket.create_connection((parts.hostname or "", parts.port or 0), _TIMEOUT_S).close()
    except OSError:
        return None
    return OpenPort(f"the head at {parts.hostname}:{parts.port}", is_loopback(parts.hostname or ""))


def host_of(address: str) -> str:
    """The host of ``host:port`` or a URL."""
    return urlsplit(address if "://" in address else f"//{address}").hostname or ""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def own_address() -> str:
    """The address at which others reach this machine, empty where it has no network."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(_NOWHERE)
            return str(probe.getsockname()[0])
    except OSError:
        return ""
