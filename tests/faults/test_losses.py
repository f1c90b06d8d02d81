"""What Ray says of a death, as the dispatcher is told it: rows are blamed only where they may be at fault."""

from __future__ import annotations

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import ActorDiedError, RayError

from b2batch.cluster.fleet import _loss_of
from b2batch.cluster.policy import Loss

MEMORY = "1 worker(s) were killed due to the node running low on memory. Memory on the node was 23 GB / 24 GB"
PREEMPTED = NodeDeathInfo(reason=NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED)


def death(**context: object) -> RayError:
    return ActorDiedError(ActorDiedErrorContext(actor_id=b"0" * 16, **context))


@pytest.mark.parametrize(
    ("error", "loss"),
    [
        (death(error_message=MEMORY), Loss.MEMORY),
        (death(error_message="its node has died"), Loss.NODE),
        (death(error_message="its node went", node_death_info=PREEMPTED), Loss.NODE),
        (death(error_message="worker died, exit code 139"), Loss.CRASH),
    ],
)
def test_what_ray_says_of_a_death_is_told_apart(error: RayError, loss: Loss) -> None:
    assert _loss_of(error) is loss
