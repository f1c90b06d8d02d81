"""What the processes of a disturbed run share: the switch of the store, and what replicas have generated."""

from __future__ import annotations

import json
from pathlib import Path

from b2batch.bench.flaky_store import StoreSwitch

HOLD_VARIABLE = "FAULT_HOLD"


def switch_in(scratch: Path) -> StoreSwitch:
    """The switch that all processes of a run obey."""
    return StoreSwitch(scratch / "store-fault")


def token_in(scratch: Path) -> Path:
    """Holds the pid of the replica whose commit is held."""
    return scratch / "held"


def release_in(scratch: Path) -> Path:
    """Once it is there, the held commit goes on."""
    return scratch / "released"


def ledger_in(scratch: Path, pid: int) -> Path:
    """Where a replica notes its rows and tokens."""
    return scratch / f"generated-{pid}"


def count_generated(scratch: Path) -> tuple[int, int]:
    """Rows and tokens that all replicas have generated so far; forgets them."""
    num_rows = num_tokens = 0
    for path in scratch.glob("generated-*"):
        text = path.read_text()
        path.unlink()
        rows, tokens = json.loads(text) if text else (0, 0)  # killed while it wrote
        num_rows, num_tokens = num_rows + rows, num_tokens + tokens
    return num_rows, num_tokens
