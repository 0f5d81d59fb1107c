"""How ranks are divided, and what training makes of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from cluster import fit
from cluster.backend import CPU
from cluster.groups import Groups
from cluster.mesh import Mesh
from cluster.places import Places
from cluster.trainer import Trainer, build_trainer, expert_parameter_names
from configs.errors import ConfigError
from configs.parallel import ClusterConfig
from configs.reading import load_recipe
from configs.train import BalanceConfig
from model.transformer import Transformer
from stages.steps import METRICS, read_metrics
from tests.cluster.jobs import OPTIM, NextToken, RandomBatches, job
from tests.ranks import on_ranks
from tests.references import TINY

RATE = 0.01
BALANCE = BalanceConfig(bias_update_speed=0.01)


def test_ep_is_fastest_and_pp_slowest() -> None:
    seen = [Mesh(pp=2, dp=2, ep=3, rank=rank) for rank in range(12)]
    assert [one.axis("ep").ranks for one in seen[::3]] == [
        (0, 1, 2),
        (3, 4, 5),
        (6, 7, 8),
        (9, 10, 11),
    ]
    assert seen[4].axis("dp").ranks == (1, 4)
    assert seen[4].axis("pp").ranks == (4, 10)
    assert seen[10].axis("data").ranks == tuple(range(6, 12))


@pytest.mark.parametrize("name", ["pp", "dp", "ep", "data"])
def test_axes_divide_the_ranks_and_know_their_places(name: Any) -> None:
    shape = Mesh(pp=2, dp=3, ep=4)
    lines = shape.lines(name)
    assert sorted(rank for line in lines for rank in line) == list(range(24))
    for rank in range(24):
        axis = Mesh(pp=2, dp=3, ep=4, rank=rank).axis(name)
        assert axis.ranks in lines
        assert (axis.size, axis.ranks[axis.index]) == (len(axis.ranks), rank)


def test_degrees_that_do_not_fit_are_named_with_both_numbers() -> None:
    assert Mesh.of(6, 5, 3) == Mesh(ep=3, dp=2, rank=5)
    assert Mesh.of(6, 5) == Mesh(ep=6, dp=1, rank=5)
    with pytest.raises(ConfigError, match=r"cluster\.ep = 4 does not divide cluster\.trainers = 6"):
        Mesh.of(6, 0, 4)
    with pytest.raises(ConfigError, match="rank 6 is none of the 6 of a mesh of pp 1 \\* dp 2"):
        Mesh(ep=3, dp=2, rank=6)
    with pytest.raises(ConfigError, match="dp = 0 is below 1"):
        Mesh(dp=0)


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (["cluster.trainers=3"], "over cluster.trainers = 3; choose a divisor, or set cluster.ep"),
        (["cluster.trainers=4", "cluster.ep=3"], "cluster.ep = 3 does not divide cluster.trainers"),
        (["cluster.trainers=3", "cluster.ep=3"], "does not divide over cluster.ep = 3"),
        (["cluster.trainers=32", "cluster.ep=32"], "does not divide over cluster.ep = 32"),
    ],
)
def test_recipes_are_refused_when_they_are_read(sets: list[str], told: str) -> None:
    load_recipe("tiny", sets=["cluster.trainers=4", "cluster.ep=2"])
    with pytest.raises(ConfigError, match=told):
        load_recipe("tiny", sets=sets)


def trainer(ep: int | None, seed: int = 0) -> Trainer:
    return build_trainer(
        TINY,
        optim=OPTIM,
        balance=BALANCE,
        precision="high",
        seed=seed,
        groups=Groups.of_world(ep, seconds=60),
    )


def grads_of(model: Transformer) -> dict[str, Any]:
    return {
        name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None
    }


def train(one: Trainer, steps: range) -> list[dict[str, Any]]:
    return [
        one.train_step(
            RandomBatches().batch(step, rank=one.rank, world=one.world), NextToken(), RATE
        )
        for step in steps
    ]


def train_on_rank(ep: int, folder: str) -> dict[str, Any]:
    """Gradients of a step in float64; then two steps, a save, two more, and two from the save."""
    exact = trainer(ep)
    exact.model.double()
    batch = RandomBatches().batch(1, rank=exact.rank, world=exact.world)
    exact._backward([batch], NextToken(), counting=False)
    exact._gradients()
    one = trainer(ep)
    reports = train(one, range(1, 3))
    one.save(Path(folder))
    dist.barrier()
    rest = train(one, range(3, 5))
    again = trainer(ep, seed=99)
    again.load(Path(folder), step=2)
    resumed = train(again, range(3, 5))
    state = one.model.state_dict()
    return {
        "grads": {n: g for n, g in grads_of(exact.model).items() if exact._speaks_for(n)},
        "reports": reports,
        "rest": rest,
        "resumed": resumed,
        "same": all(torch.equal(t, state[n]) for n, t in again.model.state_dict().items()),
        "told": sorted(one.state()),
        "ranges": [[local.start, local.stop] for local in one.expert_ranges().values()],
    }


@pytest.fixture(scope="module", params=[(2, 1), (4, 2)], ids=lambda p: f"{p[0]}-ep{p[1]}")
def copies(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path, list[dict[str, Any]]]:
    """Where expert axes are copies of each other: (ep, the save, what each rank did)."""
    world, ep = request.param
    save = tmp_path_factory.mktemp("save")
    ranks = on_ranks(world, tmp_path_factory.mktemp("ranks"), train_on_rank, ep, str(save))
    return ep, save, ranks


Copies = tuple[int, Path, list[dict[str, Any]]]


def test_gradients_in_float64_are_those_of_one_process(copies: Copies) -> None:
    ep, _, ranks = copies
    alone = trainer(None)
    alone.model.double()
    alone._backward([RandomBatches().batch(1, rank=0, world=1)], NextToken(), counting=False)
    sharded = expert_parameter_names(alone.model)
    for name, wanted in grads_of(alone.model).items():
        parts = [rank["grads"][name] for rank in ranks if name in rank["grads"]]
        assert len(parts) == (ep if name in sharded else 1), name
        found = torch.cat(parts) if name in sharded else parts[0]
        bound = 1e-9 * float(wanted.abs().max())
        torch.testing.assert_close(found, wanted, rtol=0, atol=bound, msg=name)


def test_copies_train_as_one_process_does(copies: Copies) -> None:
    _, _, ranks = copies
    expected = train(trainer(None), range(1, 3))
    assert expected[0]["grad_norm"] > OPTIM.max_grad_norm  # clipping takes part
    for rank in ranks:
        for found, report in zip(rank["reports"], expected, strict=True):
            assert set(found) == set(report)
            for name in ("loss", "next", "grad_norm"):
                assert found[name] == pytest.approx(report[name], rel=1e-5)
            assert found["expert_load"] == report["expert_load"]


def test_each_tensor_is_told_once_and_a_save_is_resumed_bit_for_bit(copies: Copies) -> None:
    ep, save, ranks = copies
    assert all(rank["resumed"] == rank["rest"] for rank in ranks)
    assert all(rank["same"] for rank in ranks)
    assert all(not rank["told"] for rank in ranks[ep:])
    for place in range(len(ranks)):
        with safe_open(save / f"rank-{place}-of-{len(ranks)}.safetensors", framework="pt") as file:
            assert bool(file.keys()) == (place < ep)
    each = TINY.n_routed_experts // ep
    for place, rank in enumerate(ranks):
        begin = place % ep * each
        assert rank["ranges"] == [[begin, begin + each]] * 2
    one = trainer(None, seed=99)
    one.load(save, step=2)
    for found, wanted in zip(train(one, range(3, 5)), ranks[0]["rest"], strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


def fit_on_rank(builder: str) -> list[Any]:
    """What a rank of a long loop makes of its settings: degrees and parts of each step; losses."""
    told: list[list[int]] = []
    losses = []
    step = Trainer.train_step

    def seen(self: Trainer, *given: Any, **more: Any) -> dict[str, Any]:
        told.append([self.mesh.ep, self.mesh.dp, more["micro_batches"]])
        return step(self, *given, **more)

    for folder, parts in (("whole", 1), ("parts", 2)):
        own = Path(builder, folder)
        todo = job(own, NextToken(), steps=3, precision="high", micro_batches=parts)
        settings = {"job": todo, "desk": None, "backend": CPU, "ep": 1}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "train_step", seen)
            fit._train_worker(settings | {"seconds": 60.0, "step_seconds": 60.0})
        records = [line for line in read_metrics(own / METRICS) if line["step"]]
        losses.append([line["loss"] for line in records])
    return [told, losses]


def test_a_long_loop_takes_both_settings(tmp_path: Path) -> None:
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    first, second = on_ranks(2, tmp_path / "ranks", fit_on_rank, str(tmp_path))
    assert first[0] == second[0] == [[1, 2, 1]] * 3 + [[1, 2, 2]] * 3
    whole, parts = first[1]
    assert len(whole) == 3
    assert parts == pytest.approx(whole, rel=1e-5)


def test_a_driver_hands_ranks_their_mesh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: dict[str, Any] = {}

    class Ended(Exception):
        pass

    def trainer(*_: Any, train_loop_config: dict[str, Any], **__: Any) -> None:
        told.update(train_loop_config)
        raise Ended

    monkeypatch.setattr(fit, "TorchTrainer", trainer)
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "0")
    todo, machines = job(tmp_path, NextToken()), ClusterConfig(trainers=4, ep=2)
    with pytest.raises(Ended):
        fit._run(todo, machines, Places(CPU), fit.desk_of(todo), str(tmp_path))
    assert told["ep"] == 2
    assert told["seconds"] >= told["step_seconds"] > 0
