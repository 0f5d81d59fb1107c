"""Opening Ray: once, from a folder without Python files, and only if it is large enough."""

import os
from pathlib import Path

import pytest
import ray

from cluster.session import ensure_ray, worker_env
from configs.errors import MachineError
from configs.parallel import ClusterConfig


def test_a_cluster_that_is_too_small_is_refused_with_both_numbers(
    machines: ClusterConfig, tmp_path: Path
) -> None:
    before = Path.cwd()
    with pytest.raises(MachineError, match=r"ask for 2\.5 CPUs, the cluster has 2; lower"):
        ensure_ray(machines, str(tmp_path), cpus_needed=2.5)
    ensure_ray(machines, str(tmp_path), cpus_needed=2)
    assert Path.cwd() == before  # Ray was open already


@pytest.mark.parametrize("fault", [ConnectionError, RuntimeError, ValueError])
def test_a_ray_that_cannot_be_opened_names_its_address(
    fault: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(**_: object) -> None:
        assert Path.cwd() == home
        raise fault("nobody home")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    home = tmp_path / "home"
    home.mkdir()
    machines = ClusterConfig(address="ray.example:6379")
    with pytest.raises(MachineError, match=r"cluster\.address = 'ray\.example:6379'.*nobody home"):
        ensure_ray(machines, str(home), cpus_needed=1)
    assert Path.cwd() == tmp_path


def test_a_local_ray_has_two_cpus_at_least_and_listens_on_loopback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, object] = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: asked.update(settings))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    ensure_ray(ClusterConfig(), str(tmp_path), cpus_needed=2)
    assert asked["num_cpus"] == 2
    assert asked["dashboard_host"] == "127.0.0.1"
    assert "address" not in asked


def test_workers_of_a_local_cluster_stay_on_loopback() -> None:
    local = worker_env(ClusterConfig(threads_per_worker=3))
    assert local["OMP_NUM_THREADS"] == local["MKL_NUM_THREADS"] == "3"
    assert local["GLOO_SOCKET_IFNAME"] == "lo"
    remote = worker_env(ClusterConfig(address="auto"))
    assert "GLOO_SOCKET_IFNAME" not in remote
    assert all(isinstance(value, str) for value in local.values())
