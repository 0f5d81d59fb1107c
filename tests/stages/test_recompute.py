"""What a layer computes a second time changes no bit and no count, and is not kept meanwhile."""

from typing import Any

import pytest
import torch
from torch import Tensor

from configs.parallel import Recompute
from configs.train import Precision
from tests.layouts import MODELS, Layout, loss, rows, trainer
from tests.memory import saved_tensors

ONE = Layout()


def two_steps(name: str, precision: Precision, recompute: Recompute) -> dict[str, Any]:
    """Reports, FP8's tallies of the first, and the weights afterwards."""
    one = trainer(name, ONE, precision=precision, recompute=recompute)
    first = one.train_step(rows(1, ONE, 0), loss(name), 1e-2, counting=precision == "fp8")
    tallies = one.fp8_tallies()
    second = one.train_step(rows(2, ONE, 0), loss(name), 1e-2)
    return {"reports": [first, second], "tallies": tallies, "weights": dict(one.named)}


@pytest.mark.parametrize("precision", ["high", "fp8"])
@pytest.mark.parametrize("name", MODELS)
def test_no_bit_and_no_count_changes(name: str, precision: Precision) -> None:
    plain = two_steps(name, precision, "none")
    assert (precision == "fp8") == bool(plain["tallies"])
    for recompute in ("attention", "all"):
        found = two_steps(name, precision, recompute)
        assert found["reports"] == plain["reports"]
        assert found["tallies"] == plain["tallies"]
        for parameter, tensor in plain["weights"].items():
            assert torch.equal(found["weights"][parameter], tensor), parameter


def kept_values(name: str, recompute: Recompute) -> int:
    """Values that wait for the backward pass outside of what is recomputed."""
    one = trainer(name, ONE, recompute=recompute)
    own = {id(tensor) for tensor in (*one.model.parameters(), *one.model.buffers())}
    with saved_tensors() as saved:
        one._forward(rows(1, ONE, 0), loss(name), loss(name).counts(rows(1, ONE, 0)))
    once: dict[int, Tensor] = {id(tensor): tensor for tensor in saved if id(tensor) not in own}
    return sum(tensor.numel() for tensor in once.values() if tensor.is_floating_point())


@pytest.mark.parametrize("name", MODELS)
def test_the_more_is_computed_again_the_less_is_kept(name: str) -> None:
    none, attention, everything = (
        kept_values(name, recompute) for recompute in ("none", "attention", "all")
    )
    assert everything < attention < none


def test_what_is_exchanged_is_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    one = trainer("v3", ONE, recompute="all")
    sent: list[str] = []
    dispatcher = one.blocks[0].dispatcher
    send = dispatcher.send

    def counted(routed: Any) -> Any:
        sent.append(routed.layer)
        return send(routed)

    monkeypatch.setattr(dispatcher, "send", counted)
    one.train_step(rows(1, ONE, 0), loss("v3"), 1e-2)
    assert len(sent) == len(one.blocks)
