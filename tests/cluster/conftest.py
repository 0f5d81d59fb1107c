"""One small Ray for all tests of the cluster."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from cluster.mirror import Mirror
from configs.parallel import ClusterConfig
from tests.objects import Objects, serving

CPUS = 2
DEVICES = 2


@pytest.fixture(scope="module")
def objects() -> Iterator[Objects]:
    """An S3 server on this machine, for the tests of one file."""
    with serving() as objects:
        yield objects


@pytest.fixture
def apart(objects: Objects, tmp_path: Path) -> Mirror:
    """A store of objects of this test's own, with its copies in a folder of the test's."""
    return Mirror(f"{objects.url}/{tmp_path.name}", tmp_path / "root")


@pytest.fixture(scope="session")
def machines() -> Iterator[ClusterConfig]:
    """A running Ray with two CPUs and two devices of each kind, and a config for small pools."""
    if not ray.is_initialized():
        # As `cluster/session.py` does: Ray would run workers behind everything else.
        os.environ.setdefault("RAY_worker_niceness", "0")
        ray.init(
            address="local",  # never one that runs here already
            num_cpus=CPUS,
            # Declared and not there: Ray places by what it is told.
            num_gpus=DEVICES,
            resources={"NPU": DEVICES},
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=100 * 1024**2,
        )
    yield ClusterConfig(
        trainers=2,
        samplers=2,
        cpus_per_worker=0.5,
        placement_timeout_seconds=120,
        step_timeout_seconds=120,
    )
    ray.shutdown()
