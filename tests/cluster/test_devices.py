"""Workers on devices that Ray was told of: which they see, what they share, and what is short."""

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from cluster import session, workers
from cluster.backend import CPU, CUDA, NPU, Backend
from cluster.device_errors import device_lost, out_of_memory
from cluster.feeding import batches
from cluster.fit import fit
from cluster.groups import require_equal_cards
from cluster.output import Output
from cluster.places import Places, deadlines, share_out, timeout_env
from cluster.pool import TrainerPool
from cluster.save_state import SaveState
from cluster.session import ray_for, worker_env
from cluster.supply import Supply
from cluster.trainer import build_trainer
from cluster.workers import Worker, WorkerDied, gather, open_workers
from configs.errors import MachineError
from configs.parallel import ClusterConfig
from configs.train import BalanceConfig
from tests.cluster.jobs import OPTIM, NextToken, job
from tests.cluster.standins import found, stand_in
from tests.ranks import on_ranks
from tests.references import TINY
from tests.supplies import local

LISTS = ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")
ROOT = Path(__file__).parents[2]


class Seer(Worker):
    """An actor that says which devices it sees."""

    def sees(self) -> list[str | None]:
        """The lists of either kind."""
        return [os.environ.get(name) for name in LISTS]

    def fail(self, kind: str, words: str) -> None:
        """Raise what torch does."""
        raise getattr(torch, kind)(words)


def seers(
    machines: ClusterConfig, folder: Path, backend: Backend, share: float, count: int = 2
) -> AbstractContextManager[list[Any]]:
    output = Output(str(folder / "logs"), "seer")
    supply: Supply = local(folder)
    return open_workers(
        Seer,
        machines,
        count,
        output=output,
        supply=supply,
        arguments=(),
        backend=backend,
        share=share,
    )


def seen_by(actors: list[Any], folder: Path) -> list[list[str | None]]:
    output = Output(str(folder / "logs"), "seer")
    return gather([one.sees.remote() for one in actors], output, timeout_seconds=60)


@pytest.mark.parametrize(("backend", "own"), [(CUDA, 0), (NPU, 1)])
def test_each_worker_sees_a_device_of_its_own_and_none_of_another_kind(
    machines: ClusterConfig, tmp_path: Path, backend: Backend, own: int
) -> None:
    with seers(machines, tmp_path, backend, 1.0) as actors:
        lists = seen_by(actors, tmp_path)
    assert {one[own] for one in lists} == {"0", "1"}
    assert {one[1 - own] for one in lists} == {""}


def test_workers_that_ask_for_cpus_see_no_device(machines: ClusterConfig, tmp_path: Path) -> None:
    with seers(machines, tmp_path, CPU, 0.0) as actors:
        assert seen_by(actors, tmp_path) == [["", ""], ["", ""]]


@pytest.mark.slow
def test_a_trainer_and_a_sampler_share_a_device_and_two_trainers_do_not(
    machines: ClusterConfig, tmp_path: Path
) -> None:
    places = share_out(CUDA, 2, trainers=2, samplers=2)
    with (
        seers(machines, tmp_path, CUDA, places.trainer) as trainers,
        seers(machines, tmp_path, CUDA, places.sampler) as samplers,
    ):
        first, second = seen_by(trainers, tmp_path), seen_by(samplers, tmp_path)
    assert {one[0] for one in first} == {one[0] for one in second} == {"0", "1"}


def test_a_shortage_of_devices_is_named(machines: ClusterConfig, tmp_path: Path) -> None:
    hasty = machines.model_copy(update={"placement_timeout_seconds": 2})
    with (
        pytest.raises(MachineError, match=r"3 seers ask for 3 GPUs and 2 were free after 2 s"),
        seers(hasty, tmp_path, CUDA, 1.0, count=3),
    ):
        pass


@pytest.mark.parametrize(
    ("devices", "trainers", "samplers", "expected"),
    [
        (4, 2, 2, (1.0, 1.0)),
        (2, 2, 0, (1.0, 1.0)),
        (2, 2, 2, (0.6, 0.4)),
        (1, 1, 2, (0.6, 0.2)),
        (3, 2, 4, (0.6, 0.2)),
        (1, 0, 3, (0.0, 0.3333)),
        (2, 0, 2, (1.0, 1.0)),
    ],
)
def test_devices_are_shared_by_counting_them(
    devices: int, trainers: int, samplers: int, expected: tuple[float, float]
) -> None:
    places = share_out(CUDA, devices, trainers=trainers, samplers=samplers)
    assert (places.trainer, places.sampler) == pytest.approx(expected, abs=1e-9)
    # However Ray puts them, all find room: a device with a trainer holds so many samplers.
    beside = math.floor((1 - places.trainer) / places.sampler + 1e-9) if samplers else 0
    alone = math.floor(1 / places.sampler + 1e-9) if samplers else 0
    assert trainers * beside + (devices - trainers) * alone >= samplers
    assert not trainers or 2 * places.trainer > 1
    assert share_out(CPU, 0, trainers=trainers, samplers=samplers) == Places(CPU)


def test_more_trainers_than_devices_are_refused_with_both_numbers(
    machines: ClusterConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "seen", lambda: {"GPU": 2.0})
    with (
        pytest.raises(MachineError, match=r"trainers = 3, each on a GPU .* 2 are there; set it to"),
        ray_for(machines, str(tmp_path), workers=3, trainers=3),
    ):
        pass
    with ray_for(machines, str(tmp_path), workers=4, trainers=2) as places:
        assert places == Places(CUDA, 0.6, 0.4)
        # What is opened within is part of it.
        with ray_for(machines, str(tmp_path), workers=2) as inner:
            assert inner == places


def test_what_knows_most_of_a_late_collective_speaks_first() -> None:
    for seconds in (5.0, 90.0, 600.0, 3600.0):
        machines = ClusterConfig(step_timeout_seconds=seconds)
        for backend in (CPU, CUDA, NPU):
            limits = deadlines(backend, machines)
            assert 0 < limits.execute < limits.group <= limits.step == seconds
            assert (limits.group < limits.step) == (not backend.is_host)
    machines = ClusterConfig(step_timeout_seconds=600, startup_timeout_seconds=30)
    # In the library's own multiples, and within what it takes.
    assert timeout_env(NPU, machines) == {
        "HCCL_EXEC_TIMEOUT": str(7 * 68),
        "HCCL_CONNECT_TIMEOUT": "120",
    }
    assert timeout_env(CUDA, machines) == timeout_env(CPU, machines) == {}


def test_workers_are_told_their_networks_and_how_results_repeat() -> None:
    local_env = worker_env(ClusterConfig(), CUDA)
    assert local_env["NCCL_SOCKET_IFNAME"] == local_env["GLOO_SOCKET_IFNAME"] == "lo"
    assert local_env["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert "CUDA_VISIBLE_DEVICES" not in local_env
    remote_env = worker_env(ClusterConfig(address="auto"), NPU)
    assert remote_env["HCCL_DETERMINISTIC"] == "true"
    assert "HCCL_SOCKET_IFNAME" not in remote_env
    assert remote_env["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.slow
def test_the_devices_that_a_user_lists_are_those_that_are_shared_out(tmp_path: Path) -> None:
    script = (
        "import os, ray\n"
        "from cluster import session\n"
        "from configs.parallel import ClusterConfig\n"
        "session.seen = lambda: {'GPU': 2.0, 'NPU': 1.0}\n"
        f"session.ensure_ray(ClusterConfig(), {str(tmp_path)!r}, cpus_needed=1)\n"
        f"lists = {LISTS!r}\n"
        # In no order that Ray promises.
        "see = ray.remote(lambda: [sorted(os.environ[name].split(',')) for name in lists])\n"
        "asked = [see.options(num_gpus=2), see.options(resources={'NPU': 1})]\n"
        "print(ray.get([one.remote() for one in asked], timeout=60))\n"
    )
    listed = dict(zip(LISTS, ("5,3", "6"), strict=True))
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT), **listed},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.stdout == f"{[[['3', '5'], ['6']]] * 2}\n", done.stderr


@dataclass(frozen=True)
class TellingSight(NextToken):
    """Writes down which devices each rank sees."""

    folder: str = ""

    def counts(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """As ever."""
        rank = torch.distributed.get_rank()
        Path(self.folder, f"rank-{rank}").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
        return super().counts(batch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_ranks_of_the_long_loop_see_a_device_each_too(
    machines: ClusterConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "backend_of", lambda machines: stand_in())
    tmp_path.joinpath("sight").mkdir()
    loss = TellingSight(folder=str(tmp_path / "sight"))
    fit(job(tmp_path, loss, steps=2), machines, str(tmp_path), str(tmp_path / "ray"))
    sights = [(tmp_path / "sight" / f"rank-{rank}").read_text() for rank in (0, 1)]
    assert sorted(sights) == ["0", "1"]


@dataclass(frozen=True)
class OutOfMemory(NextToken):
    """The fourth step of rank 1 finds no memory."""

    calls: list[int] = field(default_factory=list)

    def counts(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """As ever, until then."""
        self.calls.append(1)
        if torch.distributed.get_rank() == 1 and len(self.calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return super().counts(batch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_memory_that_runs_out_ends_the_long_loop_in_one_sentence_and_loses_nothing(
    machines: ClusterConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "backend_of", lambda machines: stand_in())
    todo = job(tmp_path, OutOfMemory())
    with pytest.raises(MachineError, match=r"^trainer 1: out of memory \(CUDA out") as caught:
        fit(todo, machines, str(tmp_path), str(tmp_path / "ray"))
    assert "\n" not in str(caught.value)
    newest = todo.saves.newest()
    assert newest is not None and newest[1] == 2


def compare_cards(names: list[str]) -> str:
    """What a rank is told whose device is called by its place in `names`."""
    try:
        require_equal_cards(names[torch.distributed.get_rank()])
    except MachineError as error:
        return str(error)
    return "equal"


def test_cards_of_two_kinds_in_a_group_are_refused_by_name(tmp_path: Path) -> None:
    kinds = ["NVIDIA H100", "NVIDIA A100"]
    told = on_ranks(2, tmp_path / "mixed", compare_cards, kinds)
    assert told[0] == told[1]
    assert "compute on NVIDIA H100 (rank 0) and NVIDIA A100 (rank 1); name a cluster" in told[0]
    assert on_ranks(2, tmp_path / "equal", compare_cards, kinds[:1] * 2) == ["equal"] * 2


def test_memory_that_ran_out_is_one_sentence_and_no_death(
    machines: ClusterConfig, tmp_path: Path
) -> None:
    output = Output(str(tmp_path / "logs"), "seer")
    with seers(machines, tmp_path, CUDA, 1.0) as actors:
        words = "CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has 80 GiB"
        with pytest.raises(MachineError, match=r"^seer 1: out of memory \(CUDA out of") as caught:
            refs = [actors[0].ready.remote(), actors[1].fail.remote("OutOfMemoryError", words)]
            gather(refs, output, timeout_seconds=60)
        assert not isinstance(caught.value, WorkerDied)
        assert "\n" not in str(caught.value)
        assert "lower posttrain.max_new_tokens" in str(caught.value)
        # A device that is gone is started anew on, as a process that is.
        words = "CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA"
        with pytest.raises(WorkerDied, match=r"^seer 0 died: its device failed \(CUDA error: un"):
            refs = [actors[0].fail.remote("AcceleratorError", words)]
            gather(refs, output, timeout_seconds=60)


@pytest.mark.parametrize(
    ("error", "memory", "lost"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), True, False),
        (RuntimeError("NPU out of memory. Tried to allocate"), True, False),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"),
            True,
            False,
        ),
        (MemoryError(), True, False),
        (RuntimeError("NPU function error: aclrtSynchronizeStream, code 507018"), False, True),
        (RuntimeError("CUDA error: device-side assert triggered"), False, True),
        (RuntimeError("sizes do not match"), False, False),
        (ValueError("out of memory of words"), False, False),
    ],
)
def test_what_torch_raises_is_told_apart(error: Exception, memory: bool, lost: bool) -> None:
    assert (out_of_memory(error) is not None) == memory
    assert (device_lost(error) is not None) == lost


def test_a_save_is_not_continued_in_another_type(
    machines: ClusterConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = job(tmp_path, NextToken())
    folder = begun.saves.root / "step-00000002"
    folder.mkdir(parents=True)
    (folder / "rank-0-of-1.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    begun.saves.complete(SaveState(2))
    narrow = stand_in(compute=torch.bfloat16)
    monkeypatch.setattr(session, "backend_of", lambda machines: narrow)
    told = (
        r"cluster\.compute: the save .*step-00000002 was computed in float32, and cuda computes in "
        "bfloat16; set it to 'float32' to go on"
    )
    with pytest.raises(MachineError, match=told) as caught:
        fit(begun, machines, str(tmp_path), str(tmp_path / "ray"))
    assert "\n" not in str(caught.value)
    assert folder.is_dir()
    with pytest.raises(MachineError, match=told):
        TrainerPool([], machines, begun.output, narrow).load(folder, step=2)
    TrainerPool([], machines, begun.output, stand_in()).load(folder, step=2)


def test_a_pool_marks_its_saves_with_the_type(
    machines: ClusterConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, narrow = job(tmp_path, NextToken()), stand_in(compute=torch.bfloat16)
    pool = TrainerPool([], machines, begun.output, narrow)
    one = build_trainer(
        TINY, optim=OPTIM, balance=BalanceConfig(), precision="high", seed=0, backend=narrow
    )

    def asked(verb: str, folder: Path, *more: object) -> list[SaveState]:
        """What the only worker would answer."""
        if verb == "save":
            one.save(folder)
        return [one.save_state()]

    monkeypatch.setattr(pool, "_all", asked)
    folder = begun.saves.root / "step-00000002"
    pool.save(begun.saves, step=2)
    assert begun.saves.newest() == (folder, 2)
    pool.load(folder, step=2)
    with pytest.raises(MachineError, match="was computed in bfloat16, and cuda computes in float3"):
        TrainerPool([], machines, begun.output, stand_in()).load(folder, step=2)


@pytest.mark.parametrize("backend", [CPU, stand_in()], ids=["host", "device"])
def test_batches_come_in_order_and_one_ahead_on_devices(backend: Backend) -> None:
    made: list[int] = []

    def make(step: int) -> dict[str, Tensor]:
        made.append(step)
        return {"tokens": torch.tensor([step])}

    coming = batches(make, range(3, 7), backend)
    assert int(next(coming)["tokens"]) == 3
    assert [int(one["tokens"]) for one in coming] == [4, 5, 6]
    assert made == [3, 4, 5, 6]
    assert list(batches(make, range(0), backend)) == []


def test_what_fails_ahead_fails_at_its_step() -> None:
    def make(step: int) -> dict[str, Tensor]:
        if step == 2:
            raise OSError("gone")
        return {}

    coming = batches(make, [1, 2, 3], stand_in())
    assert next(coming) == {}
    with pytest.raises(OSError, match="gone"):
        next(coming)


def test_room_for_weights_grows_with_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for total, free, expected in (
        (1000, 500, 300 * 2**30),
        (1000, 100, 90 * 2**30),
        (1000, 0, 512 * 2**20),
        (1, 500, 512 * 2**20),
    ):
        memory, shared = SimpleNamespace(total=total * 2**30), SimpleNamespace(free=free * 2**30)
        monkeypatch.setattr(psutil, "virtual_memory", lambda found=memory: found)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, found=shared: found)
        assert session._store_bytes() == expected


def test_a_row_that_stands_in_for_a_device_is_asked_for_as_one() -> None:
    row = stand_in()
    assert (row.look(), row.card(), row.is_host) == (found(), "stand-in", False)
    row.begin(seed=0)
    needs = workers.needs_of(ClusterConfig(cpus_per_worker=1), row, 0.5)
    assert needs == {"CPU": 1.0, "GPU": 0.5}
