"""What the dispatcher asks for: values that the driver carries out, one by one."""

from __future__ import annotations

from dataclasses import dataclass

from b2batch.errors import B2BatchError
from b2batch.rows import Caution


@dataclass(frozen=True, slots=True)
class Lease:
    """Let this replica compute this unit; with ``caution`` piece by piece.

    ``trusts_nan``: rows without finite logits are their own fault now, not the replica's.
    """

    replica_id: int
    unit_index: int
    attempt: int
    caution: Caution | None = None
    trusts_nan: bool = False


@dataclass(frozen=True, slots=True)
class Cancel:
    """The unit is committed by another: this replica need not go on with its attempt."""

    replica_id: int
    unit_index: int
    attempt: int


@dataclass(frozen=True, slots=True)
class StartReplica:
    """Start a replica under this new id, not on ``avoided`` nodes if there are others."""

    replica_id: int
    avoided: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class KillReplica:
    """End this replica now; it is already written off, so nothing needs to be told."""

    replica_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class CheckCommitted:
    """Ask the store whether the unit's part is there, then call ``on_unit_checked``."""

    unit_index: int


@dataclass(frozen=True, slots=True)
class Finish:
    """Every unit is committed."""


@dataclass(frozen=True, slots=True)
class Fail:
    """The run cannot go on."""

    error: B2BatchError


Action = Lease | Cancel | StartReplica | KillReplica | CheckCommitted | Finish | Fail
