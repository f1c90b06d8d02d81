from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:  # torch is for the tests that ask for these fixtures
    from golden import Golden

    from b2batch.models.loading import LoadedModel

POISON = "☠ this row ends the process ☠"  # on ray_cluster

if not Path("/dev/nvidiactl").exists():  # without a GPU its kernels run in Triton's interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

# No deadline: a busy machine is slow without fault. A failure that CI saw can be made again from its log.
settings.register_profile("suite", deadline=None, print_blob=True)
settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take long first, so that no worker is left alone with one of them at the end.

    Of these the ones with many tests: while a worker has two tests left, it is given its next file.
    """
    num_slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -num_slow[item.path])


@pytest.fixture(autouse=True)
def _log_put_back() -> Iterator[None]:
    """A verb that is called in this process sends the log to stderr, where the next test's caplog is not."""
    logger = logging.getLogger("b2batch")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The reference data that stands beside the checkout; without it the test is skipped."""
    path = Path(__file__).parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("the reference data is not there")
    return path


@pytest.fixture(scope="session")
def golden(shared_dir: Path) -> Callable[[str], Golden]:
    """The reference data of a variant."""
    from golden import Golden

    return cache(lambda variant: Golden.read(shared_dir, variant))


@pytest.fixture(scope="session")
def plain(golden: Callable[[str], Golden]) -> Callable[[str], LoadedModel]:
    """A variant's checkpoint for plain forward passes, loaded once a session.

    Not to be given to an engine, which changes its model's attention.
    """
    return cache(lambda variant: golden(variant).load())


@pytest.fixture(scope="session")
def poison() -> str:
    """Text that takes down every replica on ``ray_cluster`` that has a row with it in its engine."""
    return POISON


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
        patch.setenv("B2BATCH_POISON", POISON)
        patch.delenv("RAY_ADDRESS", raising=False)
        # A run needs no network, and what the environment holds must show up nowhere.
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
        patch.setenv("B2_TEST_SECRET", str(tmp_path_factory.mktemp("canary")))
        patch.setenv("HF_TOKEN", "hf_canary")
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
