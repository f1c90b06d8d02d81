from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The reference data that stands beside the checkout; without it the test is skipped."""
    path = Path(__file__).parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("the reference data is not there")
    return path


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One small Ray cluster for all tests: 4 CPUs and 2 GPUs, all of them merely numbers."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_DEDUP_LOGS", "0")
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # Ray writes a token there
        patch.setenv(
            "PYTHONPATH", str(Path(__file__).parent / "cluster")
        )  # the replicas unpickle fake_worker
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(
            address="local",
            num_cpus=4,
            num_gpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=80 << 20,
        )
        yield
        ray.shutdown()
