"""Rotary positions against complex multiplication, and YaRN against transformers' frequencies."""

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from configs.model import YarnConfig
from model.rope import (
    rotary_table,
    rotate,
    rotate_halves,
    rotate_tail,
    shared_rotary_table,
    softmax_factor,
)
from tests.references import rotate_as_complex


def test_pairs_turn_like_complex_numbers() -> None:
    x_SR = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    found = rotate(x_SR, rotary_table(12, 500.0, 40), torch.arange(40))
    expected = rotate_as_complex(x_SR, 500.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_scores_depend_on_the_distance_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(8, generator=generator), torch.randn(8, generator=generator)
    table = rotary_table(8, 10000.0, 64)

    def score(query_position: int, key_position: int) -> float:
        turned = [
            rotate(x, table, torch.tensor(position))
            for x, position in ((q, query_position), (k, key_position))
        ]
        return float(turned[0] @ turned[1])

    assert abs(score(5, 2) - score(33, 30)) < 1e-5
    assert abs(score(5, 2) - score(5, 3)) > 1e-3


def test_rows_and_heads_may_have_positions_of_their_own() -> None:
    x_BSHR = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(2))
    table = rotary_table(8, 10000.0, 16)
    positions_BS = torch.tensor([[0, 1, 2], [7, 8, 9]])
    found = rotate(x_BSHR, table, positions_BS.unsqueeze(-1))
    for b in range(2):
        for s in range(3):
            for h in range(4):
                alone = rotate(x_BSHR[b, s, h], table, positions_BS[b, s])
                torch.testing.assert_close(found[b, s, h], alone, rtol=0, atol=0)


def test_half_split_pairs_turn_as_interleaved_ones_do() -> None:
    x_SR = torch.randn(40, 12, generator=torch.Generator().manual_seed(3))
    found = rotate_halves(x_SR, rotary_table(12, 500.0, 40), torch.arange(40))
    interleaved_SR = torch.stack([x_SR[:, :6], x_SR[:, 6:]], dim=-1).flatten(1)
    expected = rotate_as_complex(interleaved_SR, 500.0).unflatten(1, (6, 2))
    torch.testing.assert_close(found[:, :6].double(), expected[..., 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[:, 6:].double(), expected[..., 1], rtol=1e-5, atol=1e-5)


def test_the_inverse_turns_back() -> None:
    x_SR = torch.randn(40, 12, generator=torch.Generator().manual_seed(4))
    table, positions = rotary_table(12, 500.0, 40), torch.arange(40)
    turned = rotate(x_SR, table, positions)
    torch.testing.assert_close(rotate(turned, table, positions, inverse=True), x_SR)
    assert not torch.allclose(turned, x_SR)


@pytest.mark.parametrize(
    "yarn",
    [
        YarnConfig(),
        YarnConfig(mscale=0.707, mscale_all_dim=0.5),
        YarnConfig(mscale=0.0, mscale_all_dim=0.0),
        YarnConfig(mscale=1.0, mscale_all_dim=0.0),
        YarnConfig(factor=4.0, original_max_position_embeddings=32, beta_fast=2.0, beta_slow=0.5),
    ],
)
@pytest.mark.parametrize("width", [8, 64])
def test_yarn_is_transformers_yarn(yarn: YarnConfig, width: int) -> None:
    given = {name: value for name, value in yarn.model_dump().items() if value}
    config = DeepseekV3Config(
        qk_rope_head_dim=width,
        max_position_embeddings=int(yarn.factor * yarn.original_max_position_embeddings),
        rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0} | given,
    )
    rates, magnitude = ROPE_INIT_FUNCTIONS["yarn"](config)
    angles = torch.outer(torch.arange(50).double(), rates.double())
    expected = torch.cat([angles.cos(), angles.sin()], dim=1) * magnitude
    # Their frequencies are rounded to float32: 50 rad of 6e-8 each.
    found = rotary_table(width, 10000.0, 50, yarn).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_yarn_widens_the_released_models_softmax_by_the_papers_number() -> None:
    """m^2 with m = 0.1 ln 40 + 1 (DeepSeek-V3, section 4.3)."""
    assert softmax_factor(YarnConfig()) == pytest.approx(1.87386, abs=1e-5)
    assert softmax_factor(YarnConfig(mscale_all_dim=0.0)) == 1.0
    assert softmax_factor(None) == 1.0


def test_only_the_last_dims_turn_and_turning_back_undoes_it() -> None:
    table = rotary_table(6, 100.0, 20)
    x_BSHW = torch.randn(2, 20, 3, 11, generator=torch.Generator().manual_seed(0)).double()
    x_BSHW.requires_grad_()
    positions = torch.arange(20)
    turned = rotate_tail(x_BSHW, table, positions.unsqueeze(-1))
    assert torch.equal(turned[..., :5], x_BSHW[..., :5])
    expected = rotate(x_BSHW[..., 5:], table, positions.unsqueeze(-1))
    torch.testing.assert_close(turned[..., 5:], expected)
    back = rotate_tail(turned, table, positions.unsqueeze(-1), inverse=True)
    torch.testing.assert_close(back, x_BSHW, rtol=0, atol=1e-6)
    assert torch.autograd.gradcheck(
        lambda x: rotate_tail(x, table, positions.unsqueeze(-1)),
        (x_BSHW,),
        eps=1e-6,
        atol=1e-6,
        fast_mode=True,
    )


def test_layers_share_one_table_which_grows_with_what_they_read() -> None:
    def table(positions: int) -> torch.Tensor:
        return shared_rotary_table(8, 31337.0, positions, None, torch.device("cpu"))

    with torch.inference_mode():
        small = table(5)
    assert table(1024) is small
    assert len(table(1025)) == 2048
    torch.testing.assert_close(table(1025)[:1024], small, rtol=0, atol=0)
    # Made in inference mode, and yet fit to be saved for a backward pass.
    x_SW = torch.zeros(4, 8, requires_grad=True)
    rotate_tail(x_SW, small, torch.arange(4)).sum().backward()
    assert x_SW.grad is not None
