"""``python -m b2batch.bench.child MODULE``: run one measurement in this process, JSON in, JSON out.

A process each, so that CPU seconds, peak memory and caches belong to one measurement alone. What
libraries print goes to stderr. Standard library only, as is all that ``peer_main`` needs for a peer
that runs under another interpreter.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time


def main() -> None:
    """Call ``run(document) -> document`` of the named module of this package."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)
        module = importlib.import_module(f"b2batch.bench.{sys.argv[1]}")
        json.dump(module.run(json.load(sys.stdin)), channel)


def peak_bytes() -> int:
    """The most memory this process has had resident.

    Not ``ru_maxrss``, which a process inherits from whoever started it.
    """
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def cpu_s() -> float:
    """CPU seconds of this process and of its ended children."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


if __name__ == "__main__":
    main()
