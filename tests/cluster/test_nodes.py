"""Machines of a cluster that run something else are found before the first stage."""

from typing import Any

import pytest
import ray

from cluster import nodes, session
from cluster.nodes import require_equal_nodes, versions
from cluster.session import ray_for
from configs.errors import MachineError
from configs.parallel import ClusterConfig


def test_a_cluster_that_runs_what_the_driver_runs_is_taken(
    machines: ClusterConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with ray_for(machines, str(tmp_path_factory.mktemp("home")), workers=1):
        require_equal_nodes("here:1", timeout_seconds=60)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torch", r"cluster.address = 'here:1': \S+ \(\w{8}\) has torch 2\.\S+, and the driver 0"),
        ("ingot", r"has other files of ingot; install the same on every machine"),
    ],
)
def test_a_machine_that_runs_something_else_is_named(
    machines: ClusterConfig,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    message: str,
) -> None:
    other = {**versions(), name: "0"}
    real = nodes._compare

    def compare(address: str, node: str, theirs: Any, own: Any) -> None:
        real(address, node, theirs, other)

    monkeypatch.setattr(nodes, "_compare", compare)
    with (
        ray_for(machines, str(tmp_path_factory.mktemp("home")), workers=1),
        pytest.raises(MachineError, match=message),
    ):
        require_equal_nodes("here:1", timeout_seconds=60)


def test_a_machine_that_does_not_answer_is_named(
    machines: ClusterConfig,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with ray_for(machines, str(tmp_path_factory.mktemp("home")), workers=1):
        monkeypatch.setattr(ray, "wait", lambda refs, **_: ([], refs))
        with pytest.raises(MachineError, match="did not say within 1 s what it runs"):
            require_equal_nodes("here:1", timeout_seconds=1)


def test_machines_are_asked_once_and_those_that_join_later_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[set[str]] = []
    joined = [{"a"}, {"a", "b"}]

    def require(address: str, *, timeout_seconds: float, known: set[str]) -> set[str]:
        asked.append(set(known))
        return joined[len(asked) - 1]

    monkeypatch.setattr(session, "_equal", set())
    monkeypatch.setattr(session, "require_equal_nodes", require)
    for _ in joined:
        session._require_equal_nodes("here:1", 1.0)
    assert asked == [set(), {"a"}]
    assert session._equal == {"a", "b"}


def test_a_machine_that_is_gone_before_it_answers_is_passed_over(
    machines: ClusterConfig,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with ray_for(machines, str(tmp_path_factory.mktemp("home")), workers=1):
        gone = {"NodeID": "0" * 56, "NodeManagerAddress": "10.0.0.9", "Alive": True}
        here = ray.nodes()
        monkeypatch.setattr(ray, "nodes", lambda: [*here, gone])
        found = require_equal_nodes("here:1", timeout_seconds=60)
        assert found == {node["NodeID"] for node in here if node["Alive"]}
        # Whoever is known is not asked again.
        monkeypatch.setattr(ray, "wait", lambda refs, **_: ([], refs))
        assert require_equal_nodes("here:1", timeout_seconds=1, known=[*found, "0" * 56])


def test_files_of_the_code_are_told_apart_by_their_content() -> None:
    assert versions() == versions()
    assert len(versions()["ingot"]) == 16
