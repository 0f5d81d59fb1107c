"""One small Ray for all tests of the cluster."""

import logging
import os
from collections.abc import Iterator

import pytest
import ray

from configs.parallel import ClusterConfig

CPUS = 2
DEVICES = 2


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
