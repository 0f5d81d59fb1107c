"""Samplers behind a driver draw what one model draws in this process."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from torch import Tensor

from cluster.checkpoint import by_expert, merged
from cluster.generation import GenerationPool, Sample, Sampling, open_generation
from cluster.models import experts_here
from cluster.output import Output
from cluster.workers import WorkerDied
from configs.errors import DataError, IngotError, MachineError
from configs.parallel import ClusterConfig
from configs.train import Precision
from model import decode
from model.drawing import Drawing
from model.fp8.scheme import Numerics, settle
from model.transformer import Transformer
from model.weights.files import load_pretrained, save_pretrained
from tests.references import TINY, random_model
from tests.supplies import local

PROMPTS = [[5, 6], [7], [8, 9, 10, 11], [12], [13, 14]]
SEEDS = [1, 2, 3, 4, 5]
SAMPLING = Sampling(max_new_tokens=6, temperature=0.8, stop_tokens=(7,))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model's folder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_pretrained(random_model(), folder)
    return folder


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the samplers' words go."""
    return tmp_path_factory.mktemp("builder") / "logs"


@pytest.fixture(scope="module")
def pool(machines: ClusterConfig, checkpoint: Path, logs: Path) -> Iterator[GenerationPool]:
    """Two samplers."""
    with open_generation(machines, checkpoint, logs=logs, supply=local(logs.parent)) as opened:
        yield opened


class Answering:
    """An actor that says to every update that it holds the version it was made with."""

    def __init__(self, version: int) -> None:
        self.version = version

    @property
    def update_weights(self) -> "Answering":
        return self

    def remote(self, version: int, *shards: object) -> object:
        return ray.put(self.version)


def assert_drawn_from(model: Transformer, found: list[Sample], count: int, version: int) -> None:
    """The same tokens; log-probabilities to the rounding that another batch size makes."""
    expected = decode.sample(
        model,
        PROMPTS[:count],
        max_new_tokens=SAMPLING.max_new_tokens,
        drawing=Drawing(SAMPLING.temperature),
        stop_tokens=SAMPLING.stop_tokens,
        seeds=SEEDS[:count],
    )
    assert len(found) == count
    for a, b in zip(found, expected, strict=True):
        assert a.token_ids == b.token_ids
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        assert (a.stopped, a.version) == (b.stopped, version)


def shards(model: Transformer) -> list[dict[str, Tensor]]:
    """What two trainer ranks would hand over."""
    state, experts = model.state_dict(), experts_here(model)
    odd, even = (1, 3, 5, 7), (6, 4, 2, 0)
    stacks = {name: state.pop(name) for name in list(state) if ".experts." in name}
    return [
        by_expert({n: t[list(own)] for n, t in stacks.items()} | rest, dict.fromkeys(experts, own))
        for own, rest in ((odd, {}), (even, state))
    ]


def test_shards_of_experts_are_stacked_by_number() -> None:
    model = random_model(seed=3)
    whole = merged(shards(model))
    assert set(whole) == set(model.state_dict())
    assert all(torch.equal(whole[n], t) for n, t in model.state_dict().items())


def test_a_pool_draws_what_one_model_draws(pool: GenerationPool) -> None:
    for count in (5, 4, 1, 0):
        found = pool.sample(PROMPTS[:count], SAMPLING, SEEDS[:count])
        assert_drawn_from(random_model(), found, count, version=0)
    with pytest.raises(DataError, match="context of 32"):
        pool.sample([[1], [2] * 30], SAMPLING, [0, 0])


def test_truncation_stop_tokens_rows_and_routing_reach_the_samplers(pool: GenerationPool) -> None:
    endless = Sampling(
        max_new_tokens=12,
        temperature=1.3,
        stop_tokens=(),
        top_k=9,
        top_p=0.8,
        max_rows=2,
        keep_experts=True,
    )
    # The second of the stop tokens is one that comes, and the first is not.
    drawn = pool.sample(PROMPTS, endless, SEEDS)[0].token_ids
    rare = min(set(range(TINY.vocab_size)) - set(drawn))
    sampling = replace(endless, stop_tokens=(rare, drawn[3]))
    found = pool.sample(PROMPTS, sampling, SEEDS)
    assert len(found[0].token_ids) <= 4 < len(drawn)
    expected = decode.sample(
        random_model(),
        PROMPTS,
        max_new_tokens=12,
        drawing=Drawing(1.3, 9, 0.8),
        stop_tokens=set(sampling.stop_tokens),
        seeds=SEEDS,
        keep_experts=True,
    )
    for a, b in zip(found, expected, strict=True):
        assert a.token_ids == b.token_ids
        assert a.experts is not None
        assert b.experts is not None
        assert np.array_equal(a.experts, b.experts)
    # The same without what was asked for beyond temperature says something else.
    plain = pool.sample(PROMPTS, Sampling(12, 1.3, stop_tokens=(7,)), SEEDS)
    assert [a.token_ids for a in plain] != [a.token_ids for a in found]
    assert all(a.experts is None for a in plain)


def test_new_weights_come_under_their_version(pool: GenerationPool) -> None:
    updated = random_model(seed=4)
    pool.update_weights(17, [ray.put(shard) for shard in shards(updated)])
    assert_drawn_from(updated, pool.sample(PROMPTS, SAMPLING, SEEDS), 5, version=17)


def test_another_checkpoint_is_loaded_as_version_0_whatever_its_shape(
    pool: GenerationPool, checkpoint: Path, tmp_path: Path
) -> None:
    other = random_model(TINY.model_copy(update={"num_hidden_layers": 3}), seed=5)
    save_pretrained(other, tmp_path / "other")
    pool.load(tmp_path / "other")
    assert_drawn_from(other, pool.sample(PROMPTS, SAMPLING, SEEDS), 5, version=0)
    pool.load(checkpoint)
    assert_drawn_from(random_model(), pool.sample(PROMPTS, SAMPLING, SEEDS), 5, version=0)


def test_a_sampler_that_holds_another_version_after_an_update_is_an_error(
    machines: ClusterConfig, logs: Path
) -> None:
    output = Output(str(logs), "sampler")
    deaf = GenerationPool([Answering(16), Answering(17)], machines, output)
    with pytest.raises(MachineError, match=r"hold versions \[16, 17\] after an update to 17"):
        deaf.update_weights(17, [])
    GenerationPool([Answering(17), Answering(17)], machines, output).update_weights(17, [])


def test_samplers_compute_in_the_precision_that_trainers_learn_in(
    machines: ClusterConfig, checkpoint: Path, tmp_path: Path
) -> None:
    one = machines.model_copy(update={"samplers": 1})
    with open_generation(
        one, checkpoint, logs=tmp_path, supply=local(tmp_path), precision="fp8"
    ) as rough:
        found = rough.sample(PROMPTS, SAMPLING, SEEDS)
        # What was made of the weights before is not used for those that came after.
        updated = random_model(seed=4)
        rough.update_weights(1, [ray.put(shard) for shard in shards(updated)])
        later = rough.sample(PROMPTS, SAMPLING, SEEDS)
    save_pretrained(updated, tmp_path / "updated")
    fp8 = settle(Numerics("fp8"), torch.device("cpu"))[0]
    models: list[tuple[Path, Precision | Numerics]] = [
        (checkpoint, "high"),
        (checkpoint, fp8),
        (tmp_path / "updated", fp8),
    ]
    exact, expected, expected_later = (
        decode.sample(
            load_pretrained(folder, precision=precision),
            PROMPTS,
            max_new_tokens=SAMPLING.max_new_tokens,
            drawing=Drawing(SAMPLING.temperature),
            stop_tokens=SAMPLING.stop_tokens,
            seeds=SEEDS,
        )
        for folder, precision in models
    )
    assert [one.token_ids for one in later] == [one.token_ids for one in expected_later]
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    apart = [abs(a.logprobs[0] - b.logprobs[0]) for a, b in zip(found, exact, strict=True)]
    assert max(apart) > 1e-3


def test_samples_are_compared_by_what_was_said() -> None:
    routed = [Sample([5], [-1.0], 0, True, experts=np.full((2, 1, 2), n)) for n in (1, 2)]
    assert routed[0] == routed[1] == Sample([5], [-1.0], 0, True)
    assert routed[0] != replace(routed[0], version=1)


def test_a_pool_that_finds_no_room_beside_another_says_what_is_short(
    pool: GenerationPool, machines: ClusterConfig, checkpoint: Path
) -> None:
    assert pool.actors  # they hold one of the two CPUs
    greedy = machines.model_copy(
        update={"cpus_per_worker": 1.0, "placement_timeout_seconds": 2, "samplers": 2}
    )
    with (
        pytest.raises(MachineError, match=r"2 samplers ask for 2 CPUs and 1 were free after 2 s"),
        open_generation(greedy, checkpoint, logs=checkpoint, supply=local(checkpoint)),
    ):
        pass


def test_a_pool_too_large_for_the_cluster_says_so(
    machines: ClusterConfig, checkpoint: Path
) -> None:
    large = machines.model_copy(update={"cpus_per_worker": 1.25, "placement_timeout_seconds": 1})
    with (
        pytest.raises(MachineError, match=r"ask for 2\.5 CPUs, the cluster has 2"),
        open_generation(large, checkpoint, logs=checkpoint, supply=local(checkpoint)),
    ):
        pass


def test_a_checkpoint_that_cannot_be_read_stops_the_pool(
    machines: ClusterConfig, tmp_path: Path
) -> None:
    one = machines.model_copy(update={"samplers": 1})
    with (
        pytest.raises(MachineError, match=r"sampler 0 could not start: .*config\.json") as caught,
        open_generation(one, tmp_path, logs=tmp_path, supply=local(tmp_path)),
    ):
        pass
    # The traceback is in the file, and what is at its end in the error.
    log = (tmp_path / "sampler-0.log").read_text()
    assert " begins\n" in log
    assert "in load_pretrained" in log
    assert log.splitlines()[-1] in caught.value.__notes__[0]


def test_a_checkpoint_that_cannot_be_read_is_named_and_the_next_one_loads(
    pool: GenerationPool, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(IngotError, match=r"config\.json"):
        pool.load(tmp_path)
    pool.load(checkpoint)
    assert_drawn_from(random_model(), pool.sample(PROMPTS, SAMPLING, SEEDS), 5, version=0)


def test_a_killed_sampler_is_named_with_its_last_words(pool: GenerationPool, logs: Path) -> None:
    ray.kill(pool.actors[0])
    with pytest.raises(WorkerDied, match=r"^sampler 0 died") as caught:
        pool.sample(PROMPTS, SAMPLING, SEEDS)
    assert caught.value.__notes__[0].startswith(f"the last lines of {logs / 'sampler-0.log'}:\n")
