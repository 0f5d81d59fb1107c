"""Gradients reach their owners and weights come back, whatever a backward pass reaches."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.backend import CPU
from cluster.groups import Groups
from cluster.trainer import Trainer, build_trainer, cast_only
from model.transformer import Transformer
from tests.cluster.jobs import OPTIM, NextToken, RandomBatches
from tests.layouts import BALANCE, MODELS, Layout, loss, rows
from tests.ranks import on_ranks
from tests.references import TINY

PAIR = Layout(2)
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


@pytest.mark.parametrize("name", ["v3", "v4"])
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


class Half(NextToken):
    """Only the next token, so that the MTP layer learns nothing."""

    @property
    def ahead(self) -> bool:
        """Not predicted."""
        return False

    def __call__(self, predicted: Any, batch: Any, totals: Any) -> Any:
        """The mean square of the logits."""
        return predicted.next_BSV.square().mean((1, 2)).sum() / totals["sequences"], {}


def in_turn(of: int) -> list[dict[str, Any]]:
    """Steps of two losses in turn, in halves and at once, and what this rank owns then."""

    def trained(one: Trainer, *, halves: bool) -> dict[str, Any]:
        reports = []
        for step in range(1, 5):
            batch = RandomBatches().batch(step, rank=one.rank, world=one.world)
            asked = Half() if step % 2 else NextToken()
            if halves:
                # As post-training does: the gradients of two calls add up.
                one.forward_backward(batch, asked)
                one.forward_backward(batch, asked)
                reports.append(one.optim_step(1e-3))
            else:
                reports.append(one.train_step(batch, asked, 1e-3))
        held = {n: p.grad is not None for n, p in one.named.items()}
        assert not any(held.values())
        return {"reports": reports, "state": {n: t.clone() for n, t in one.state().items()}}

    settings: dict[str, Any] = {"optim": OPTIM, "balance": BALANCE, "precision": "high", "seed": 0}
    groups = Groups.of_world(1, seconds=60) if of > 1 else None
    return [
        trained(build_trainer(TINY, groups=groups, **settings), halves=halves)
        for halves in (False, True)
    ]


def test_layers_that_learn_in_turn_and_gradients_of_two_calls(tmp_path: Path) -> None:
    ranks = on_ranks(2, tmp_path, in_turn, 2)
    for number, alone in enumerate(in_turn(1)):
        found = {n: t for rank in ranks for n, t in rank[number]["state"].items()}
        assert found.keys() == alone["state"].keys()
        for report, wanted in zip(ranks[0][number]["reports"], alone["reports"], strict=True):
            assert report["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
        for name, tensor in alone["state"].items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=5e-5, msg=name)
