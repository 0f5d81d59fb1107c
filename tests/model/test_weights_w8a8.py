"""INT8 folders as ModelSlim describes them, against a reading of their own: a loop over rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from configs.errors import ArtifactError
from configs.model import ModelConfig
from model.weights.config import table_of
from model.weights.families import narrowest, to_hf
from model.weights.files import consolidate, load_pretrained, read_tensors
from model.weights.reading import WEIGHTS
from model.weights.scaled import widen_integers
from stages.export.ascend import Integers
from tests.model.weights_folders import assert_loads_as, model_of, random_codes, write, write_config
from tests.references import TINY, TINY_V4, TINY_V32, random_model

FAMILIES = [TINY, TINY_V32, TINY_V4]
LINEARS = {
    "v3": "model.layers.0.self_attn.q_a_proj.weight",
    "v32": "model.layers.0.self_attn.q_a_proj.weight",
    "v4": "layers.0.attn.wq_a.weight",
}
LINEAR = LINEARS["v3"]


def family_of(config: ModelConfig) -> str:
    return config.family


def is_linear(config: ModelConfig, name: str) -> bool:
    """What released models quantise, but for the MTP layer, which the server does not."""
    prefix = table_of(config).mtp_prefix(config)
    return narrowest(config, name) == "float8" and not name.startswith(prefix)


def by_rows(x: Tensor, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """(parts, what they mean): rows that are not centred, each read by itself."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randint(-20, 20, (len(x), 1), generator=generator).float()
    scales = x.abs().amax(1, keepdim=True) / 100
    values = (x / scales + offsets).round().clamp(-128, 127).to(torch.int8)
    meant = torch.empty(x.shape)
    for row, integers in enumerate(values):
        meant[row] = (integers.float() - offsets[row]) * scales[row]
    return {"": values, "_scale": scales, "_offset": offsets}, meant


def quantise(config: ModelConfig, rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(what a W8A8 file holds, what it means), with scales of one or two axes."""
    stored, meant = {}, {}
    for number, (name, x) in enumerate(to_hf(config, random_model(config).state_dict()).items()):
        if is_linear(config, name):
            parts, meant[name] = by_rows(x, seed=number)
            for part, tensor in parts.items():
                stored[f"{name}{part}"] = tensor.flatten() if part and rank == 1 else tensor
        else:
            meant[name] = x.clone()
            stored[name] = x.to(torch.int32) if name.endswith("tid2eid") else x.clone()
    return stored, meant


@pytest.fixture(params=FAMILIES, ids=family_of)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    """Each family in turn."""
    given: ModelConfig = request.param
    return given


@pytest.mark.parametrize("rank", [2, 1])
def test_w8a8_is_read_row_by_row(config: ModelConfig, rank: int, tmp_path: Path) -> None:
    stored, meant = quantise(config, rank)
    write_config(tmp_path, config)
    name = LINEARS[config.family]
    assert stored[name].dtype == torch.int8
    assert stored[f"{name}_scale"].dim() == stored[f"{name}_offset"].dim() == rank
    assert not torch.equal(meant[name], stored[name] * stored[f"{name}_scale"].view(-1, 1))
    assert_loads_as(write(tmp_path, stored), model_of(config, meant))
    assert set(read_tensors(tmp_path)) == set(meant)


def test_w8a8_is_imported_as_float32(config: ModelConfig, tmp_path: Path) -> None:
    stored, meant = quantise(config, rank=2)
    write_config(tmp_path / "w8a8", config)
    write(tmp_path / "w8a8", stored)
    assert consolidate(tmp_path / "w8a8", tmp_path / "taken") == config
    taken = load_file(tmp_path / "taken" / WEIGHTS)
    assert taken.keys() == meant.keys()
    assert all(torch.equal(taken[name], x.to(taken[name].dtype)) for name, x in meant.items())


def test_what_the_ascend_variant_writes_is_what_is_read(
    config: ModelConfig, tmp_path: Path
) -> None:
    form = Integers(config)
    source = to_hf(config, random_model(config).state_dict())
    stored = {part: x for name in source for part, x in form.encode(name, source[name]).items()}
    assert sum(x.dtype == torch.int8 for x in stored.values()) > 20
    write_config(tmp_path, config)
    back = to_hf(config, load_pretrained(write(tmp_path, stored)).state_dict())
    for name in source:
        expected = form.decode(name, stored.__getitem__)
        assert torch.equal(back[name], expected.to(back[name].dtype)), name


def test_bytes_are_what_the_scales_beside_them_say(tmp_path: Path) -> None:
    """Packed FP4 experts and W8A8 attention in one file."""
    stored, meant = quantise(TINY_V4, rank=2)
    for number, name in enumerate(sorted(meant)):
        if ".experts." in name and is_linear(TINY_V4, name):
            packed, exponents, meant[name] = random_codes(meant[name].shape, number)
            del stored[f"{name}_scale"], stored[f"{name}_offset"]
            stored[name] = packed
            scales = exponents.view(torch.float8_e8m0fnu)
            stored[f"{name.removesuffix('.weight')}.scale"] = scales
    assert stored["layers.0.ffn.experts.0.w1.weight"].dtype == torch.int8
    write_config(tmp_path, TINY_V4)
    assert_loads_as(write(tmp_path, stored), model_of(TINY_V4, meant))


def set_part(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda t: t.update({f"{LINEAR}{part}": change(t[f"{LINEAR}{part}"])})


def with_nan(x: Tensor) -> Tensor:
    x = x.clone()
    x[3] = torch.nan
    return x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(f"{LINEAR}_scale"),
            f"{LINEAR}_scale is missing, but {LINEAR} is stored as I8 with {LINEAR}_offset; ",
        ),
        (
            lambda t: t.pop(f"{LINEAR}_offset"),
            f"{LINEAR}_offset is missing, but {LINEAR} is stored as I8 with {LINEAR}_scale; ",
        ),
        (
            lambda t: [t.pop(f"{LINEAR}_scale"), t.pop(f"{LINEAR}_offset")],
            f"{LINEAR} is stored as I8, but its scales are missing: there is none of "
            f"{LINEAR}_scale_inv, {LINEAR.removesuffix('.weight')}.scale, {LINEAR}_scale with "
            f"{LINEAR}_offset, {LINEAR.removesuffix('.weight')}.deq_scale with .*; complete the "
            "files, or take weights in a form that is read: float32, bfloat16, float16, "
            r"FP8 \(E4M3\), packed FP4, and ModelSlim's W8A8 and W4A8",
        ),
        (
            lambda t: t.update({f"{LINEAR}_scale_inv": torch.ones(1, 1)}),
            f"{LINEAR} has both {LINEAR}_scale_inv and {LINEAR}_scale beside it, .*; take away",
        ),
        (
            set_part("_scale", lambda x: x[:-1]),
            rf"{LINEAR}_scale has shape \[15, 1\], but {LINEAR} of \[16, 32\] needs one for each "
            r"row, \[16, 1\]; take",
        ),
        (set_part("_scale", lambda x: x.T), rf"{LINEAR}_scale has shape \[1, 16\], but"),
        (
            set_part("_offset", lambda x: x.expand(-1, 32)),
            rf"{LINEAR}_offset has shape \[16, 32\], but",
        ),
        (set_part("_scale", with_nan), f"the values of {LINEAR}_scale are not all finite; the"),
        (set_part("_offset", with_nan), f"the values of {LINEAR}_offset are not all finite; the"),
        (
            set_part("_scale", lambda x: x.to(torch.uint8)),
            f"{LINEAR}_scale is stored as torch.uint8, but float32 is expected; take",
        ),
        (
            set_part("_offset", lambda x: x.to(torch.int8)),
            f"{LINEAR}_offset is stored as torch.int8, but float32 is expected; take",
        ),
        (
            set_part("", lambda x: x.view(torch.uint8)),
            f"{LINEAR} is stored as U8, but its scales are missing: there is none of "
            f"{LINEAR}_scale_inv, {LINEAR.removesuffix('.weight')}.scale; complete",
        ),
        (
            set_part("", lambda x: x[:, :-1]),
            rf"{LINEAR} has shape \[16, 31\] in the checkpoint, \[16, 32\] in the model",
        ),
    ],
)
def test_a_part_of_w8a8_that_does_not_fit_is_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    stored, _ = quantise(TINY, rank=2)
    write_config(tmp_path, TINY)
    change(stored)
    with pytest.raises(ArtifactError, match=f"^{tmp_path}: {message}"):
        load_pretrained(write(tmp_path, stored))


def test_only_matrices_have_rows() -> None:
    with pytest.raises(ArtifactError, match=r"^x has shape \[8\], but only matrices"):
        widen_integers(
            "x",
            torch.zeros(8, dtype=torch.int8),
            ("x_scale", "x_offset"),
            (torch.ones(8), torch.zeros(8)),
        )
