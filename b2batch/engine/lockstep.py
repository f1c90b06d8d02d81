"""One engine in several processes, each with a part of the model: rank 0 is asked, the others repeat.

The engine is deterministic: the same requests in the same order make the same steps, and every rank
has the same logits. So the ranks exchange what rank 0 was asked, once a step, and the layers their
sums; nothing else. A process that dies closes its connections, which ends the others.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from b2batch.engine.engine import Engine
from b2batch.engine.request import AnyRequest, Finished
from b2batch.errors import ClusterError

_NEVER = timedelta(days=365)  # a replica may wait for work as long as it likes
Value = TypeVar("Value")


def start_followers(num_ranks: int, follow: Callable[..., None], *arguments: Any) -> None:
    """Start ranks 1 … n-1 as processes that run ``follow(rank, num_ranks, store, *arguments)``; join as 0."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="b2batch-ranks-") as directory:
        store = Path(directory, "store")
        for rank in range(1, num_ranks):
            context.Process(target=follow, args=(rank, num_ranks, store, *arguments), daemon=True).start()
        join(0, num_ranks, store)


def join(rank: int, num_ranks: int, store: Path) -> None:
    """Become a rank of the group that meets at the file ``store``, which nobody needs once all are there."""
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks, timeout=_NEVER
    )
    dist.barrier()


def agree(value: Value) -> Value:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class LeadingEngine(Engine):
    """The engine of rank 0."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._asked: list[tuple[str, tuple[Any, ...]]] = []

    def add(self, request: AnyRequest) -> None:
        """See ``Engine``; a refused request is not repeated."""
        super().add(request)
        self._asked.append(("add", (request,)))

    def cancel(self, request_id: str) -> None:
        """See ``Engine``."""
        super().cancel(request_id)
        self._asked.append(("cancel", (request_id,)))

    def shrink(self) -> str | None:
        """Another rank may have room, and go on: the replica ends, and a new one takes its rows."""
        raise ClusterError(
            "a process of a split replica ran out of memory; lower engine.max_num_batched_tokens"
        )

    def step(self) -> list[Finished]:
        """See ``Engine``; the other ranks run the same step."""
        if not self.has_work:
            return super().step()
        agree([*self._asked, ("step", ())])
        self._asked.clear()
        return super().step()


def repeat_forever(engine: Engine) -> None:
    """What a rank other than 0 does; ends when rank 0 does, by the connection that breaks."""
    while True:
        asked: list[tuple[str, tuple[Any, ...]]] = agree([])
        for name, arguments in asked:
            getattr(engine, name)(*arguments)
