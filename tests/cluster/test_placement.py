import pytest

from b2batch.cluster.placement import Node, Placement, connect, plan_replicas, wait_for_placement
from b2batch.errors import ClusterError
from b2batch.spec import ClusterSpec

CPU_NODE, GPU_NODE = Node(num_cpus=8, num_gpus=0), Node(num_cpus=64, num_gpus=8)
MANY = 10**6


@pytest.mark.parametrize(
    ("nodes", "spec", "device", "expected"),
    [
        ([CPU_NODE], {}, "auto", (8, 1.0, 0.0)),
        ([CPU_NODE], {"cpus_per_replica": 3}, "auto", (2, 3.0, 0.0)),
        ([CPU_NODE, GPU_NODE], {}, "auto", (8, 1.0, 1.0)),
        ([CPU_NODE, GPU_NODE], {}, "cpu", (72, 1.0, 0.0)),
        ([GPU_NODE] * 2, {"gpus_per_replica": 0.25}, "auto", (64, 1.0, 0.25)),
        ([GPU_NODE], {"gpus_per_replica": 0.4}, "auto", (16, 1.0, 0.4)),
        ([GPU_NODE], {"gpus_per_replica": 2, "cpus_per_replica": 32}, "auto", (2, 32.0, 2.0)),
        ([CPU_NODE], {"replicas": 20}, "auto", (20, 1.0, 0.0)),
        ([CPU_NODE], {"gpus_per_replica": 0}, "cuda", (8, 1.0, 0.0)),
        ([CPU_NODE], {"replicas": (2, 20)}, "auto", (20, 1.0, 0.0)),
        ([CPU_NODE], {}, "cuda", (0, 1.0, 1.0)),
        ([GPU_NODE] * 9, {"gpus_per_replica": 9}, "auto", (0, 1.0, 9.0)),
        ([], {}, "auto", (0, 1.0, 0.0)),
    ],
)
def test_how_many_replicas_of_which_size(nodes, spec, device, expected):
    placement = plan_replicas(nodes, ClusterSpec(**spec), device, MANY)
    assert (placement.num_replicas, placement.num_cpus, placement.num_gpus) == expected


H200_NODE = Node(64, 8, {"accelerator_type:H200": 1.0, "license": 4.0})
OLD_NODE = Node(64, 8, {"accelerator_type:V100": 1.0})


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"accelerator_type": "H200"}, 8),
        ({"accelerator_type": "V100", "gpus_per_replica": 0.5}, 16),
        ({"resources": {"license": 1}}, 4),
        ({"resources": {"license": 0.5}}, 8),
        ({"resources": {"license": 5}}, 0),
        ({"accelerator_type": "V100", "resources": {"license": 1}}, 0),
    ],
)
def test_only_nodes_with_what_is_asked_for_carry_replicas(spec, expected):
    assert plan_replicas([H200_NODE, OLD_NODE], ClusterSpec(**spec), "auto", MANY).num_replicas == expected


def test_what_a_replica_takes_by_rays_names():
    spec = ClusterSpec(accelerator_type="H200", resources={"license": 2})
    placement = plan_replicas([H200_NODE], spec, "auto", MANY)
    assert placement.bundle == {"CPU": 1.0, "GPU": 1.0, "license": 2.0, "accelerator_type:H200": 0.001}


def test_a_node_that_joins_makes_room():
    placement = plan_replicas([CPU_NODE], ClusterSpec(), "auto", MANY)
    assert [placement.room(nodes) for nodes in ([], [CPU_NODE], [CPU_NODE, GPU_NODE])] == [0, 8, 72]


@pytest.mark.parametrize("replicas", ["auto", 20])
def test_never_more_replicas_than_units(replicas):
    assert plan_replicas([CPU_NODE], ClusterSpec(replicas=replicas), "auto", 3).num_replicas == 3


@pytest.mark.parametrize(("num_cpus", "threads"), [(0.5, "1"), (1.0, "1"), (4.0, "4")])
def test_a_replica_computes_on_as_many_threads_as_it_has_cpus(num_cpus, threads):
    assert Placement(1, num_cpus, 0.0).env_vars["OMP_NUM_THREADS"] == threads


class Waiting:
    """A clock that only sleeping moves, and a cluster that grows at a given time."""

    def __init__(self, joins_at_s, node):
        self.now_s, self.joins_at_s, self.node = 0.0, joins_at_s, node

    def nodes(self):
        return [CPU_NODE] + ([self.node] if self.now_s >= self.joins_at_s else [])

    def sleep(self, seconds):
        self.now_s += seconds

    def place(self, timeout_s, **spec):
        spec = ClusterSpec(gpus_per_replica=4, **spec)
        return wait_for_placement(self.nodes, spec, "auto", MANY, timeout_s, lambda: self.now_s, self.sleep)


def test_a_node_that_joins_in_time_is_waited_for():
    assert Waiting(joins_at_s=5.0, node=GPU_NODE).place(timeout_s=10.0).num_replicas == 2


def test_a_request_that_never_fits_says_what_is_missing():
    waiting = Waiting(joins_at_s=0.0, node=Node(num_cpus=8, num_gpus=2))
    with pytest.raises(ClusterError, match="needs 4 GPUs and 1 CPUs, and the largest node has 2 GPUs and 8"):
        waiting.place(timeout_s=10.0)
    assert waiting.now_s == 10.0


def test_a_request_for_other_nodes_says_what_they_lack():
    waiting = Waiting(joins_at_s=0.0, node=OLD_NODE)
    with pytest.raises(ClusterError) as raised:
        waiting.place(timeout_s=0.0, accelerator_type="H200", resources={"license": 1})
    assert str(raised.value) == (
        "a replica needs 4 GPUs, 1 CPUs, 1 license and accelerator H200, and the node that comes closest "
        "has 8 GPUs, 64 CPUs, 0 license and no accelerator H200"
    )


def test_an_address_where_nobody_listens_is_told_at_once():
    with (
        pytest.raises(ClusterError, match=r"cluster\.address 127\.0\.0\.1:1"),
        connect(ClusterSpec(address="127.0.0.1:1")),
    ):
        pass


def test_nodes_are_avoided_where_others_can_carry_the_replica():
    head, bad, good = Node(0.0, 0.0), Node(4.0, 0.0), Node(4.0, 0.0)
    replica = Placement(2, 1.0, 0.0)
    assert replica.avoidable(frozenset({"bad"}), {"bad": bad, "good": good}) == {"bad"}
    assert replica.avoidable(frozenset({"bad"}), {"bad": bad, "head": head}) == frozenset(), (
        "better than none"
    )
