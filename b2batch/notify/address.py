"""Which addresses a webhook may reach, checked where nothing leads around it: as a socket connects.

A name may resolve to another address a moment after it was looked up (DNS rebinding), a redirect may lead
elsewhere, a proxy may connect for somebody else. So the address is looked at that the operating system is
asked to connect to, by an audit hook, which Python offers no way to take off again.
"""

from __future__ import annotations

import ipaddress
import sys
from typing import Any

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Metadata services whose addresses count as global (Azure, Oracle); the others' are link-local or private.
_METADATA = tuple(map(ipaddress.ip_network, ("168.63.129.16/32", "192.0.0.0/24")))


def is_public(address: str) -> bool:
    """Whether an IP address is of the public internet; what is no IP address is not.

    Not public: loopback, link-local, private, shared, reserved and multicast ones, those of metadata
    services, and IPv6 addresses that stand for such an IPv4 address.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        return is_public(str(ip.ipv4_mapped))
    stood_for = _stood_for(ip)
    if stood_for is not None and not is_public(str(stood_for)):
        return False
    return ip.is_global and not ip.is_multicast and not any(ip in net for net in _METADATA)


def _stood_for(ip: IpAddress) -> ipaddress.IPv4Address | None:
    """The IPv4 address that a gateway would reach for an IPv6 address (6to4, NAT64)."""
    if isinstance(ip, ipaddress.IPv4Address):
        return None
    return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else ip.sixtofour


class Guard:
    """Refuses every connection of this process to an address that is not public, from ``install`` on."""

    def __init__(self) -> None:
        self.refused = ""

    def install(self) -> None:
        """Look at all connections from now on; it cannot be undone."""
        sys.addaudithook(self._see)

    def _see(self, event: str, args: tuple[Any, ...]) -> None:
        if event != "socket.connect":
            return
        place = args[1]
        address = str(place[0]) if isinstance(place, tuple) and place else "a local socket"
        if not is_public(address):
            self.refused = address
            raise PermissionError(f"{address} is not a public address")
