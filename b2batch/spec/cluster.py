"""The ``cluster`` section of a job file: where replicas run, and how many."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from b2batch.spec.section import Location, Section


def _as_range(replicas: tuple[int, int]) -> tuple[int, int]:
    if replicas[0] > replicas[1]:
        raise ValueError(f"[min, max] has min {replicas[0]} above max {replicas[1]}")
    return replicas


def _as_custom(resources: dict[str, float]) -> dict[str, float]:
    """Refuse what has a key of its own, or is not a replica's to ask for."""
    own = {"CPU": "cluster.cpus_per_replica", "GPU": "cluster.gpus_per_replica"}
    for name in resources:
        if name in own:
            raise ValueError(f"{name} is said by {own[name]}")
        if name in ("memory", "object_store_memory", "") or name.startswith(("node:", "accelerator_type:")):
            raise ValueError(f"{name!r} is no custom resource")
    return resources


def _as_gpus(amount: float) -> float:
    if amount > 1 and not amount.is_integer():
        raise ValueError(f"a share is of one GPU, and more than one are whole, found {amount:g}")
    return amount


GpuShare = Annotated[float, Field(ge=0.0), AfterValidator(_as_gpus)]
_Count = Annotated[int, Field(ge=1)]
ReplicaRange = Annotated[tuple[_Count, _Count], AfterValidator(_as_range)]


class ClusterSpec(Section):
    """Where replicas run, how many, and on which nodes.

    ``replicas: auto`` is as many as the nodes carry, also those that join later. A number is asked for at
    once, and who finds no room starts as nodes join; ``[min, max]`` asks for ``max`` and begins with ``min``.
    """

    address: Location = Field(
        default="auto", description="auto: the running cluster or a local one; local; host:port; ray://…"
    )
    replicas: Literal["auto"] | Annotated[int, Field(ge=1)] | ReplicaRange = "auto"
    gpus_per_replica: Literal["auto"] | GpuShare = Field(
        default="auto", description="GPUs of one node; a model is spread over more than 1"
    )
    cpus_per_replica: Annotated[float, Field(gt=0.0)] = 1.0
    accelerator_type: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="only nodes with this accelerator, by Ray's name for it: A100, H200",
    )
    resources: Annotated[dict[str, Annotated[float, Field(gt=0.0)]], AfterValidator(_as_custom)] = Field(
        default={}, description="custom resource → how much of it a replica takes"
    )
    start_timeout_s: float = Field(
        default=600.0,
        gt=0.0,
        description="how long to wait for the first replicas, and for one of them to load",
    )
    step_timeout_s: float = Field(
        default=900.0, gt=0.0, description="a replica whose engine needs longer for a step is replaced"
    )
    drain_grace_s: float = Field(
        default=30.0, ge=0.0, description="after SIGTERM: how long leased units may go on"
    )

    @property
    def gpus_per_model(self) -> int:
        """Devices that the model of a replica is spread over."""
        return 1 if self.gpus_per_replica == "auto" else max(1, int(self.gpus_per_replica))

    @property
    def min_replicas(self) -> int:
        """So many are ready before a run begins."""
        return self.replicas[0] if isinstance(self.replicas, tuple) else 1

    @property
    def max_replicas(self) -> int | None:
        """So many are asked for; None: what the nodes carry."""
        if self.replicas == "auto":
            return None
        return self.replicas[1] if isinstance(self.replicas, tuple) else self.replicas
