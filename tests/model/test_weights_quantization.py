"""`quantization_config` in every form that transformers takes, read as it reads it."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

from configs.errors import ArtifactError
from model.weights.families import from_hf, narrowest, to_hf
from model.weights.files import load_pretrained
from model.weights.quantization import read_tile
from tests.model.weights_folders import edit_config, write, write_config
from tests.references import exact_by_tiles, quantize_by_tiles, random_model, tiny

CONFIG = tiny(
    hidden_size=256,
    q_lora_rank=128,
    kv_lora_rank=64,
    qk_rope_head_dim=64,
    qk_nope_head_dim=64,
    v_head_dim=64,
    intermediate_size=256,
    moe_intermediate_size=128,
    n_routed_experts=4,
    n_group=2,
    topk_group=1,
    num_nextn_predict_layers=0,
)
"""Whole blocks everywhere, of which transformers takes the size from the ratio of shapes."""
LINEAR = "model.layers.0.mlp.down_proj.weight"
Encoded = tuple[dict[str, Tensor], Tensor]
Encoder = Callable[[str, Tensor], Encoded]


def blocks(
    rows: int, columns: int, scales_as: Callable[[Tensor], Tensor] = lambda scales: scales
) -> Encoder:
    """(parts, what they mean) of a weight in E4M3, with a scale for each block."""

    def encode(name: str, x: Tensor) -> Encoded:
        q = quantize_by_tiles(x, (rows, columns), power_of_two=True)
        parts = {name: q.values, f"{name}_scale_inv": scales_as(q.scales)}
        return parts, exact_by_tiles(q).float()

    return encode


def as_codes(scales: Tensor) -> Tensor:
    """The exponents of powers of two, by E8M0's bytes."""
    return (scales.log2().round() + 127).to(torch.uint8)


def whole(*shape: int, leaf: str = "weight_scale_inv", beside: tuple[str, ...] = ()) -> Encoder:
    """(parts, what they mean) with one scale, and more tensors that do not bear on the weight."""

    def encode(name: str, x: Tensor) -> Encoded:
        scale = x.abs().max() / 448
        values = (x / scale).to(torch.float8_e4m3fn)
        stem = name.removesuffix("weight")
        parts = {name: values, f"{stem}{leaf}": scale.reshape(shape)}
        parts |= {f"{stem}{other}": torch.tensor(0.5) for other in beside}
        return parts, values.float() * scale

    return encode


BLOCKS = blocks(128, 128)
FP8 = {"quant_method": "fp8"}
BY_BOTH: dict[str, tuple[object, Encoder]] = {
    "blocks": (FP8 | {"weight_block_size": [128, 128]}, BLOCKS),
    "other blocks": (FP8 | {"weight_block_size": [64, 32]}, blocks(64, 32)),
    "no block size": (FP8, BLOCKS),
    "null, no axes": (FP8 | {"weight_block_size": None}, whole()),
    "null, one axis": (FP8 | {"weight_block_size": None}, whole(1)),
    "null, two axes": (FP8 | {"weight_block_size": None}, whole(1, 1)),
    "blocks, no axes": (FP8 | {"weight_block_size": [128, 128]}, whole()),
    "static": (
        FP8 | {"weight_block_size": None, "activation_scheme": "static"},
        whole(beside=("activation_scale",)),
    ),
    "mxfp8, no block size": ({"quant_method": "mxfp8"}, blocks(1, 32, as_codes)),
    "powers in bytes": (
        FP8 | {"scale_fmt": "ue8m0"},
        blocks(128, 128, lambda scales: as_codes(scales).view(torch.float8_e8m0fnu)),
    ),
    "powers in float32": (FP8 | {"scale_fmt": "ue8m0", "expert_dtype": "fp8"}, BLOCKS),
    "skipped modules": (
        FP8 | {"modules_to_not_convert": ["lm_head"], "activation_scheme": "DYNAMIC"},
        BLOCKS,
    ),
    "other names": (
        FP8 | {"ignored_layers": ["lm_head"], "dequantize": True, "fmt": "e4m3", "bogus": 1},
        BLOCKS,
    ),
}
BY_US: dict[str, tuple[object, Encoder]] = {
    "a number": (FP8 | {"weight_block_size": 128}, BLOCKS),
    "another number": (FP8 | {"weight_block_size": 64}, blocks(64, 64)),
    "capitals": ({"quant_method": "FP8"}, BLOCKS),
    "null method": ({"quant_method": None, "weight_block_size": [64, 32]}, blocks(64, 32)),
    "no method": ({"weight_block_size": [64, 32], "fmt": "e4m3"}, blocks(64, 32)),
    "empty": ({}, BLOCKS),
    "null": (None, BLOCKS),
    "servers' name of a matrix's scale": (
        FP8 | {"weight_block_size": None},
        whole(leaf="weight_scale", beside=("input_scale",)),
    ),
}
"""What means one thing, and transformers either refuses or reads without its scales."""


@cache
def source() -> dict[str, Tensor]:
    """The model's tensors by their stored names."""
    return to_hf(CONFIG, random_model(CONFIG).state_dict())


def make(folder: Path, scheme: object, encode: Encoder) -> dict[str, Tensor]:
    """Write the model into `folder`; what its tensors mean, by Ingot's names."""
    stored, meant = {}, {}
    for name, x in source().items():
        stored[name] = meant[name] = x.clone()
        if narrowest(CONFIG, name) == "float8":
            parts, meant[name] = encode(name, x)
            stored |= parts
    write_config(folder, CONFIG)
    edit_config(write(folder, stored), quantization_config=scheme)
    return from_hf(CONFIG, meant)


def assert_equal(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, x in expected.items():
        assert torch.equal(state[name], x), name


@pytest.mark.parametrize(("scheme", "encode"), [*BY_BOTH.values()], ids=list(BY_BOTH))
def test_what_transformers_reads_is_read_alike(
    scheme: object, encode: Encoder, tmp_path: Path
) -> None:
    meant = make(tmp_path, scheme, encode)
    assert_equal(load_pretrained(tmp_path).state_dict(), meant)
    theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_equal(theirs.state_dict(), meant)


@pytest.mark.parametrize(("scheme", "encode"), [*BY_US.values()], ids=list(BY_US))
def test_what_means_one_thing_is_read(scheme: object, encode: Encoder, tmp_path: Path) -> None:
    meant = make(tmp_path, scheme, encode)
    assert_equal(load_pretrained(tmp_path).state_dict(), meant)


def test_a_tuple_is_a_list() -> None:
    assert read_tile({"quantization_config": {"weight_block_size": (4, 5)}}) == (4, 5)


WIDEN = "let transformers widen the weights first"
METHODS = ["gptq", "awq", "compressed-tensors", "bitsandbytes", "mxfp4", "nvfp4", "fbgemm_fp8", 8]
NO_BLOCK_SIZES: list[object] = [
    *([128], [], [128, 128, 1], [128, 0], ["a", "b"]),
    *("128", 0, -1, 1.5, True, {}),
]


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        *[
            (
                {"quant_method": m},
                rf"quant_method = {m!r}, but only fp8 and mxfp8 are read; {WIDEN}",
            )
            for m in METHODS
        ],
        (
            {"load_in_8bit": True, "quant_method": "fp8"},
            rf"load_in_8bit = True, which is bitsandbytes, but only .*; {WIDEN}",
        ),
        (
            {"bits": 4, "group_size": 128},
            r"has bits = 4 and no quant_method; add quant_method = 'fp8' if .*, or else let",
        ),
        (FP8 | {"fmt": "e5m2"}, rf"fmt = 'e5m2', but only e4m3 and .* are read; {WIDEN}"),
        (FP8 | {"scale_fmt": "x"}, rf"scale_fmt = 'x', but only float and ue8m0 are read; {WIDEN}"),
        (
            FP8 | {"expert_dtype": "int4"},
            rf"expert_dtype = 'int4', but only fp8 and fp4 .*; {WIDEN}",
        ),
        *[
            (
                FP8 | {"weight_block_size": size},
                r"weight_block_size = .*, expected two numbers, one, or null; give the block",
            )
            for size in NO_BLOCK_SIZES
        ],
    ],
)
def test_a_scheme_that_is_not_read_is_named(
    scheme: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_config(tmp_path, CONFIG)
    edit_config(tmp_path, quantization_config=scheme)
    with pytest.raises(
        ArtifactError, match=rf"^{tmp_path}: config.json: quantization_config[. ]{message}"
    ):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("scheme", ["fp8", 8, ["fp8"], False])
def test_a_scheme_that_is_no_table_is_refused(scheme: object, tmp_path: Path) -> None:
    write_config(tmp_path, CONFIG)
    edit_config(tmp_path, quantization_config=scheme)
    with pytest.raises(ArtifactError, match=r"quantization_config = .*, expected a table; correct"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("scheme", "encode", "message"),
    [
        (
            FP8 | {"weight_block_size": [64, 64]},
            BLOCKS,
            r"have shape \[2, 2\], but a weight of \[256, 256\] in blocks of 64 x 64 has \[4, 4\]",
        ),
        (
            FP8 | {"weight_block_size": None},
            BLOCKS,
            r"have shape \[2, 2\], but a weight of .* in blocks of 256 x 256 has \[1, 1\]",
        ),
        (
            FP8 | {"weight_block_size": [128, 128]},
            whole(1, 1),
            r"have shape \[1, 1\], but a weight of .* in blocks of 128 x 128 has \[2, 2\]",
        ),
    ],
)
def test_scales_of_other_blocks_than_the_config_names_are_refused(
    scheme: dict[str, Any], encode: Encoder, message: str, tmp_path: Path
) -> None:
    make(tmp_path, scheme, lambda name, x: encode(name, x) if name == LINEAR else ({name: x}, x))
    remedy = "correct quantization_config.weight_block_size, or take the scales that belong"
    with pytest.raises(ArtifactError, match=f": the scales of {LINEAR} {message}; {remedy}"):
        load_pretrained(tmp_path)
