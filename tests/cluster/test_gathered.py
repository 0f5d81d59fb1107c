"""What workers print elsewhere comes to the driver's folder, each byte once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster import gathered as gathered_module
from cluster.gathered import _PART_BYTES, _Gatherer, _Reader, bring_up_to_date, gathered
from cluster.mirror import Mirror
from cluster.output import Output
from cluster.supply import Supply
from configs.parallel import ClusterConfig
from tests.supplies import local

OWN, N1, N2 = (digit * 56 for digit in "123")


def elsewhere(folder: Path) -> Supply:
    """That of a process which does not see the driver's file."""
    return Supply(Mirror("s3://bucket/store", folder), folder / "sign", is_spread=True)


@pytest.fixture
def output(tmp_path: Path) -> Output:
    (tmp_path / "there").mkdir()
    return Output(str(tmp_path / "there"), "trainer")


def test_a_reader_tells_what_was_appended_of_its_own_role(output: Output) -> None:
    reader = _Reader(output, elsewhere(Path(output.folder)))
    assert reader.news({}) == {}
    output.path(1).write_bytes(b"one\n")
    Path(output.folder, "sampler-0.log").write_bytes(b"another's\n")
    assert reader.news({}) == {1: (4, b"one\n")}
    assert reader.news({1: 4}) == {}
    with output.path(1).open("ab") as file:
        file.write(b"two\n")
    assert reader.news({1: 4}) == {1: (8, b"two\n")}
    # A machine whose disk is a new one.
    output.path(1).write_bytes(b"new\n")
    assert reader.news({1: 8}) == {1: (4, b"new\n")}
    output.path(1).write_bytes(b"x" * (_PART_BYTES + 1))
    assert len(reader.news({})[1][1]) == _PART_BYTES


def test_what_the_driver_sees_by_itself_is_not_told(output: Output) -> None:
    output.path(1).write_bytes(b"one\n")
    sign = Path(output.folder, "sign")
    sign.touch()
    assert _Reader(output, elsewhere(sign.parent)).news({}) == {}


class Readers:
    """Actors on machines of a cluster, in the place of Ray's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive = {OWN: "10.0.0.1", N1: "10.0.0.2"}
        self.made: list[str] = []
        self.killed: list[Any] = []
        self.known: list[dict[int, int]] = []
        self.printed, self.most = b"one\ntwo\n", 100
        patch = monkeypatch.setattr
        patch(ray, "is_initialized", lambda: True)
        patch(ray, "nodes", self.nodes)
        patch(ray, "get_runtime_context", lambda: self)
        patch(ray, "remote", lambda _: self)
        patch(ray, "get", lambda ref, timeout: ref)
        patch(ray, "kill", lambda actor, no_restart: self.killed.append(actor))
        patch(gathered_module, "LOOK_SECONDS", 3600.0)

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"NodeID": node, "NodeManagerAddress": address, "Alive": True}
            for node, address in self.alive.items()
        ]

    def get_node_id(self) -> str:
        return OWN

    def options(self, *, num_cpus: int, scheduling_strategy: Any) -> "Readers":
        assert num_cpus == 0
        self.made.append(scheduling_strategy.node_id)
        return self

    def remote(self, *arguments: Any) -> Any:
        if len(arguments) == 2:
            return self
        (known,) = arguments
        self.known.append(dict(known))
        begin = known.get(0, 0)
        part = self.printed[begin : begin + self.most]
        return {0: (begin + len(part), part)} if part else {}

    @property
    def news(self) -> "Readers":
        return self


def test_each_byte_is_kept_once_also_when_ray_is_started_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers, output = Readers(monkeypatch), Output(str(tmp_path / "logs"), "trainer")
    with gathered(output, elsewhere(tmp_path)):
        bring_up_to_date(output)
        assert output.path(0).read_bytes() == b"one\ntwo\n"
        readers.alive = {OWN: "10.0.0.1", N2: "10.0.0.2"}
        readers.printed += b"three\n"
        bring_up_to_date(output)
        assert output.path(0).read_bytes() == b"one\ntwo\nthree\n"
        readers.printed += b"last words\n"
    assert output.path(0).read_bytes().endswith(b"three\nlast words\n")
    assert readers.made == [N1, N2]
    assert len(readers.killed) == 1
    # Nobody asks any more.
    bring_up_to_date(output)
    assert len(readers.known) == 3


def test_where_all_workers_are_on_one_machine_nobody_is_asked(
    machines: ClusterConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathered_module, "_Gatherer", None)
    with gathered(Output(str(tmp_path), "trainer"), local(tmp_path)):
        pass
    spread = replace(local(tmp_path), is_spread=True)
    with pytest.raises(TypeError), gathered(Output(str(tmp_path), "trainer"), spread):
        pass
    assert _Gatherer is not None


def test_what_is_there_is_kept_when_a_group_is_started_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers, output = Readers(monkeypatch), Output(str(tmp_path / "logs"), "trainer")
    for more in (b"", b"three\n"):
        readers.printed += more
        with gathered(output, elsewhere(tmp_path)):
            bring_up_to_date(output)
    assert output.path(0).read_bytes() == b"one\ntwo\nthree\n"


def test_all_that_a_worker_said_at_its_end_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathered_module, "_PART_BYTES", 4)
    readers, output = Readers(monkeypatch), Output(str(tmp_path / "logs"), "trainer")
    readers.most = 4
    with gathered(output, elsewhere(tmp_path)):
        readers.printed = b"0123456789"
    assert output.path(0).read_bytes() == b"0123456789"


def test_a_fault_of_who_tells_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Readers(monkeypatch)

    def refuse() -> None:
        raise RuntimeError("no nodes")

    monkeypatch.setattr(ray, "nodes", refuse)
    output = Output(str(tmp_path / "logs"), "trainer")
    with pytest.raises(KeyError, match="ours"), gathered(output, elsewhere(tmp_path)):
        raise KeyError("ours")
