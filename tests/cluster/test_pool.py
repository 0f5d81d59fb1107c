"""Trainers behind a driver do what one trainer does in this process."""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import ray
import torch

from cluster import pool as pool_module
from cluster.backend import CPU
from cluster.checkpoint import merged, step_folder
from cluster.output import Output
from cluster.pool import TrainerPool, TrainerSpec, _TrainWorker, open_trainers
from cluster.trainer import build_trainer
from cluster.workers import WorkerDied
from configs.errors import ConfigError, MachineError, TrainingError
from configs.parallel import ClusterConfig
from configs.train import BalanceConfig
from model.weights.files import save_pretrained
from tests.cluster.jobs import OPTIM, NextToken, RandomBatches, next_logprobs, repeatable
from tests.references import TINY, random_model
from tests.supplies import local, saves_of

RATE = 0.01
BALANCE = BalanceConfig(bias_update_speed=0.01)
SPEC = TrainerSpec(optim=OPTIM, balance=BALANCE, precision="high", seed=0, reference=True)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that everything here starts from."""
    folder = tmp_path_factory.mktemp("start")
    save_pretrained(random_model(), folder)
    return folder


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the trainers' words go."""
    return tmp_path_factory.mktemp("builder") / "logs"


@pytest.fixture(scope="module")
def pool(machines: ClusterConfig, start: Path, logs: Path) -> Iterator[TrainerPool]:
    """Two trainers."""
    with open_trainers(machines, start, SPEC, logs=logs, supply=local(logs.parent)) as opened:
        yield opened


def batch(step: int) -> dict[str, torch.Tensor]:
    return RandomBatches().batch(step, rank=0, world=1)


def test_a_pool_trains_as_one_trainer_does(pool: TrainerPool, tmp_path: Path) -> None:
    alone = build_trainer(TINY, optim=OPTIM, balance=BALANCE, precision="high", seed=0)
    model = random_model()
    alone.load_weights(model.state_dict())
    assert pool.news() == alone.news()
    for step in (1, 2):
        found = pool.forward_backward(batch(step), NextToken())
        expected = alone.forward_backward(batch(step), NextToken())
        assert found == pytest.approx(expected, rel=1e-5)
        found_report, report = pool.optim_step(RATE), alone.optim_step(RATE)
        assert found_report["grad_norm"] == pytest.approx(report["grad_norm"], rel=1e-4)
        assert found_report["expert_load"] == report["expert_load"]
    whole = merged(ray.get(pool.weights()))
    assert set(whole) == set(alone.model.state_dict())
    for name, tensor in alone.model.state_dict().items():
        torch.testing.assert_close(whole[name], tensor, rtol=0, atol=5e-5, msg=name)

    # The reference stays where the pool began.
    tokens = batch(9)["tokens"]
    with torch.no_grad():
        expected_NTV = (model(tokens)[:, :-1] / 0.7).log_softmax(-1)
    expected_NT = expected_NTV.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    reference_NT = pool.reference({"tokens": tokens}, next_logprobs)
    assert not reference_NT.requires_grad
    torch.testing.assert_close(reference_NT[:, :-1], expected_NT, rtol=1e-4, atol=1e-4)
    assert not reference_NT[:, -1].any()

    # A save is a way back, bit for bit.
    earlier = tmp_path / "of an earlier build"
    earlier.mkdir()
    saves = saves_of(tmp_path, earlier)
    pool.save(saves, step=2)
    assert not earlier.exists()
    after = pool.forward_backward(batch(3), NextToken()) | pool.optim_step(RATE)
    pool.forward_backward(batch(4), NextToken())
    pool.optim_step(RATE)
    saved = saves.newest()
    assert saved == (step_folder(saves.root, 2), 2)
    pool.load(saved[0], step=2)
    again = pool.forward_backward(batch(3), NextToken()) | pool.optim_step(RATE)
    assert repeatable(again) == repeatable(after)

    # An error in a rank is raised here as itself, and no step can follow it.
    with pytest.raises(TrainingError, match="not finite"):
        pool.forward_backward(batch(1), NextToken(scale=float("nan")))
    with pytest.raises(TrainingError, match="not finite: grad_norm nan"):
        pool.optim_step(RATE)


@pytest.mark.slow
def test_copies_of_experts_train_and_tell_as_one_trainer_does(
    machines: ClusterConfig, start: Path, logs: Path
) -> None:
    """Two trainers with all experts each, the reference of each among them."""
    alone = build_trainer(TINY, optim=OPTIM, balance=BALANCE, precision="high", seed=0)
    model = random_model()
    alone.load_weights(model.state_dict())
    apart = machines.model_copy(update={"ep": 1})
    with open_trainers(apart, start, SPEC, logs=logs, supply=local(logs.parent)) as copies:
        for step in (1, 2):
            found = copies.forward_backward(batch(step), NextToken()) | copies.optim_step(RATE)
            wanted = alone.forward_backward(batch(step), NextToken()) | alone.optim_step(RATE)
            for name in ("loss", "grad_norm"):
                assert found[name] == pytest.approx(wanted[name], rel=1e-4)
        first, second = ray.get(copies.weights())
        tokens = batch(9)["tokens"]
        reference_NT = copies.reference({"tokens": tokens}, next_logprobs)
    # Each tells what it owns, experts whole, and nothing is told twice.
    assert not first.keys() & second.keys()
    told, expected = merged([first, second]), alone.model.state_dict()
    assert told.keys() == expected.keys()
    assert first and second
    for name, tensor in expected.items():
        torch.testing.assert_close(told[name], tensor, rtol=0, atol=5e-5, msg=name)
    with torch.no_grad():
        logprobs_NTV = (model(tokens)[:, :-1] / 0.7).log_softmax(-1)
    wanted_NT = logprobs_NTV.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(reference_NT[:, :-1], wanted_NT, rtol=1e-4, atol=1e-4)


def test_a_batch_that_leaves_a_trainer_without_rows_is_refused(pool: TrainerPool) -> None:
    one = {name: tensor[:1] for name, tensor in batch(1).items()}
    with pytest.raises(ConfigError, match="a batch of 1 rows for 2 trainers"):
        pool.forward_backward(one, NextToken())
    two = {name: tensor[:2] for name, tensor in batch(1).items()}
    assert pool.forward_backward(two, NextToken())["next"] > 0


def test_ranks_of_a_local_cluster_meet_on_loopback(pool: TrainerPool) -> None:
    found: str = ray.get(pool.actors[0].address.remote())
    assert found.startswith("tcp://127.0.0.1:")


def test_a_pool_of_one_does_counts_and_says_what_its_trainer_does(
    machines: ClusterConfig, start: Path, tmp_path: Path
) -> None:
    spec = TrainerSpec(optim=OPTIM, balance=BALANCE, precision="fp8", seed=0, reference=False)
    alone = build_trainer(TINY, optim=OPTIM, balance=BALANCE, precision="fp8", seed=0)
    alone.load_weights(random_model().state_dict())
    saves = saves_of(tmp_path)
    with open_trainers(
        machines.model_copy(update={"trainers": 1}),
        start,
        spec,
        logs=tmp_path,
        supply=local(tmp_path),
    ) as one:
        assert one.news() == alone.news()
        found = one.forward_backward(batch(1), NextToken(), counting=True)
        assert found == pytest.approx(alone.forward_backward(batch(1), NextToken(), counting=True))
        tallies, expected = one.fp8_tallies(), alone.fp8_tallies()
        assert tallies.keys() == expected.keys() != set()
        for role, tally in expected.items():
            assert tallies[role].nonzero == pytest.approx(tally.nonzero, rel=1e-3)
        assert len(one.weights()) == 1
        assert one.optim_step(RATE)["grad_norm"] == pytest.approx(
            alone.optim_step(RATE)["grad_norm"], rel=1e-4
        )
        for step in (8, 9, 10):
            one.save(saves, step=step)
        assert sorted(saves.root.glob("step-*")) == [step_folder(saves.root, n) for n in (9, 10)]
    # Closed with its block, whoever still holds it: Ray ends what it is told to, in its own time.
    deadline = time.monotonic() + 60
    with pytest.raises(WorkerDied, match=r"^trainer 0 died"):
        while time.monotonic() < deadline:
            one.news()


def test_a_killed_trainer_is_named_with_its_last_words(pool: TrainerPool, logs: Path) -> None:
    ray.kill(pool.actors[1])
    # A collective of all ranks, which none ends alone: the killed one may still answer by itself.
    for call in (partial(pool.optim_step, RATE), pool.weights):
        with pytest.raises(WorkerDied, match=r"^trainer 1 died") as caught:
            call()
        (note,) = caught.value.__notes__
        assert note.startswith(f"the last lines of {logs / 'trainer-1.log'}:\n")


def test_a_pool_too_large_for_the_cluster_says_so(machines: ClusterConfig, start: Path) -> None:
    large = machines.model_copy(update={"cpus_per_worker": 1.25})
    with (
        pytest.raises(MachineError, match=r"ask for 2\.5 CPUs, the cluster has 2"),
        open_trainers(large, start, SPEC, logs=start, supply=local(start)),
    ):
        pass


@pytest.mark.parametrize(
    ("address", "chosen"), [("ray.example:6379", ["choose", "meet"]), (None, ["meet"])]
)
def test_trainers_of_a_named_cluster_choose_their_network_before_they_meet(
    start: Path, monkeypatch: pytest.MonkeyPatch, address: str | None, chosen: list[str]
) -> None:
    told: list[str] = []
    monkeypatch.setattr(pool_module, "choose_network", lambda _: told.append("choose"))
    monkeypatch.setattr(pool_module, "join_group", lambda *_: told.append("meet"))
    monkeypatch.setattr(pool_module, "require_equal_cards", lambda _: None)
    monkeypatch.setattr(pool_module, "build_trainer", lambda *_, **__: MagicMock())
    worker = object.__new__(_TrainWorker)
    worker.machines = ClusterConfig(address=address, trainers=2)
    worker.spec, worker.start, worker.rank = replace(SPEC, reference=False), start, 0
    worker.backend, worker.output = CPU, Output(str(start), "trainer")
    worker.join("tcp://10.0.0.1:1")
    assert told == chosen
