"""Gradients reach their owners and weights come back, whatever a backward pass reaches."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.backend import CPU
from cluster.groups import Groups
from cluster.models import build_model, cast_only
from cluster.trainer import Trainer, build_trainer, parted
from configs.errors import TrainingError
from model.transformer import Transformer
from model.weight_gradients import later
from stages.pretrain.objective import PretrainLoss
from tests.cluster.jobs import OPTIM
from tests.layouts import BALANCE, MODELS, Layout, loss, rows, trainer
from tests.ranks import on_ranks
from tests.references import TINY

PAIR = Layout(2)
COPIES = Layout(2, ep=1)
BFLOAT16 = replace(CPU, compute=torch.bfloat16)


def narrow_and_wide(name: str) -> list[dict[str, Any]]:
    """Three steps in bfloat16, with weights sent in what is read of them and as they are."""
    told = []
    for narrow in (True, False):
        one = build_trainer(
            MODELS[name][0],
            optim=OPTIM,
            balance=BALANCE,
            precision="high",
            seed=0,
            backend=BFLOAT16,
            groups=Groups.of_world(seconds=60),
        )
        assert one.narrow
        if not narrow:
            one.narrow = {}
        reports = [
            one.train_step(rows(step, PAIR, one.rank), loss(name), 1e-2) for step in (1, 2, 3)
        ]
        sent = one.telemetry["reduction/weight_bytes"]
        told.append({"reports": reports, "state": one.state(), "bytes": sent})
    return told


@pytest.mark.parametrize("name", ["v3", pytest.param("v4", marks=pytest.mark.slow)])
def test_narrow_copies_of_weights_change_no_bit(name: str, tmp_path: Path) -> None:
    for narrow, wide in on_ranks(2, tmp_path, narrow_and_wide, name):
        assert narrow["reports"] == wide["reports"]
        for parameter, tensor in wide["state"].items():
            assert torch.equal(narrow["state"][parameter], tensor), parameter
        assert narrow["bytes"] < 0.75 * wide["bytes"]


def test_what_fp8_quantises_and_gates_read_is_sent_as_it_is() -> None:
    wanted = Transformer(TINY, precision="fp8").numerics
    model = Transformer(TINY, precision=BFLOAT16.numerics(wanted))
    sent = cast_only(model)
    assert "lm_head.weight" in sent
    assert not any("mlp" in name or "self_attn" in name or "norm" in name for name in sent)


@dataclass(frozen=True)
class NextAlone(PretrainLoss):
    """Only the next token, so that the MTP layer learns nothing."""

    @property
    def ahead(self) -> bool:
        """Not predicted."""
        return False


LOSSES = {
    "all": loss("v3.2"),
    "next": NextAlone(0.3, 0.05, attend_across_documents=False, indexer="sparse"),
    "idle": NextAlone(0.3, 0.05, attend_across_documents=False, indexer="off"),
}
"""`idle` reaches some parameters of each layer and not others: its indexer's."""
CALLS = [
    ("all",),
    ("idle",),
    ("all",),
    ("all", "idle"),
    ("next", "all"),
    ("idle", "all", "all"),
    ("idle",),
]
"""The losses of each step, whose gradients add up."""


def in_turn(of: int) -> dict[str, Any]:
    """Steps of several losses, and what this rank owns then."""
    layout = Layout(of, ep=1)
    one = trainer("v3.2", layout)
    reports = []
    for step, calls in enumerate(CALLS, 1):
        if calls == ("all",):
            # In parts: layers are complete before the last part has come to all of them.
            batch = rows(step, layout, one.rank)
            reports.append(one.train_step(batch, LOSSES["all"], 1e-3, micro_batches=2))
            continue
        for name in calls:
            one.forward_backward(rows(step, layout, one.rank), LOSSES[name])
            held = {n for n, p in one.named.items() if p.grad is not None}
            assert all(one.owners.mine(n) for n in held)
        reports.append(one.optim_step(1e-3))
        assert not any(p.grad is not None for p in one.named.values())
        assert not one.reduction.learnt
    return {"reports": reports, "state": {n: t.clone() for n, t in one.state().items()}}


def test_losses_that_reach_different_parameters_in_turn_and_together(tmp_path: Path) -> None:
    alone = in_turn(1)
    ranks = on_ranks(2, tmp_path, in_turn, 2)
    found = {n: t for rank in ranks for n, t in rank["state"].items()}
    assert found.keys() == alone["state"].keys()
    for report, wanted in zip(ranks[0]["reports"], alone["reports"], strict=True):
        assert report["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
        assert report.get("indexer_grad_norm", 0.0) == pytest.approx(
            wanted.get("indexer_grad_norm", 0.0), rel=1e-5
        )
    for name, tensor in alone["state"].items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=5e-5, msg=name)


def when_sent() -> list[list[str]]:
    """The layers whose reduction began within a backward pass without an indexer's loss, in the
    first and in the second; then all that travel."""
    one = trainer("v3.2", COPIES)
    told = []
    for step in (1, 2):
        batch = rows(step, COPIES, one.rank)
        counts = LOSSES["idle"].counts(batch)
        value, _ = one._forward(batch, LOSSES["idle"], counts)
        with one.reduction.within_backward():
            value.backward()
            told.append([layer for layer, left in one.reduction._waiting.items() if not left])
        one.optimizer.zero_grad()
        one.reduction.learnt = set()
    return told


def test_layers_travel_within_the_pass_though_a_part_of_them_learns_nothing(
    tmp_path: Path,
) -> None:
    for first, second in on_ranks(2, tmp_path, when_sent):
        assert not any("layers" in layer for layer in first)
        assert {"model.layers.0", "model.layers.1", "model.embed_tokens"} <= set(second)


def left_for_later(within: bool) -> list[Any]:
    """Whether gradients that were left reach their owners when they are made."""
    one = trainer("v3", COPIES)
    batch = rows(1, COPIES, one.rank)
    with later() as left:
        value, _ = one._forward(batch, loss("v3"), {"next": 9.0, "after_next": 9.0, "sequences": 8})
        with one.reduction.within_backward():
            value.backward()
            if within:
                left.flush()
    left.flush()
    try:
        one._gradients()
    except TrainingError as error:
        return [str(error), 0]
    return ["", sum(p.grad is not None for p in one.named.values())]


def test_gradients_that_are_made_too_late_are_refused(tmp_path: Path) -> None:
    good = on_ranks(2, tmp_path / "good", left_for_later, True)
    names = dict(Transformer(TINY).named_parameters())
    assert [told for told, _ in good] == ["", ""]
    assert sum(count for _, count in good) == len(names)
    for told, _ in on_ranks(2, tmp_path / "late", left_for_later, False):
        assert "is on a rank that does not own it" in told


def parts_left_for_later(of: int) -> dict[str, torch.Tensor]:
    """Gradients of two parts that are made when both have gone back, of what this rank owns."""
    layout = Layout(of, ep=1)
    one = trainer("v3", layout, exact=True)
    totals = {"next": 90.0, "after_next": 90.0, "sequences": 8.0}
    first, second = parted(rows(1, layout, one.rank), 2)
    with later() as left:
        one._forward(first, loss("v3"), totals)[0].backward()
        value, _ = one._forward(second, loss("v3"), totals)
        with one.reduction.within_backward():
            value.backward()
            left.flush()
    return {n: p.grad for n, p in one.named.items() if p.grad is not None}


def test_what_several_parts_left_is_added_up_by_owners(tmp_path: Path) -> None:
    found: dict[str, torch.Tensor] = {}
    for rank in on_ranks(2, tmp_path, parts_left_for_later, 2):
        assert not found.keys() & rank.keys()
        found |= rank
    wanted = parts_left_for_later(1)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        bound = 1e-9 * float(tensor.abs().max())
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=bound, msg=name)


def test_what_does_not_learn_is_let_alone(tmp_path: Path) -> None:
    assert on_ranks(2, tmp_path, with_a_frozen_part) == [True, True]


def with_a_frozen_part() -> bool:
    """Whether a training of a model with a frozen embedding leaves it as it is, on this rank."""
    groups = Groups.of_world(1, seconds=60)
    model, computing = build_model(TINY, precision="high", groups=groups)
    model.initialize(0).train()
    frozen = model.model.embed_tokens.weight.requires_grad_(False)
    before = frozen.clone()
    one = Trainer(model, computing, optim=OPTIM, balance=BALANCE, groups=groups)
    one.train_step(rows(1, COPIES, one.rank), loss("v3"), 1e-2)
    return torch.equal(frozen, before)
