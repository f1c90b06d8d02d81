"""Which addresses are of the public internet, and that a connection to another one cannot be made."""

from __future__ import annotations

import subprocess
import sys

import pytest

from b2batch.notify.address import is_public


@pytest.mark.parametrize("address", ["8.8.8.8", "::ffff:8.8.8.8", "64:ff9b::808:808", "2606:4700::1111"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.0.1", "::1", "0.0.0.0", "::", "::ffff:127.0.0.1",  # this machine
        "169.254.169.254", "169.254.170.2", "fe80::1", "fe80::1%eth0", "::ffff:169.254.169.254",  # link-local
        "fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192",  # metadata services
        "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "2002:7f00:1::",  # IPv6 that stands for those
        "10.1.2.3", "172.16.0.1", "192.168.1.1", "fc00::1", "224.0.0.1", "ff02::1", "255.255.255.255",
        "localhost", "", "2130706433", "0x7f000001", "127.1",  # no IP addresses
    ],
)  # fmt: skip
def test_other_addresses(address: str) -> None:
    assert not is_public(address)


REBINDING = """
import socket, sys
from b2batch.notify.address import Guard
port, answers = int(sys.argv[1]), iter(["8.8.8.8", "127.0.0.1"])
socket.getaddrinfo = lambda *args, **options: [(2, 1, 6, "", (next(answers), port))]
guard = Guard()
guard.install()
assert socket.getaddrinfo("rebound.example", port)[0][4][0] == "8.8.8.8"
try:
    socket.create_connection(("rebound.example", port), timeout=5)
except PermissionError:
    print("refused", guard.refused)
"""


def test_a_name_that_resolves_elsewhere_after_it_was_looked_up_is_refused_when_it_connects() -> None:
    done = subprocess.run([sys.executable, "-c", REBINDING, "9"], capture_output=True, text=True, timeout=60)
    assert done.stdout == "refused 127.0.0.1\n", done.stderr
