"""How a worker comes to be in its replica: what the driver sends it, and what only a replica imports."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING

from b2batch.models.checkpoint import Checkpoint
from b2batch.spec import JobSpec
from b2batch.worker_args import WorkerArgs

if TYPE_CHECKING:
    from b2batch.worker import Worker


def start_worker(args: WorkerArgs) -> Worker:
    """A worker in this process, with its model loaded.

    Raises:
        CallerError: the checkpoint or the spec cannot be used here.
    """
    # It brings torch and transformers: seconds and 500 MB, which a driver is spared. Nothing that an
    # import makes is garbage, and to look through it all again and again takes a sixth of those seconds.
    gc.disable()
    try:
        from b2batch.engine_start import start_engine
        from b2batch.worker import Worker
    finally:
        gc.enable()
    return Worker(args, *start_engine(args.spec))


def with_fixed_model(spec: JobSpec, checkpoint: Checkpoint) -> JobSpec:
    """The model that was planned with, wherever and whenever a replica loads it.

    A relative path of a model or an adapter means the driver's directory, not a replica's; a branch of
    a hub's model means the commit that it had when the job began, also on a node that joins later.
    """
    names = {"model": spec.model.model, "adapter": spec.model.adapter}
    paths = {key: Path(name).expanduser() for key, name in names.items() if name is not None}
    fixed = {key: str(path.absolute()) for key, path in paths.items() if path.is_dir()}
    if checkpoint.commit is not None:
        fixed["revision"] = checkpoint.commit
    return spec.model_copy(update={"model": spec.model.model_copy(update=fixed)})
