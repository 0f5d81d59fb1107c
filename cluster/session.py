"""Opens Ray for this process, once, and knows how its workers must be set up."""

import logging
import os
from pathlib import Path

import ray

from configs.errors import MachineError
from configs.parallel import ClusterConfig

_OBJECT_STORE_BYTES = 512 * 1024**2
_LOCAL = "127.0.0.1"


def worker_env(machines: ClusterConfig) -> dict[str, str]:
    """Environment of every worker process.

    One arena that is never given back spares the allocator a page fault for each temporary:
    measured 2 to 3 times on the quantiser. A local cluster keeps its collectives on loopback.
    """
    threads = str(machines.threads_per_worker)
    env = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(16 * 1024**3),
        "MALLOC_TOP_PAD_": str(64 * 1024**2),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if machines.address is None:
        env |= {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": _LOCAL}
    return env


def ensure_ray(machines: ClusterConfig, home: str, *, cpus_needed: float) -> None:
    """Connect to the cluster, or start a local one; MachineError if it is too small.

    The process moves meanwhile to `home`, a folder without Python files: Ray puts the driver's
    working directory on its workers' import path, where a user's own `model.py` would hide ours.
    Ray stays open until the process ends, for the stages that follow.
    """
    if not ray.is_initialized():
        here = Path.cwd()
        os.chdir(Path(home))
        for name in ("ray", "ray.data", "ray.train", "ray._private.authentication"):
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            _start(machines)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise MachineError(
                f"cluster.address = {machines.address!r}: Ray cannot be reached or started: {error}"
            ) from error
        finally:
            os.chdir(here)
    available = float(ray.cluster_resources().get("CPU", 0))
    if available < cpus_needed:
        raise MachineError(
            f"the workers ask for {cpus_needed:g} CPUs, the cluster has {available:g}; lower "
            "cluster.trainers, cluster.samplers or cluster.cpus_per_worker, or name a larger "
            "cluster in cluster.address"
        )


def _start(machines: ClusterConfig) -> None:
    if machines.address is not None:
        ray.init(address=machines.address, log_to_driver=False, logging_level=logging.ERROR)
        return
    # Ray would run workers at niceness 15, behind everything else on a machine that may be shared.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        num_cpus=max(2, os.cpu_count() or 1),
        include_dashboard=True,
        dashboard_host=_LOCAL,
        _node_ip_address=_LOCAL,  # without it Ray listens on the machine's own address
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=_OBJECT_STORE_BYTES,
    )
