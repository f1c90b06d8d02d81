"""A cluster of our own: started for a run, gone after it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

SCRIPT = """
import json, os, signal
from b2batch.cluster.placement import connect
from b2batch.errors import ClusterError
from b2batch.spec import ClusterSpec

def on_sigterm(*_): ...
signal.signal(signal.SIGTERM, on_sigterm)
told = {}
with connect(ClusterSpec()) as cluster:
    told["is_own"] = cluster.is_own
    told["replicas"] = cluster.place(ClusterSpec(), "cpu", 10**6, print).num_replicas
    told["sigterm_kept"] = signal.getsignal(signal.SIGTERM) is on_sigterm
    told["children"] = open(f"/proc/self/task/{os.getpid()}/children").read().split()
    with connect(ClusterSpec()) as same:
        told["second_is_own"] = same.is_own
    try:
        cluster.place(ClusterSpec(gpus_per_replica=64), "auto", 1, print)
    except ClusterError as error:
        told["shortage"] = str(error)
print(json.dumps(told))
"""


def test_a_run_without_a_cluster_gets_its_own_and_leaves_nothing_running(tmp_path):
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    env |= {"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(Path.cwd())}
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=120, check=True
    )
    told = json.loads(ended.stdout.splitlines()[-1])
    assert (told["is_own"], told["second_is_own"], told["sigterm_kept"]) == (True, False, True)
    assert told["replicas"] >= 1
    assert told["shortage"].startswith("a replica needs 64 GPUs")
    assert told["children"]
    assert not [pid for pid in told["children"] if Path(f"/proc/{pid}").exists()]
