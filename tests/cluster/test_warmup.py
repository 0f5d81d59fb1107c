"""The first step of a group may take longer, and compilers keep what they made."""

import os
import platform
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from cluster import fit, pool
from cluster.groups import Groups
from cluster.output import Output
from cluster.pool import TrainerPool
from cluster.warmup import first_step_seconds, keep_compiled
from configs.parallel import ClusterConfig
from tests.cluster.jobs import NextToken, job
from tests.ranks import on_ranks

VARIABLES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def wait_for_the_other(ep: int | None) -> list[Any]:
    """Rank 0 waits in a collective for the last, which comes too late: how long, and what it says.

    In the group of all, or where experts have copies, in that of the copies.
    """
    groups = Groups.of_world(ep, seconds=60)
    groups.wait_at_most(1.0)
    if dist.get_rank() == dist.get_world_size() - 1:
        time.sleep(6)
        return []
    begin = time.monotonic()
    if groups.mesh.axis("dp").ranks[-1] != dist.get_world_size() - 1:
        return []
    try:
        dist.all_reduce(torch.ones(1), group=groups["dp"])
    except RuntimeError as error:
        return [time.monotonic() - begin, str(error)]
    return [time.monotonic() - begin, "answered"]


@pytest.mark.parametrize(("world", "ep"), [(2, 1), (4, 2)])
def test_after_it_collectives_wait_for_a_step_alone(
    world: int, ep: int | None, tmp_path: Path
) -> None:
    told = on_ranks(world, tmp_path, wait_for_the_other, ep, collective_seconds=60)
    ((waited, said),) = [one for one in told if one]
    assert "imed out" in said or "timeout" in said.lower(), said
    assert waited < 5


def deadlines_of(builder: str) -> list[list[Any]]:
    """What a training sets as its steps end, by the step that it has done by then."""
    told: list[list[Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Groups, "wait_at_most", lambda _, seconds: told.append([seconds]))
        todo = job(Path(builder), NextToken(), steps=3, precision="high")
        fit._steps(todo, fit.desk_of(todo), step_seconds=7.0)
    return told


def test_a_training_ends_its_warm_up_once(tmp_path: Path) -> None:
    assert on_ranks(1, tmp_path / "ranks", deadlines_of, str(tmp_path)) == [[[7.0]]]


def test_a_pool_waits_longer_until_its_first_step_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    def gather(refs: Any, output: Output, *, timeout_seconds: float) -> list[Any]:
        waits.append(timeout_seconds)
        return [{}]

    monkeypatch.setattr(pool, "gather", gather)
    machines = ClusterConfig(step_timeout_seconds=600, startup_timeout_seconds=180)
    assert first_step_seconds(machines) == 780
    one = TrainerPool([], machines, cast(Any, None))
    for _ in range(2):
        one.news()
        one.optim_step(0.1)
    assert waits == [780, 780, 600, 600]


def test_what_is_compiled_outlives_the_run_by_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLES[0], raising=False)
    monkeypatch.setenv(VARIABLES[1], "/of/the/user")
    keep_compiled()
    folder = tmp_path / "ingot" / "compiled" / platform.node() / "triton"
    assert os.environ[VARIABLES[0]] == str(folder)
    assert folder.is_dir()
    assert os.environ[VARIABLES[1]] == "/of/the/user"


def test_where_no_folder_can_be_made_compilers_keep_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    keep_compiled()
    assert not any(variable in os.environ for variable in VARIABLES)
