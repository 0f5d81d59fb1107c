"""Memory that runs out within a step is told by who held it, and costs no save."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster import memory
from cluster.checkpoint import latest
from cluster.device_errors import is_out_of_memory
from cluster.fit import fit
from cluster.memory import Held, Room, held_by
from cluster.output import Output
from cluster.pool import TrainerSpec, open_trainers
from cluster.trainer import Trainer, build_trainer
from configs.errors import MachineError
from configs.parallel import ClusterConfig
from configs.train import BalanceConfig
from model.transformer import Predictions, Transformer
from model.weights.files import save_pretrained
from stages.steps import read_metrics
from tests.cluster.jobs import OPTIM, STEPS, NextToken, RandomBatches, job, saves
from tests.references import TINY, random_model
from tests.supplies import local

RATE = 0.01
BALANCE = BalanceConfig(bias_update_speed=0.01)
CUDA_SAYS = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"


_CALLS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def asks_for_too_much() -> Tensor:
    """What no machine has, by torch's own allocator on CPUs."""
    return torch.empty(2**58)


@dataclass(frozen=True)
class Full(NextToken):
    """Memory runs out on the last rank from some forward pass of its process on."""

    begin: int = 1
    device: bool = False

    def __call__(
        self, predicted: Predictions, batch: Mapping[str, Tensor], totals: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, float]]:
        """As ever, until the moment."""
        # The head is of the process's model; the loss itself is another with every call.
        calls = _CALLS[predicted.head] = _CALLS.get(predicted.head, 0) + 1
        is_last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
        if is_last and calls >= self.begin:
            if self.device:
                raise torch.OutOfMemoryError(CUDA_SAYS)
            asks_for_too_much()
        return super().__call__(predicted, batch, totals)


def trainer() -> Trainer:
    return build_trainer(TINY, optim=OPTIM, balance=BALANCE, precision="high", seed=0)


def step(one: Trainer, loss: NextToken) -> dict[str, Any]:
    return one.train_step(RandomBatches().batch(1, rank=0, world=1), loss, RATE)


@pytest.mark.parametrize("device", [False, True], ids=["torch's own on a CPU", "a device's"])
def test_categories_are_what_model_and_optimiser_hold(device: bool) -> None:
    one = trainer()
    one.room = Room(settings="lower it")
    step(one, NextToken())
    one.forward_backward(RandomBatches().batch(2, rank=0, world=1), NextToken())
    with pytest.raises(MachineError) as caught:
        one.forward_backward(RandomBatches().batch(2, rank=0, world=1), Full(device=device))
    said = str(caught.value)
    found = re.fullmatch(
        r"trainer 0: memory of cpu ran out in step 2, with weights ([\d,]+) bytes, gradients "
        r"([\d,]+), moments ([\d,]+), and activations, caches and all else ([\d,]+) of a peak of "
        r"([\d,]+); lower it \((.*)\)",
        said,
    )
    assert found is not None, said
    weights, gradients, moments, rest, peak = (int(n.replace(",", "")) for n in found.groups()[:5])
    parameters = sum(p.numel() for p in one.model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in one.model.buffers())
    assert weights == 4 * parameters + buffers
    assert gradients == 4 * parameters
    # Two averages in bfloat16, and each parameter's own count of steps.
    assert moments == 4 * parameters + 4 * len(list(one.model.parameters()))
    assert weights + gradients + moments + rest == peak
    expected = "CUDA out of memory" if device else "DefaultCPUAllocator: can't allocate memory"
    assert expected in found[6]


def test_a_peak_below_its_parts_leaves_nothing_to_the_rest() -> None:
    assert Held(4, 4, 4, peak=10).rest == 0
    one = trainer()
    assert held_by(one.model, one.optimizer, 10).gradients == 0


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError(CUDA_SAYS), True),
        (RuntimeError("NPU out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"), True),
        (RuntimeError("Connection closed by peer"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_allocators_are_told_from_others(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) == is_one


def test_another_error_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(Trainer, "_over_ranks", lost)
    with pytest.raises(RuntimeError, match=r"^Connection closed by peer$"):
        step(trainer(), NextToken())


def test_a_model_that_does_not_fit_is_told_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Transformer, "initialize", lambda *_: asks_for_too_much())
    count = f"{TINY.parameters():,}"
    with pytest.raises(MachineError, match=f"while a model of {count} parameters was made"):
        trainer()


def test_a_device_that_can_has_its_blocks_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, one, device = Output(str(tmp_path), "trainer"), trainer(), torch.device("cuda")

    def dump(path: str) -> None:
        Path(path).write_bytes(b"blocks")

    there = SimpleNamespace(memory=SimpleNamespace(_dump_snapshot=dump))
    monkeypatch.setattr(torch, "get_device_module", lambda _: there)
    path = tmp_path / "trainer-1.memory.pickle"
    assert memory._write_snapshot(device, output, 1) == path
    assert path.read_bytes() == b"blocks"
    monkeypatch.setattr(memory, "_write_snapshot", lambda *_: path)
    one.room = Room(output)
    with pytest.raises(MachineError, match=re.escape(f"; a snapshot of its memory is in {path}")):
        step(one, Full())


@pytest.mark.parametrize(
    "there",
    [
        SimpleNamespace(),
        SimpleNamespace(memory=SimpleNamespace()),
        SimpleNamespace(memory=SimpleNamespace(_dump_snapshot=lambda path: [][1])),
    ],
    ids=["no memory", "no snapshot", "a snapshot that fails"],
)
def test_one_that_cannot_has_none(
    there: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda _: there)
    output = Output(str(tmp_path), "trainer")
    assert memory._write_snapshot(torch.device("cuda"), output, 1) is None


def test_a_pool_says_it_as_itself(machines: ClusterConfig, tmp_path: Path) -> None:
    save_pretrained(random_model(), tmp_path / "start")
    spec = TrainerSpec(
        optim=OPTIM,
        balance=BALANCE,
        precision="high",
        seed=0,
        reference=False,
        less_memory="raise posttrain.minibatches",
    )
    one, supply = machines.model_copy(update={"trainers": 1}), local(tmp_path)
    with open_trainers(
        one, tmp_path / "start", spec, logs=tmp_path / "logs", supply=supply
    ) as pool:
        with pytest.raises(MachineError, match=r"^trainer 0: memory of cpu ran out") as caught:
            pool.forward_backward(RandomBatches().batch(1, rank=0, world=1), Full(device=True))
        assert type(caught.value) is MachineError
        assert "; raise posttrain.minibatches (CUDA out of memory)" in str(caught.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_what_was_saved_before_it_stays(machines: ClusterConfig, tmp_path: Path) -> None:
    folders = str(tmp_path), str(tmp_path / "ray")
    with pytest.raises(MachineError, match=r"^trainer 1: memory of cpu ran out in step 5, with"):
        fit(job(tmp_path, Full(begin=5), precision="high"), machines, *folders)
    found = latest(Path(saves(tmp_path)))
    assert found is not None
    assert found[1] == 4
    # The same command goes on from there.
    assert fit(job(tmp_path, NextToken(), precision="high"), machines, *folders).name.endswith("7")
    steps = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, STEPS + 1))
