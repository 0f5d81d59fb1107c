"""What is said of a loss or gradient that is not finite: where it was so first."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cluster import trainer as trainers
from cluster.trainer import Trainer, build_trainer
from configs.errors import TrainingError
from configs.train import BalanceConfig
from model.passes import Attended
from tests.cluster.jobs import OPTIM, NextToken, RandomBatches
from tests.ranks import on_ranks
from tests.references import TINY

RATE = 0.01


def trainer() -> Trainer:
    balance = BalanceConfig(bias_update_speed=0.01)
    return build_trainer(TINY, optim=OPTIM, balance=balance, precision="high", seed=0)


def told(one: Trainer, loss: NextToken, *, in_one: bool = True) -> str:
    """What a step says, which must leave weights and counts as they were."""
    before = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    batch = RandomBatches().batch(1, rank=one.rank, world=one.world)
    with pytest.raises(TrainingError) as caught:
        if in_one:
            one.train_step(batch, loss, RATE)
        one.forward_backward(batch, loss)
        one.optim_step(RATE)
    after = one.model.state_dict()
    assert all(
        torch.equal(a.nan_to_num(), before[name].nan_to_num())
        for name, a in after.items()
        if a.is_floating_point()
    )
    assert one.step == 0
    # Of the pass itself: the search for what was not finite counts nothing.
    copies = batch["tokens"].numel() * TINY.num_experts_per_tok
    assert one.load_LE.sum(1).tolist() == [copies] * len(one.blocks)
    return str(caught.value)


class Spoiling(torch.autograd.Function):
    """The same forward; backward gives infinity."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0] * math.inf


def spoilt_backward(one: Trainer) -> Trainer:
    """It, with gradients that are not finite from the output of a layer's attention on."""

    def spoil(module: nn.Module, given: object, made: Attended) -> Attended:
        spoilt: Tensor = Spoiling.apply(made[0])  # type: ignore[no-untyped-call]
        return spoilt, made[1]

    one.model.get_submodule("model.layers.1.self_attn").register_forward_hook(spoil)
    return one


@pytest.mark.parametrize("in_one", [True, False], ids=["train_step", "two halves"])
def test_the_first_output_that_is_not_finite_is_named_with_its_weights(in_one: bool) -> None:
    one = trainer()
    name = "model.layers.1.mlp.experts"
    with torch.no_grad():
        one.model.get_parameter(f"{name}.down_proj").fill_(math.nan)
    said = told(one, NextToken(), in_one=in_one)
    assert said.startswith("step 1: not finite: loss nan, next nan, first out of ")
    assert said.endswith(
        f"first out of {name}, whose weights are not finite; lower the learning rate, or look at "
        "the batch"
    )


def test_an_output_is_told_from_weights() -> None:
    one = trainer()
    norm = "model.layers.1.post_attention_layernorm"
    one.model.get_submodule(norm).register_forward_hook(lambda *told: told[2] * math.inf)
    assert f", first out of {norm}; lower" in told(one, NextToken())


def test_weights_that_no_module_of_theirs_multiplies_are_named() -> None:
    one = trainer()
    with torch.no_grad():
        one.model.lm_head.weight[0, 0] = math.nan
    assert ", first in the weights lm_head.weight; lower" in told(one, NextToken())


def test_a_loss_that_spoils_what_is_finite_is_told_of() -> None:
    said = told(trainer(), NextToken(scale=math.nan))
    assert ", first in the loss itself: what modules return is finite; lower" in said


@pytest.mark.parametrize("in_one", [True, False], ids=["train_step", "two halves"])
def test_the_first_gradient_that_is_not_finite_is_named(in_one: bool) -> None:
    said = told(spoilt_backward(trainer()), NextToken(), in_one=in_one)
    assert "not finite: grad_norm nan, first in the gradient of " in said
    # All above it are finite, and all below are not: this one is gone back through first.
    assert "model.layers.1.self_attn.o_proj.weight; lower" in said


def test_a_gradient_that_was_spoilt_by_hand_is_named() -> None:
    one = trainer()
    one.forward_backward(RandomBatches().batch(1, rank=0, world=1), NextToken())
    name = "model.layers.1.mlp.shared_experts.down_proj.weight"
    gradient = one.model.get_parameter(name).grad
    assert gradient is not None
    gradient[0, 0] = math.inf
    with pytest.raises(TrainingError, match=f"grad_norm inf, first in the gradient of {name}; "):
        one.optim_step(RATE)


def test_a_good_step_is_run_once_and_without_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(model: nn.Module) -> None:
        raise AssertionError("a good step is not looked into")

    monkeypatch.setattr(trainers, "watched", never)
    one = trainer()
    one.train_step(RandomBatches().batch(1, rank=0, world=1), NextToken(), RATE)
    assert one.given is None


def blame(name: str, backward: bool) -> str:
    """What a rank says where rank 1 alone has what is not finite."""
    one = trainer()
    if one.rank == 1 and not backward:
        with torch.no_grad():
            one.model.get_parameter(name).fill_(math.nan)
    if one.rank == 1 and backward:
        spoilt_backward(one)
    return told(one, NextToken())


@pytest.mark.parametrize(
    ("backward", "name", "said"),
    [
        (
            False,
            "model.layers.1.mlp.experts.gate_up_proj",
            "out of model.layers.1.mlp.experts, whose weights are not finite",
        ),
        (True, "", "in the gradient of model.layers.1.self_attn.o_proj.weight"),
    ],
    ids=["forward", "backward"],
)
def test_all_ranks_say_the_same_of_what_one_of_them_has(
    backward: bool, name: str, said: str, tmp_path: Path
) -> None:
    first, second = on_ranks(2, tmp_path, blame, name, backward)
    assert first == second
    assert f", first {said}; lower" in first
