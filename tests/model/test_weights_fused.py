"""What servers load into one block-scaled matrix, against a reader that does as they do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from configs.model import ModelConfig, V3Config, V4Config, V32Config
from model.transformer import Transformer
from model.weights.config import table_of
from model.weights.families import fused, narrowest, to_hf
from model.weights.files import save_pretrained
from model.weights.reading import WEIGHTS
from tests.references import TINY, TINY_V4, TINY_V32, random_model, tiny, tiny_v4, tiny_v32

ATTENTION = "model.layers.0.self_attn"
BLOCK = 128


def names_of(config: ModelConfig) -> list[str]:
    return list(to_hf(config, random_model(config).state_dict()))


def named(config: ModelConfig) -> list[str]:
    return [f"{name} = {rows}" for name, rows in config.ragged_rows.items()]


def as_served(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The fused matrix [R, C] as vLLM's loader makes it and its kernel reads it.

    Rows lie one matrix after the other, and scales where the rows begin in whole blocks; a row's
    scale is found by its number alone.
    """
    rows = sum(len(values) for values, _ in parts)
    values = torch.cat([values.float() for values, _ in parts])
    grid = torch.ones(-(-rows // BLOCK), parts[0][1].shape[1])
    offset = 0
    for part, scales in parts:
        begin = -(-offset // BLOCK)
        grid[begin : begin + -(-len(part) // BLOCK)] = scales.float()
        offset += len(part)
    for row in range(rows):
        for column in range(values.shape[1]):
            values[row, column] *= grid[row // BLOCK, column // BLOCK]
    return values


def wrong_rows(config: ModelConfig, folder: Path, group: tuple[str, ...]) -> tuple[int, int]:
    """(rows that a server computes with another block's scale, rows) of one fused matrix."""
    save_pretrained(random_model(config), folder, dtype="float8")
    stored = load_file(folder / WEIGHTS)
    scale_name = table_of(config).scale_name
    parts = [(stored[name], stored[scale_name(name)]) for name in group]
    meant = torch.cat(
        [
            part.float()
            * scales.float()
            .repeat_interleave(BLOCK, 0)[: len(part)]
            .repeat_interleave(BLOCK, 1)[:, : part.shape[1]]
            for part, scales in parts
        ]
    )
    differs = (as_served(parts) != meant).any(1)
    return int(differs.sum()), len(differs)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            TINY,
            [
                *[
                    (f"model.layers.{n}.self_attn", "q_a_proj", "kv_a_proj_with_mqa")
                    for n in (0, 1)
                ],
                ("model.layers.2.self_attn", "q_a_proj", "kv_a_proj_with_mqa"),
                ("model.layers.0.mlp", "gate_proj", "up_proj"),
                *[
                    (f"model.layers.{n}.mlp.{block}", "gate_proj", "up_proj")
                    for n in (1, 2)
                    for block in ("shared_experts", *[f"experts.{e}" for e in range(8)])
                ],
            ],
        ),
        (
            TINY_V4,
            [
                *[(f"{layer}.attn", "wq_a", "wkv") for layer in [f"layers.{n}" for n in range(4)]],
                ("mtp.0.attn", "wq_a", "wkv"),
                *[
                    (f"{layer}.ffn.{block}", "w1", "w3")
                    for layer in (*[f"layers.{n}" for n in range(4)], "mtp.0")
                    for block in ("shared_experts", *[f"experts.{e}" for e in range(8)])
                ],
            ],
        ),
    ],
    ids=["v3", "v4"],
)
def test_fused_are_whole_groups_in_the_order_of_their_rows(
    config: ModelConfig, expected: list[tuple[str, str, str]]
) -> None:
    found = fused(config, names_of(config))
    wanted = {tuple(f"{prefix}.{one}.weight" for one in modules) for prefix, *modules in expected}
    assert len(found) == len(wanted)
    assert set(found) == wanted
    assert all(narrowest(config, name) == "float8" for group in found for name in group)


def test_the_indexer_of_v32_is_fused_with_nothing() -> None:
    assert fused(TINY_V32, names_of(TINY_V32)) == fused(TINY, names_of(TINY))


def test_a_group_of_which_one_is_not_there_is_left_out() -> None:
    without = tiny(q_lora_rank=None)
    assert not [group for group in fused(without, names_of(without)) if "self_attn" in group[0]]
    names = [name for name in names_of(TINY) if name != "model.layers.0.mlp.up_proj.weight"]
    assert len(fused(TINY, names)) == len(fused(TINY, names_of(TINY))) - 1
    assert fused(TINY, []) == []
    assert fused(TINY, [f"{ATTENTION}.q_a_proj.weight_scale_inv"]) == []


def test_nothing_within_a_compressor_is_fused() -> None:
    inner = "layers.1.attn.compressor"
    assert f"{inner}.wkv.weight" in names_of(TINY_V4)
    assert fused(TINY_V4, [f"{inner}.wq_a.weight", f"{inner}.wkv.weight"]) == []


@pytest.mark.parametrize(
    ("rank", "expected", "reasons"),
    [
        (64, (64, 144), ["q_lora_rank = 64"]),
        (128, (0, 208), []),
        (200, (56, 280), ["q_lora_rank = 200"]),
    ],
)
def test_a_bottleneck_that_ends_within_a_block_gives_rows_another_blocks_scale(
    rank: int, expected: tuple[int, int], reasons: list[str], tmp_path: Path
) -> None:
    config = tiny(
        q_lora_rank=rank,
        kv_lora_rank=64,
        qk_rope_head_dim=16,
        intermediate_size=128,
        moe_intermediate_size=128,
    )
    group = (f"{ATTENTION}.q_a_proj.weight", f"{ATTENTION}.kv_a_proj_with_mqa.weight")
    assert group in fused(config, names_of(config))
    assert wrong_rows(config, tmp_path, group) == expected
    assert named(config) == reasons


WHOLE = {"q_lora_rank": 128, "intermediate_size": 256, "moe_intermediate_size": 128}
WHOLE_V4 = {"q_lora_rank": 128, "moe_intermediate_size": 128}


@pytest.mark.parametrize(
    ("config", "reasons"),
    [
        (V3Config(num_hidden_layers=4), []),
        (V32Config(family="v32", num_hidden_layers=4), []),
        (V4Config(family="v4", num_hidden_layers=4, compress_ratios=(0, 0, 4, 128)), []),
        (tiny(**WHOLE), []),
        (tiny_v32(**WHOLE), []),
        (tiny_v4(**WHOLE_V4), []),
        (tiny(**WHOLE | {"q_lora_rank": None}), []),
        (tiny(**WHOLE | {"q_lora_rank": 192}), ["q_lora_rank = 192"]),
        (tiny_v32(**WHOLE | {"q_lora_rank": 64}), ["q_lora_rank = 64"]),
        (tiny_v4(**WHOLE_V4 | {"q_lora_rank": 64}), ["q_lora_rank = 64"]),
        (tiny_v4(**WHOLE_V4 | {"moe_intermediate_size": 32}), ["moe_intermediate_size = 32"]),
        (tiny(**WHOLE | {"moe_intermediate_size": 32}), ["moe_intermediate_size = 32"]),
        (
            tiny(**WHOLE | {"moe_intermediate_size": 32, "n_shared_experts": 3}),
            [
                "moe_intermediate_size = 32",
                "n_shared_experts * moe_intermediate_size = 96",
            ],
        ),
        (
            tiny(**WHOLE | {"moe_intermediate_size": 64, "n_shared_experts": 2}),
            ["moe_intermediate_size = 64"],
        ),
        (tiny(**WHOLE | {"intermediate_size": 160}), ["intermediate_size = 160"]),
        # Without a dense layer its width means nothing; the MTP layer has experts as well.
        (tiny(**WHOLE | {"intermediate_size": 160, "first_k_dense_replace": 0}), []),
        (
            tiny(**WHOLE | {"moe_intermediate_size": 32, "first_k_dense_replace": 2}),
            ["moe_intermediate_size = 32"],
        ),
        (
            tiny(
                **WHOLE
                | {
                    "moe_intermediate_size": 32,
                    "first_k_dense_replace": 2,
                    "num_nextn_predict_layers": 0,
                }
            ),
            [],
        ),
    ],
)
def test_fields_that_fp8_in_servers_forbids_are_named(config: Any, reasons: list[str]) -> None:
    assert sorted(named(config)) == reasons
    # The fields name just those matrices that others of a group follow within a block.
    with torch.device("meta"):
        stored = to_hf(config, Transformer(config).state_dict())
    heights = {len(stored[name]) for group in fused(config, stored) for name in group[:-1]}
    assert set(config.ragged_rows.values()) == {rows for rows in heights if rows % BLOCK}


def test_experts_that_end_within_a_block_are_as_wrong(tmp_path: Path) -> None:
    config = tiny(**WHOLE | {"moe_intermediate_size": 32})
    prefix = "model.layers.1.mlp.experts.0"
    group = (f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight")
    wrong, rows = wrong_rows(config, tmp_path, group)
    assert rows == 64
    assert wrong > 0
