"""Opening Ray: once, from a folder without Python files, and only if it is large enough."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray._private import worker

from cluster import session
from cluster.session import ensure_ray, worker_env
from configs.errors import MachineError
from configs.parallel import ClusterConfig

ROOT = Path(__file__).parents[2]


def test_a_cluster_that_is_too_small_is_refused_with_both_numbers(
    machines: ClusterConfig, tmp_path: Path
) -> None:
    before = Path.cwd()
    with pytest.raises(MachineError, match=r"ask for 2\.5 CPUs, the cluster has 2; lower"):
        ensure_ray(machines, str(tmp_path), cpus_needed=2.5)
    ensure_ray(machines, str(tmp_path), cpus_needed=2)
    assert Path.cwd() == before  # Ray was open already


def test_a_named_cluster_is_given_time_for_a_machine_that_joins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the place of one that is lost; a local one has nobody to wait for."""
    named = ClusterConfig(address="ray.example:6379", placement_timeout_seconds=60)
    cpus = [2.0, 2.0, 4.0]
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus.pop(0)})
    monkeypatch.setattr(session, "_require_equal_nodes", lambda *_: None)
    monkeypatch.setattr(session, "LOOK_SECONDS", 0.05)
    ensure_ray(named, str(tmp_path), cpus_needed=4)
    assert cpus == []
    cpus = [2.0] * 1000
    late = named.model_copy(update={"placement_timeout_seconds": 0.3})
    with pytest.raises(MachineError, match=r"ask for 4 CPUs, the cluster has 2; lower"):
        ensure_ray(late, str(tmp_path), cpus_needed=4)
    assert len(cpus) < 998  # Several looks.
    cpus = [2.0]
    with pytest.raises(MachineError, match=r"ask for 4 CPUs, the cluster has 2; lower"):
        ensure_ray(ClusterConfig(), str(tmp_path), cpus_needed=4)


@pytest.mark.parametrize("fault", [ConnectionError, RuntimeError, ValueError, Exception])
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
    monkeypatch.setattr(session, "require_listener", lambda address: None)
    with pytest.raises(
        MachineError, match=r"cluster\.address = 'ray\.example:6379'.*nobody home.*RAY_AUTH_TOKEN"
    ):
        ensure_ray(machines, str(home), cpus_needed=1)
    assert Path.cwd() == tmp_path
    with pytest.raises(MachineError, match=r"^no Ray can be started.*nobody home.*ingot doctor"):
        ensure_ray(ClusterConfig(), str(home), cpus_needed=1)
    # Told before anybody is called.
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("called"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere")
    with pytest.raises(MachineError, match=r"^RAY_AUTH_TOKEN_PATH = /nowhere is no file"):
        ensure_ray(machines, str(home), cpus_needed=1)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * 60)
    with pytest.raises(MachineError, match=r"^RAY_TMPDIR = /x+ has 61 bytes"):
        ensure_ray(ClusterConfig(), str(home), cpus_needed=1)


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
    assert asked["address"] == "local"


@pytest.mark.slow
def test_a_local_ray_is_our_own_wherever_the_environment_points(tmp_path: Path) -> None:
    """With the address of another, no home and a folder too long for sockets, all at once."""
    long = tmp_path / ("x" * 60)
    long.mkdir()
    script = (
        "import os, ray\n"
        "from cluster.session import ensure_ray\n"
        "from configs.parallel import ClusterConfig\n"
        f"ensure_ray(ClusterConfig(), {str(tmp_path)!r}, cpus_needed=2)\n"
        "assert len(os.environ['TMPDIR']) > 60\n"
        "print(ray.get(ray.remote(os.getenv).remote('TMPDIR'), timeout=60))\n"
    )
    surroundings = {"RAY_ADDRESS": "127.0.0.1:9", "HOME": "/proc/nowhere", "TMPDIR": str(long)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT), **surroundings},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.stdout == "/tmp\n", done.stderr
    assert list(long.iterdir()) == []


def test_workers_of_a_local_cluster_stay_on_loopback() -> None:
    local = worker_env(ClusterConfig(threads_per_worker=3))
    assert local["OMP_NUM_THREADS"] == local["MKL_NUM_THREADS"] == "3"
    assert local["GLOO_SOCKET_IFNAME"] == "lo"
    remote = worker_env(ClusterConfig(address="auto"))
    assert "GLOO_SOCKET_IFNAME" not in remote
    assert all(isinstance(value, str) for value in local.values())


def test_what_ray_says_of_a_lost_machine_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)
    session._shorten_messages()
    said = "The node with id: 1 has been marked dead. This can happen when a \t(1) raylet\n crashes"
    worker.print_to_stdstream({"lines": [said], "pid": "raylet", "is_err": False}, False)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "Ray: The node with id: 1 has been marked dead\n")
    # A later Ray may have no such function.
    monkeypatch.delattr(worker, "print_to_stdstream")
    session._shorten_messages()
    assert not hasattr(worker, "print_to_stdstream")


def test_tries_to_join_a_cluster_are_not_told_one_by_one(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(**_: object) -> None:
        os.write(2, b"Failed to get cluster ID\n")
        raise ConnectionError("refused")

    monkeypatch.setattr(session, "require_listener", lambda address: None)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ConnectionError):
        session._start(ClusterConfig(address="ray.example:6379"))
    os.write(2, b"what comes after\n")
    assert capfd.readouterr().err == "what comes after\n"
