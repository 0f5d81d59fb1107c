"""FP8 and FP4 folders against readings of their own: a loop over blocks, a loop over half bytes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from configs.errors import ArtifactError
from configs.model import ModelConfig, V3Config, V4Config
from model.weights.families import from_hf, narrowest, to_hf
from model.weights.files import load_pretrained, read_tensors, save_pretrained
from model.weights.reading import WEIGHTS
from model.weights.scaled import unpack, widen
from tests.model.transformers_twin import loaded
from tests.model.weights_folders import (
    E2M1,
    assert_loads_as,
    edit_config,
    model_of,
    random_codes,
    write,
)
from tests.references import (
    TINY,
    TINY_V4,
    TINY_V32,
    quantize_by_tiles,
    random_model,
    random_tokens,
)

RAGGED = V3Config(
    vocab_size=64,
    hidden_size=160,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_attention_heads=2,
    q_lora_rank=130,
    kv_lora_rank=512,
    qk_nope_head_dim=40,
    qk_rope_head_dim=64,
    v_head_dim=60,
    intermediate_size=300,
    moe_intermediate_size=140,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    max_position_embeddings=32,
    initializer_range=0.1,
)
"""The released 576 rows of `kv_a_proj_with_mqa`, and other sizes that end within a block."""
RAGGED_V4 = V4Config(
    family="v4",
    vocab_size=64,
    hidden_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=40,
    qk_rope_head_dim=16,
    q_lora_rank=144,
    o_groups=2,
    o_lora_rank=96,
    sliding_window=8,
    compress_ratios=(4, 8),
    hca_ratio=8,
    index_n_heads=32,
    index_head_dim=16,
    index_topk=4,
    moe_intermediate_size=48,
    n_routed_experts=4,
    num_experts_per_tok=2,
    num_hash_layers=1,
    max_position_embeddings=32,
    initializer_range=0.1,
)
"""Inputs of 160 and 48 columns: whole groups of 32, and half a group."""


def block_by_block(values: Tensor, scales: Tensor, tile: tuple[int, int]) -> Tensor:
    """Each block of `values` times its own scale."""
    out = torch.empty(values.shape)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            rows = slice(i * tile[0], (i + 1) * tile[0])
            columns = slice(j * tile[1], (j + 1) * tile[1])
            out[rows, columns] = values[rows, columns].float() * float(scales[i, j])
    return out


def as_fp8(
    tensors: dict[str, Tensor], quantised: Callable[[str], bool], **kwargs: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(what a V3 file holds, what it means), with scales that are no powers of two."""
    stored, meant = {}, {}
    for name, tensor in tensors.items():
        if quantised(name):
            q = quantize_by_tiles(tensor, **kwargs)
            stored[name], stored[f"{name}_scale_inv"] = q.values, q.scales
            meant[name] = block_by_block(q.values, q.scales, q.tile)
        else:
            meant[name] = stored[name] = tensor.contiguous()
    return stored, meant


@pytest.mark.parametrize("tile", [(128, 128), (64, 32)])
def test_fp8_blocks_of_v3_are_read_block_by_block(tile: tuple[int, int], tmp_path: Path) -> None:
    model = random_model(RAGGED)
    save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    stored, meant = as_fp8(tensors, lambda n: narrowest(RAGGED, n) == "float8", tile=tile)
    latents = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert tuple(stored[latents].shape) == (576, 160)
    if tile == (128, 128):
        assert tuple(stored[f"{latents}_scale_inv"].shape) == (5, 2)
    edit_config(
        tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": list(tile)}
    )
    assert_loads_as(write(tmp_path, stored), model_of(RAGGED, meant))


@pytest.mark.parametrize(
    ("suffix", "scale_type"),
    [(".scale", torch.float8_e8m0fnu), (".weight_scale_inv", torch.uint8)],
)
def test_fp4_experts_and_fp8_of_v4_are_read_code_by_code(
    suffix: str, scale_type: torch.dtype, tmp_path: Path
) -> None:
    save_pretrained(random_model(RAGGED_V4), tmp_path)
    stored, meant = {}, {}
    for number, (name, tensor) in enumerate(load_file(tmp_path / WEIGHTS).items()):
        stored[name] = meant[name] = tensor
        if narrowest(RAGGED_V4, name) != "float8":
            continue
        if ".experts." in name:
            stored[name], exponents, meant[name] = random_codes(tensor.shape, number)
        else:
            q = quantize_by_tiles(tensor, (128, 128), power_of_two=True)
            exponents = (q.scales.log2().round() + 127).to(torch.uint8)
            stored[name], meant[name] = q.values, block_by_block(q.values, q.scales, q.tile)
        stored[name.removesuffix(".weight") + suffix] = exponents.view(scale_type)
    assert stored["layers.0.ffn.experts.0.w2.weight"].shape == (160, 24)
    assert stored[f"layers.0.ffn.experts.0.w2{suffix}"].shape == (160, 2)
    assert_loads_as(write(tmp_path, stored), model_of(RAGGED_V4, meant))


def test_the_low_half_of_a_byte_is_the_even_column() -> None:
    packed = torch.tensor([[0x21, 0xF7]], dtype=torch.uint8).view(torch.int8)
    assert unpack(packed).tolist() == [[0.5, 1.0, 6.0, -6.0]]
    every = torch.arange(256, dtype=torch.uint8).view(torch.int8)[None]
    found = unpack(every)[0]
    for byte in range(256):
        for half, code in enumerate((byte % 16, byte // 16)):
            assert float(found[2 * byte + half]) == E2M1[code % 8] * (-1 if code > 7 else 1)


@pytest.mark.parametrize("config", [RAGGED, TINY_V32, RAGGED_V4, TINY], ids=lambda c: c.family)
def test_a_float8_save_is_its_source_within_half_a_step(
    config: ModelConfig, tmp_path: Path
) -> None:
    model = random_model(config)
    save_pretrained(model, tmp_path, dtype="float8")
    source, stored = to_hf(config, model.state_dict()), load_file(tmp_path / WEIGHTS)
    quantised = [name for name in source if narrowest(config, name) == "float8"]
    assert {n for n, t in stored.items() if t.dtype == torch.float8_e4m3fn} == set(quantised)
    for name in quantised:
        suffix = name.removesuffix(".weight") + ".scale" if config.family == "v4" else ""
        scales = stored.pop(suffix or f"{name}_scale_inv")
        assert scales.dtype == torch.float32
        if config.family != "v3":
            assert torch.equal(scales.float().log2(), scales.float().log2().round())
        read = block_by_block(stored[name], scales.float(), (128, 128))
        # E4M3 keeps 4 bits, down to 2^-6; a scale is at most twice amax / 448.
        bound = source[name].abs() * 2.0**-4 + scales.float().max() * 2.0**-10
        assert bool(((read - source[name]).abs() <= bound).all()), name
    assert stored.keys() == source.keys()
    back = load_pretrained(tmp_path)
    expected = dict(read_tensors(tmp_path))
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, tensor in from_hf(config, expected).items():
        assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("config", "kept", "quantised"),
    [
        (
            TINY,
            ["model.layers.2.eh_proj.weight", "model.layers.1.mlp.gate.weight", "lm_head.weight"],
            ["model.layers.2.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight"],
        ),
        (
            TINY_V32,
            [
                "model.layers.0.self_attn.indexer.weights_proj.weight",
                "model.layers.0.self_attn.indexer.k_norm.weight",
            ],
            [
                "model.layers.0.self_attn.indexer.wq_b.weight",
                "model.layers.0.self_attn.indexer.wk.weight",
            ],
        ),
        (
            TINY_V4,
            [
                "layers.1.attn.compressor.wkv.weight",
                "layers.1.attn.indexer.compressor.wgate.weight",
                "layers.1.attn.indexer.weights_proj.weight",
                "layers.1.ffn.gate.weight",
                "embed.weight",
                "head.weight",
            ],
            [
                "layers.1.attn.indexer.wq_b.weight",
                "layers.1.attn.wo_a.weight",
                "layers.1.ffn.experts.0.w3.weight",
                "mtp.0.e_proj.weight",
            ],
        ),
    ],
    ids=["v3", "v32", "v4"],
)
def test_what_is_quantised_is_what_released_models_quantise(
    config: ModelConfig, kept: list[str], quantised: list[str], tmp_path: Path
) -> None:
    save_pretrained(random_model(config), tmp_path, dtype="float8")
    stored = load_file(tmp_path / WEIGHTS)
    assert {stored[name].dtype for name in kept} == {torch.bfloat16}
    assert {stored[name].dtype for name in quantised} == {torch.float8_e4m3fn}
    scheme = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert scheme["quant_method"] == "fp8"
    assert scheme["weight_block_size"] == [128, 128]
    assert scheme.get("scale_fmt") == (None if config.family == "v3" else "ue8m0")


@torch.no_grad()
def test_transformers_reads_the_fp8_of_v4(tmp_path: Path) -> None:
    # All quantised sizes are multiples of 128 or below it: transformers sizes other blocks wrongly.
    config = RAGGED_V4.model_copy(
        update={
            "hidden_size": 128,
            "head_dim": 64,
            "q_lora_rank": 128,
            "o_lora_rank": 64,
            "moe_intermediate_size": 128,
        }
    )
    save_pretrained(random_model(config), tmp_path, dtype="float8")
    ours = load_pretrained(tmp_path)
    theirs, told = loaded(DeepseekV4ForCausalLM.from_pretrained, tmp_path)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    tokens = random_tokens(2, 30)
    expected = theirs.float().eval()(tokens).logits
    error = (ours(tokens) - expected).abs().max() / expected.std()
    assert float(error) <= 1e-4


LINEAR = "model.layers.0.self_attn.o_proj.weight"


@pytest.fixture
def quantised(tmp_path: Path) -> Path:
    """A whole FP8 model."""
    save_pretrained(random_model(RAGGED), tmp_path, dtype="float8")
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(f"{LINEAR}_scale_inv"),
            f": {LINEAR} is stored as F8_E4M3, but its scales are missing: there is none of "
            f"{LINEAR}_scale_inv, model.layers.0.self_attn.o_proj.scale, {LINEAR}_scale; complete "
            "the files, or take weights in a form that is read: float32, .* W8A8 and W4A8$",
        ),
        (
            lambda t: t.update({f"{LINEAR}_scale_inv": torch.ones(2, 2)}),
            rf": the scales of {LINEAR} have shape \[2, 2\], but a weight of \[160, 120\] in "
            r"blocks of 128 x 128 has \[2, 1\]; correct quantization_config.weight_block_size, or ",
        ),
        (
            lambda t: t.update({f"{LINEAR}_scale_inv": torch.full((2, 1), float("nan"))}),
            f": the scales of {LINEAR} are not all finite; the file is damaged",
        ),
        (
            lambda t: t.update({f"{LINEAR}_scale_inv": torch.ones(2, 1, dtype=torch.int64)}),
            f": the scales of {LINEAR} are stored as torch.int64",
        ),
        (
            lambda t: t.pop(LINEAR),
            f": {LINEAR} is missing from the checkpoint, but config.json",
        ),
        (
            lambda t: t.update({"lm_head.weight_scale_inv": torch.ones(1, 2)}),
            ": lm_head.weight_scale_inv is in the checkpoint but not in the model that",
        ),
        (
            lambda t: t.update({LINEAR: t[LINEAR][:, :-1].contiguous()}),
            rf": {LINEAR} has shape \[160, 119\] in the checkpoint, \[160, 120\] in the model that",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(160).to(torch.float8_e4m3fn)}),
            ": model.norm.weight is stored as F8_E4M3, but its scales are missing",
        ),
    ],
)
def test_damaged_scales_are_named(
    quantised: Path, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    tensors = load_file(quantised / WEIGHTS)
    change(tensors)
    with pytest.raises(ArtifactError, match=message):
        load_pretrained(write(quantised, tensors))


def test_only_matrices_are_stored_in_blocks() -> None:
    vector = torch.zeros(8).to(torch.float8_e4m3fn)
    with pytest.raises(ArtifactError, match=r"^x has shape \[8\], but only matrices"):
        widen("x", vector, torch.ones(1), (128, 128))
