"""How ranks are divided, and what training makes of it."""

import re
from pathlib import Path
from typing import Any

import pytest

from cluster import fit
from cluster.backend import CPU
from cluster.groups import Groups, nodes_spanned
from cluster.mesh import Mesh
from cluster.places import Places
from cluster.pool import TrainerSpec, open_trainers
from cluster.trainer import Trainer
from configs.errors import ConfigError
from configs.parallel import ClusterConfig
from configs.reading import load_recipe
from configs.train import BalanceConfig
from stages.steps import METRICS, read_metrics
from tests.cluster.jobs import OPTIM, NextToken, job
from tests.ranks import on_ranks
from tests.supplies import local

SPEC = TrainerSpec(OPTIM, BalanceConfig(), "high", seed=0, reference=False)


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
    with pytest.raises(ConfigError, match=r"cluster\.ep = 0 does not divide"):
        Mesh.of(6, 0, 0)
    with pytest.raises(ConfigError, match="rank 6 is none of the 6 of a mesh of pp 1 \\* dp 2"):
        Mesh(ep=3, dp=2, rank=6)
    with pytest.raises(ConfigError, match="dp = 0 is below 1"):
        Mesh(dp=0)


def test_a_world_is_divided_into_stages_first() -> None:
    assert Mesh.of(2048, 130, ep=64, pp=16) == Mesh(ep=64, dp=2, pp=16, rank=130)
    assert Mesh.of(2048, 130, ep=64, pp=16).axis("pp").index == 1
    assert Mesh.of(12, 5, pp=2) == Mesh(ep=6, dp=1, pp=2, rank=5)
    for pp in (0, 5):
        with pytest.raises(
            ConfigError, match=rf"cluster\.pp = {pp} does not divide cluster\.trainers = 12; choose"
        ):
            Mesh.of(12, 0, pp=pp)
    with pytest.raises(ConfigError, match=r"2 \* 4 does not divide cluster\.trainers = 12; set"):
        Mesh.of(12, 0, ep=4, pp=2)


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (["cluster.trainers=3"], "over cluster.trainers = 3; choose a divisor, or set cluster.ep"),
        (["cluster.trainers=4", "cluster.ep=3"], "cluster.ep = 3 does not divide cluster.trainers"),
        (["cluster.trainers=3", "cluster.ep=3"], "does not divide over cluster.ep = 3"),
        (
            ["cluster.trainers=32", "cluster.ep=32"],
            "n_routed_experts = 16 does not divide over cluster.ep = 32, which leaves some without",
        ),
        (["cluster.trainers=4", "cluster.pp=3"], "cluster.pp = 3 does not divide cluster.trainers"),
        (
            ["cluster.trainers=6", "cluster.pp=2", "cluster.ep=2"],
            "cluster.pp * cluster.ep = 2 * 2 does not divide cluster.trainers = 6; set cluster.ep "
            "to a divisor of cluster.trainers / cluster.pp = 3",
        ),
        (
            ["cluster.trainers=6", "cluster.pp=2"],
            "over cluster.trainers / cluster.pp = 3; choose a divisor, or set cluster.ep",
        ),
        (
            ["cluster.trainers=64", "cluster.pp=64"],
            "cluster.pp = 64 is above model.num_hidden_layers = 3, which leaves",
        ),
        (
            ["cluster.trainers=4", "cluster.pp=2", "pretrain.batch_sequences=33"],
            "batch_sequences = 33 does not divide over cluster.trainers / cluster.pp = 2; choose",
        ),
        (
            [
                *("cluster.trainers=4", "cluster.pp=2", "posttrain.group_size=3"),
                *("posttrain.prompts_per_step=3", "posttrain.minibatches=1"),
            ],
            "9 answers do not divide over cluster.trainers / cluster.pp = 2; choose",
        ),
    ],
)
def test_recipes_are_refused_when_they_are_read(sets: list[str], told: str) -> None:
    load_recipe("tiny", sets=["cluster.trainers=4", "cluster.ep=2"])
    load_recipe("tiny", sets=["cluster.trainers=3", "cluster.pp=3"])
    with pytest.raises(ConfigError, match=re.escape(told)):
        load_recipe("tiny", sets=sets)


def test_rows_and_experts_are_divided_over_the_trainers_of_a_stage() -> None:
    """In one stage 32 are too many for 16 experts, and for 16 rows."""
    sets = ["cluster.trainers=32", "pretrain.batch_sequences=16"]
    assert load_recipe("tiny", sets=[*sets, "cluster.pp=2"]).cluster.stage_trainers == 16
    with pytest.raises(ConfigError, match=r"n_routed_experts = 16 does not divide over"):
        load_recipe("tiny", sets=sets)
    with pytest.raises(ConfigError, match=r"batch_sequences = 16 does not divide over"):
        load_recipe("tiny", sets=[*sets, "cluster.ep=16"])


def fit_on_rank(builder: str) -> list[Any]:
    """What a rank of a long loop makes of its settings: degrees and parts of each step; losses."""
    told: list[list[int]] = []
    losses = []
    step = Trainer.train_step

    def seen(self: Trainer, *given: Any, **more: Any) -> dict[str, Any]:
        assert self.recompute == "all"
        told.append([self.mesh.ep, self.mesh.dp, more["micro_batches"]])
        return step(self, *given, **more)

    for folder, parts in (("whole", 1), ("parts", 2)):
        own = Path(builder, folder)
        todo = job(own, NextToken(), steps=3, precision="high", micro_batches=parts)
        settings = {"job": todo, "desk": None, "backend": CPU, "ep": 1, "recompute": "all"}
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
    todo, machines = job(tmp_path, NextToken()), ClusterConfig(trainers=4, ep=2, recompute="all")
    with pytest.raises(Ended):
        fit._run(todo, machines, Places(CPU), fit.desk_of(todo), str(tmp_path))
    assert (told["ep"], told["recompute"]) == (2, "all")
    assert told["seconds"] >= told["step_seconds"] > 0


@pytest.mark.parametrize(
    ("nodes", "ep", "spanned"),
    [
        ("aabb", 4, 2),
        ("aabb", 2, 1),
        ("abab", 4, 1),
        ("aaab", 4, 1),
        ("aaaabbbb", 8, 2),
        ("aabbccdd", 4, 2),
        ("aabbccdd", 8, 4),
        ("abcd", 4, 4),
        ("aabbaaaa", 4, 1),
        ("abba", 4, 1),
        ("abba", 2, 2),
    ],
)
def test_an_axis_spans_nodes_where_all_have_equal_runs_of_it(
    nodes: str, ep: int, spanned: int
) -> None:
    mesh = Mesh.of(len(nodes), 0, ep)
    assert nodes_spanned(mesh, nodes) == spanned


def test_an_axis_that_its_nodes_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="ep axis of 4 ranks does not divide over 3 nodes"):
        Groups(Mesh(ep=4), 60, nodes=3)


def test_nobody_trains_in_pipeline_stages_unasked(tmp_path: Path) -> None:
    staged = ClusterConfig(trainers=2, pp=2)
    told = r"cluster\.pp = 2: training over several pipeline stages is not built yet"
    with pytest.raises(ConfigError, match=told):
        fit.fit(job(tmp_path, NextToken()), staged, str(tmp_path), str(tmp_path))
    with (
        pytest.raises(ConfigError, match=told),
        open_trainers(staged, tmp_path, SPEC, logs=tmp_path, supply=local(tmp_path)),
    ):
        pass
