"""A rank's part of a model: which stored tensors it reads, and that nobody trains a reference."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cluster import models
from cluster.backend import CPU
from cluster.models import build_model, experts_here, frozen
from cluster.trainer import build_trainer
from configs.errors import ArtifactError
from configs.train import BalanceConfig
from model.dispatch import LocalDispatcher
from model.weights.families import to_hf
from model.weights.files import read_tensors, save_pretrained
from tests.cluster.jobs import OPTIM
from tests.references import TINY, random_model


class SecondHalf(LocalDispatcher):
    """That of the second of two ranks."""

    def experts(self, layer: str) -> tuple[int, ...]:
        """The upper half."""
        every = super().experts(layer)
        return every[len(every) // 2 :]


class Watched(Mapping[str, Tensor]):
    """Stored tensors, and which of them were read."""

    def __init__(self, stored: Mapping[str, Tensor]) -> None:
        self.stored, self.read = stored, set[str]()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return self.stored[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def __contains__(self, name: object) -> bool:
        return name in self.stored


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the second of two ranks."""
    monkeypatch.setattr(models, "LocalDispatcher", SecondHalf)


@pytest.mark.usefixtures("second")
def test_a_rank_reads_its_own_experts_and_no_other(tmp_path: Path) -> None:
    whole = random_model()
    save_pretrained(whole, tmp_path)
    stored = Watched(read_tensors(tmp_path))
    part = frozen(TINY, stored, precision="high")
    local = experts_here(part)
    assert local
    experts = TINY.n_routed_experts
    others = {f".experts.{expert}." for expert in range(experts // 2)}
    assert not [name for name in stored.read if any(one in name for one in others)]
    unread = [name for name in stored if name not in stored.read]
    assert len(unread) == len(local) * 3 * (experts // 2)
    expected = whole.state_dict()
    for name, tensor in part.state_dict().items():
        mine = local.get(name.rpartition(".")[0])
        wanted = expected[name] if mine is None else expected[name][list(mine)]
        assert torch.equal(tensor, wanted), name


@pytest.mark.usefixtures("second")
def test_a_missing_expert_of_another_rank_is_an_error_all_the_same() -> None:
    tensors = to_hf(TINY, random_model().state_dict())
    name = next(name for name in tensors if ".experts.0." in name)
    del tensors[name]
    with pytest.raises(ArtifactError, match=name):
        frozen(TINY, tensors, precision="high")


def test_a_reference_has_no_gradients_and_answers_as_the_model_does() -> None:
    whole = random_model()
    asked = frozen(TINY, to_hf(TINY, whole.state_dict()), precision="high", backend=CPU)
    assert not any(parameter.requires_grad for parameter in asked.parameters())
    assert not asked.training
    tokens = torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        assert torch.equal(asked(tokens), whole.eval()(tokens))


def test_a_model_is_told_what_its_device_computes_in() -> None:
    row = replace(CPU, compute=torch.bfloat16)
    model, computing = build_model(TINY, precision="high", backend=row)
    assert computing.numerics.compute == torch.bfloat16
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    trainer = build_trainer(
        TINY, optim=OPTIM, balance=BalanceConfig(), precision="high", seed=0, backend=row
    )
    assert trainer.numerics.compute == torch.bfloat16
    assert trainer.news()["tags"]["compute"] == "bfloat16"
