"""Rotary fields of `config.json` in every form: read as transformers turns them, or refused."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV4Config, DeepseekV32Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3RotaryEmbedding,
    yarn_apply_mscale,
)
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32RotaryEmbedding

from configs.errors import ArtifactError
from configs.model import V4Config, YarnConfig
from model.rope import rotary_table, softmax_factor
from model.weights.config import from_hf_config, to_hf_config
from tests.references import tiny, tiny_v4, tiny_v32

POSITIONS = 50
LENGTHS = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
STRETCH = {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8, "beta_slow": 1}
YARN = {"type": "yarn", **STRETCH}
TYPED = {"rope_type": "yarn", **STRETCH}
UNSCALED = TYPED | {"attention_factor": 1.0}
"""As V4 has it in a table of its own, where transformers would scale otherwise."""
BASES = {"main": {"rope_theta": 7.0}, "compress": {"rope_theta": 9.0}}
CONFIGS = {
    "v3": tiny(qk_rope_head_dim=8, max_position_embeddings=64),
    "v32": tiny_v32(qk_rope_head_dim=8, index_head_dim=8, max_position_embeddings=64),
    "v4": tiny_v4(max_position_embeddings=64),
}
THEIRS: dict[str, tuple[Any, Any]] = {
    "v3": (DeepseekV3Config, DeepseekV3RotaryEmbedding),
    "v32": (DeepseekV32Config, DeepseekV32RotaryEmbedding),
    "v4": (DeepseekV4Config, DeepseekV4RotaryEmbedding),
}


def raw_config(family: str, changes: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` of the family with these changes; None takes away what is no table."""
    raw = to_hf_config(CONFIGS[family])
    del raw["rope_parameters"]
    for name, value in changes.items():
        if value is None and name not in ("rope_scaling", "rope_parameters"):
            del raw[name]
        else:
            raw[name] = value
    as_written: dict[str, Any] = json.loads(json.dumps(raw))
    return as_written


def as_transformers_turns(family: str, raw: dict[str, Any]) -> dict[str, Tensor]:
    """cos and sin [S, R] of positions by kind of layer, and the widening of the softmax."""
    make_config, make_embedding = THEIRS[family]
    config = make_config(**json.loads(json.dumps(raw)))
    embedding, positions = make_embedding(config), torch.arange(POSITIONS)[None]
    if family == "v4":
        tables = {
            kind: torch.cat(embedding(torch.zeros(1), positions, kind), -1)[0]
            for kind in ("main", "compress")
        }
        return tables | {"softmax": torch.tensor(1.0)}
    halves = [x[0, :, : x.shape[-1] // 2] for x in embedding(torch.zeros(1), positions)]
    widened = yarn_apply_mscale(config.rope_parameters, 1.0)
    return {"main": torch.cat(halves, -1), "softmax": torch.tensor(widened)}


def as_read(family: str, raw: dict[str, Any]) -> dict[str, Tensor]:
    config = from_hf_config(raw)
    width, yarn = config.qk_rope_head_dim, config.rope_scaling
    if isinstance(config, V4Config):
        return {
            "main": rotary_table(width, config.rope_theta, POSITIONS),
            "compress": rotary_table(width, config.compress_rope_theta, POSITIONS, yarn),
            "softmax": torch.tensor(1.0),
        }
    table = rotary_table(width, config.rope_theta, POSITIONS, yarn)
    return {"main": table, "softmax": torch.tensor(softmax_factor(yarn))}


FLAT: dict[str, dict[str, Any]] = {
    "none": {},
    "empty tables": {"rope_scaling": {}, "rope_parameters": {}},
    "nulls": {"rope_scaling": None, "rope_parameters": None},
    "rope_scaling with type": {"rope_scaling": YARN},
    "rope_scaling with rope_type": {"rope_scaling": TYPED},
    "both spellings": {"rope_scaling": YARN | TYPED},
    "rope_parameters": {"rope_parameters": TYPED},
    "default with a factor": {"rope_scaling": {"rope_type": "default", "factor": 4.0}},
    "a factor of null": {"rope_scaling": TYPED | {"factor": None}},
    "no original length": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "magnitudes of null": {"rope_scaling": YARN | {"mscale": None, "mscale_all_dim": None}},
    "betas of null": {"rope_scaling": YARN | {"beta_fast": None, "beta_slow": None}},
    "whole numbers": {"rope_theta": 500, "rope_scaling": YARN | {"factor": 4}},
}
READ: dict[str, list[dict[str, Any]]] = {
    "v3": [
        *FLAT.values(),
        {"rope_theta": None, "rope_scaling": YARN},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 5.0}},
        {"rope_theta": None, "rope_scaling": YARN | {"rope_theta": 5.0}},
        {"rope_parameters": TYPED | {"rope_theta": 10000.0}},
        {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.5}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, **LENGTHS},
        {"rope_scaling": {"type": "yarn", "factor": None}, **LENGTHS},
        {"rope_scaling": YARN, **LENGTHS},
    ],
    "v4": [
        *FLAT.values(),
        {"rope_parameters": {"main": {}, "compress": {"rope_theta": 160000.0}}},
        {"rope_parameters": BASES, "rope_theta": None, "compress_rope_theta": None},
        {
            "rope_parameters": {"main": {}, "compress": UNSCALED | {"rope_theta": 160000.0}},
        },
        {
            "rope_parameters": {
                "main": BASES["main"] | {"type": "default"},
                "compress": BASES["compress"] | UNSCALED,
            },
            "rope_theta": None,
            "compress_rope_theta": None,
        },
        {
            "rope_scaling": {
                "main": BASES["main"] | {"rope_type": "default"},
                "compress": BASES["compress"] | UNSCALED | {"factor": None},
            },
            "rope_theta": 7.0,
            "compress_rope_theta": 9.0,
        },
        {
            "rope_scaling": YARN,
            "rope_parameters": {"main": {}, "compress": UNSCALED | {"rope_theta": 160000.0}},
        },
        {
            "partial_rotary_factor": None,
            "rope_parameters": {
                label: {"rope_theta": theta, "partial_rotary_factor": 1 / 3}
                for label, theta in (("main", 10000.0), ("compress", 160000.0))
            },
        },
        {"partial_rotary_factor": None, "rope_scaling": YARN},
        {"qk_rope_head_dim": None, "rope_scaling": YARN},
    ],
}
READ["v32"] = READ["v3"]


@pytest.mark.parametrize(
    ("family", "changes"), [(family, form) for family, forms in READ.items() for form in forms]
)
def test_what_is_read_turns_as_in_transformers(family: str, changes: dict[str, Any]) -> None:
    raw = raw_config(family, changes)
    expected, found = as_transformers_turns(family, raw), as_read(family, raw)
    assert found.keys() == expected.keys()
    for name, table in expected.items():
        # Their frequencies are rounded to float32: 50 rad of 6e-8 each.
        torch.testing.assert_close(found[name], table, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["v3", "v32", "v4"])
def test_stretching_is_seen(family: str) -> None:
    for form in ("rope_scaling with type", "rope_parameters", "a factor of null"):
        assert from_hf_config(raw_config(family, FLAT[form])).rope_scaling is not None
    stretched = from_hf_config(raw_config(family, FLAT["a factor of null"])).rope_scaling
    assert isinstance(stretched, YarnConfig)
    assert stretched.factor == 4.0


UNTYPED = "has factor = 4.0 and no rope_type; add rope_type = 'yarn' if it means that, or 'default'"
NESTED: dict[str, Any] = {"full_attention": TYPED}
BOTH_FAMILIES: list[tuple[dict[str, Any], str]] = [
    ({"rope_scaling": STRETCH}, f"rope_scaling {UNTYPED}"),
    ({"rope_parameters": STRETCH}, f"rope_parameters {UNTYPED}"),
    ({"rope_scaling": STRETCH | {"rope_type": None}}, f"rope_scaling {UNTYPED}"),
    ({"rope_scaling": STRETCH, "rope_parameters": TYPED}, f"rope_scaling {UNTYPED}"),
    (
        {"rope_scaling": TYPED | {"type": "default"}},
        "rope_scaling.rope_type = 'yarn' disagrees with rope_scaling.type = 'default'; correct",
    ),
    (
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
        "rope_scaling.rope_type = 'dynamic', but only 'default' and 'yarn' are read; take",
    ),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is missing; complete it"),
    (
        {"rope_scaling": {"type": "yarn", "factor": None}},
        "rope_scaling.factor = 1.0: Input should be greater than 1; correct the field",
    ),
    (
        {"rope_scaling": YARN, "original_max_position_embeddings": 8},
        "rope_scaling.original_max_position_embeddings = 16 disagrees with "
        "original_max_position_embeddings = 8; correct",
    ),
]
REFUSED: dict[str, list[tuple[dict[str, Any], str]]] = {
    "v3": [
        *BOTH_FAMILIES,
        *[
            (
                {table: {layer_type: TYPED}},
                f"{table}.{layer_type} is a table, but in this family none is, as all layers turn "
                "alike; move",
            )
            for table in ("rope_scaling", "rope_parameters")
            for layer_type in ("full_attention", "indexed_attention", "main")
        ],
        (
            {"rope_theta": None, "rope_scaling": YARN, "rope_parameters": {"rope_theta": 5.0}},
            "rope_parameters.rope_theta = 5.0 stands beside a rope_scaling, .*; give ",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5, but only 1 is read; "),
        (
            {"rope_scaling": YARN | {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 0.5, but only 1 is read; ",
        ),
    ],
    "v4": [
        *BOTH_FAMILIES,
        (
            {"rope_parameters": {"compressed_sparse_attention": TYPED}},
            "rope_parameters.compressed_sparse_attention is a table, but in this family only main "
            "and compress are; move",
        ),
        (
            {"rope_parameters": {"compress": UNSCALED | {"rope_theta": 160000.0}}},
            "rope_parameters has compress alone, but transformers reads .*; give both",
        ),
        (
            {"rope_parameters": {"main": {}, "compress": UNSCALED}},
            "rope_parameters.compress.rope_theta is missing, for which transformers would take "
            "rope_theta, the base of window layers; add it",
        ),
        (
            {"rope_scaling": {"main": {}, "compress": TYPED | {"rope_theta": 160000.0}}},
            "rope_scaling.compress.attention_factor is missing, .* take YaRN's, .*; add it",
        ),
        (
            {
                "partial_rotary_factor": None,
                "rope_parameters": {"main": {}, "compress": UNSCALED | {"rope_theta": 160000.0}},
            },
            "rope_parameters.main.partial_rotary_factor is missing, .* take 1.0; add it",
        ),
        (
            {
                "rope_parameters": {
                    "main": {"partial_rotary_factor": 0.5},
                    "compress": {"rope_theta": 160000.0},
                }
            },
            r"partial_rotary_factor \* head_dim = .* = 8 disagrees with "
            r"rope_parameters.main.partial_rotary_factor \* head_dim = 0.5 \* 24 = 12; correct",
        ),
        (
            {"rope_parameters": {"main": TYPED, "compress": {"rope_theta": 160000.0}}},
            "rope_parameters.main.rope_type = 'yarn', but window layers are never stretched; write",
        ),
        (
            {"rope_parameters": {"main": STRETCH, "compress": {"rope_theta": 160000.0}}},
            f"rope_parameters.main {UNTYPED}",
        ),
        (
            {"rope_parameters": {"main": {}, "compress": STRETCH | {"rope_theta": 160000.0}}},
            f"rope_parameters.compress {UNTYPED}",
        ),
        (
            {"rope_theta": None, "rope_scaling": YARN, "rope_parameters": BASES},
            "rope_parameters.main.rope_theta = 7.0 stands beside a rope_scaling, .*; give ",
        ),
        (
            {"compress_rope_theta": None, "rope_scaling": YARN, "rope_parameters": BASES}
            | {"rope_theta": 7.0},
            "rope_parameters.compress.rope_theta = 9.0 stands beside a rope_scaling, .*; give "
            "compress_rope_theta = 9.0 as well",
        ),
        (
            {"rope_parameters": {"main": 3, "compress": {}}},
            "rope_parameters.main = 3, expected a table; correct it",
        ),
        ({"partial_rotary_factor": 2}, "partial_rotary_factor = 2, expected a share of a head"),
    ],
}
REFUSED["v32"] = REFUSED["v3"]


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [(family, *form) for family, forms in REFUSED.items() for form in forms],
)
def test_what_could_be_read_in_two_ways_is_refused(
    family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArtifactError, match=f"^config.json: {message}"):
        from_hf_config(raw_config(family, changes))


@pytest.mark.parametrize("family", ["v3", "v32", "v4"])
def test_transformers_does_not_stretch_without_a_type(family: str) -> None:
    """Why a table that stretches and names no type is refused."""
    layers = "compress" if family == "v4" else "main"
    plain, untyped, typed = (
        as_transformers_turns(family, raw_config(family, changes))[layers]
        for changes in ({}, {"rope_scaling": STRETCH}, {"rope_scaling": TYPED})
    )
    assert torch.equal(untyped, plain)
    assert not torch.allclose(typed, plain)


def test_transformers_passes_over_a_table_of_another_layer_type() -> None:
    """Why such a table is refused."""
    for family in ("v3", "v32"):
        plain, nested = (
            as_transformers_turns(family, raw_config(family, changes))["main"]
            for changes in ({}, {"rope_scaling": NESTED})
        )
        assert torch.equal(nested, plain)
