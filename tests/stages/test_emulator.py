"""An NPU's arithmetic on stored weights: that of integers, and what it catches."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.errors import ExportError
from configs.model import ModelConfig
from model.transformer import Transformer
from model.weights.config import read_config, to_hf_config
from model.weights.files import load_pretrained, save_pretrained
from stages.export import blame, emulator, parity, variants
from stages.export.ascend import Integers
from stages.export.calibration import Range, measure, of_weight
from stages.export.rotation import RotatedFolder, turn
from stages.export.smoothing import groups_of, smoothed
from stages.export.tensors import TensorFolder, write_weights
from stages.export.variants import read_model, without_mtp
from stages.shards import Int64
from tests.stages.bundles import (
    LOOSE,
    MODELS,
    files_of,
    make_bundle,
    make_checkpoint,
)

TOKENS = np.random.default_rng(0).integers(2, 384, (8, 32))
OUTLIER = 60.0
"""How much larger a planted channel is than the others."""


@dataclass
class Made:
    """A checkpoint, the model that it is, and what its activations come to."""

    source: TensorFolder
    model: Transformer
    ranges: dict[str, Range]

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def form(self, ranges: dict[str, Range] | None = None) -> Integers:
        """Calibrated."""
        bare = Integers(self.config)
        found = self.ranges if ranges is None else ranges
        names = bare.calibrated(self.source.names)
        return Integers(self.config, ranges={n: of_weight(found, n).whole for n in names})


@pytest.fixture(scope="module", params=MODELS)
def made(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Made:
    folder = make_checkpoint(tmp_path_factory.mktemp("integers"), MODELS[request.param]).path()
    model = load_pretrained(folder)
    return Made(TensorFolder(folder), model, measure(model, TOKENS))


def write(source: TensorFolder, form: Integers, folder: Path) -> TensorFolder:
    folder.mkdir()
    write_weights(source, form, folder, max_shard_bytes=10**9, before_write=lambda: None)
    shutil.copy(source.folder / "config.json", folder)
    return TensorFolder(folder)


def emulated(source: TensorFolder, form: Integers, folder: Path) -> Transformer:
    stored = write(source, form, folder)
    model = parity.reload(stored, form, source.names)
    emulator.emulate(model, form, stored)
    return model


@pytest.mark.parametrize("variant", ["w8a8", "w4a8"])
def test_products_are_those_of_integers_alone(made: Made, tmp_path: Path, variant: str) -> None:
    """Against int64, one element at a time, from what lies on disk."""
    form = made.form() if variant == "w8a8" else Integers(made.config, "w4a8")
    stored = write(made.source, form, tmp_path / variant)
    rng = np.random.default_rng(1)
    kinds = set()
    for name in made.source.names:
        scheme = form.scheme(name)
        if scheme is None or scheme.kind in kinds:
            continue
        kinds.add(scheme.kind)
        parts = {part.rpartition(".")[2]: stored.read(part).numpy() for part in form.parts(name)}
        weight = parts["weight"].astype(np.int64)
        if scheme.kind == "W4A8_DYNAMIC":
            codes = np.stack([weight & 15, (weight >> 4) & 15], 1).reshape(-1, weight.shape[1])
            weight = np.where(codes > 7, codes - 16, codes)
        x = rng.normal(size=(3, weight.shape[1])).astype(np.float32)
        if scheme.kind == "W8A8":
            reciprocal = (1 / torch.from_numpy(parts["input_scale"]).bfloat16()).float().item()
            q = np.rint(x * np.float32(reciprocal) + parts["input_offset"]).clip(-128, 127)
            wanted = (q.astype(np.int64) @ weight.T + parts["quant_bias"]) * parts["deq_scale"]
        else:
            scale = np.abs(x).max(1, keepdims=True) / np.float32(127)
            q = np.rint(x / scale).astype(np.int64)
            wanted = (q @ weight.T) * parts["weight_scale"].T * scale
        found = emulator.Product(form, stored, name)(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())
    expected = {"W4A8_DYNAMIC"} if variant == "w4a8" else set[str]()
    if variant == "w8a8" and made.config.family != "v4":
        expected = {"W8A8"}
    assert kinds == expected | {"W8A8_DYNAMIC"}


def test_everything_that_is_quantised_is_emulated(made: Made, tmp_path: Path) -> None:
    form = made.form()
    model = emulated(made.source, form, tmp_path / "w8a8")
    products = [one for one in model.modules() if isinstance(one, emulator.Product)]
    assert len(products) == sum(form.scheme(name) is not None for name in made.source.names) > 20
    with torch.no_grad():
        one, other = (m(torch.from_numpy(TOKENS)) for m in (model, made.model))
    assert not torch.equal(one, other)
    assert float((one - other).abs().mean()) < 0.2 * float(other.std())


@pytest.mark.parametrize(
    ("kind", "leaf", "change"),
    [
        ("W8A8", "quant_bias", lambda x: x + 1),
        ("W8A8", "input_offset", lambda x: x + 1),
        ("W8A8", "input_scale", lambda x: x * 1.5),
        ("W8A8", "weight", lambda x: x.roll(1, 0)),
        ("W8A8_DYNAMIC", "weight_offset", lambda x: x + 1),
    ],
)
def test_a_wrong_tensor_is_named(
    made: Made, tmp_path: Path, kind: str, leaf: str, change: Callable[[Tensor], Tensor]
) -> None:
    form = made.form()
    found = [n for n in made.source.names if (s := form.scheme(n)) is not None and s.kind == kind]
    if not found:
        assert (made.config.family, kind) == ("v4", "W8A8")
        return
    write(made.source, form, tmp_path / "w8a8")
    name = found[len(found) // 2]
    (path,) = (tmp_path / "w8a8").glob("*.safetensors")
    tensors = load_file(path)
    assert emulator.prove(made.source, TensorFolder(path.parent), form, seed=0) == len(
        [n for n in made.source.names if form.scheme(n) is not None]
    )
    part = next(p for p in form.parts(name) if p.endswith(f".{leaf}"))
    tensors[part] = change(tensors[part]).contiguous()
    save_file(tensors, path)
    with pytest.raises(ExportError, match=rf"{name}: output \d+ of the product that an NPU"):
        emulator.prove(made.source, TensorFolder(path.parent), form, seed=0)


def test_a_wrong_bias_of_four_bits_is_named(made: Made, tmp_path: Path) -> None:
    form = Integers(made.config, "w4a8")
    write(made.source, form, tmp_path / "w4a8")
    (path,) = (tmp_path / "w4a8").glob("*.safetensors")
    assert emulator.prove(made.source, TensorFolder(path.parent), form, seed=0)
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("scale_bias"))
    tensors[name] *= 1.01
    save_file(tensors, path)
    with pytest.raises(ExportError, match=f"{name} is not 8 times the sum"):
        emulator.prove(made.source, TensorFolder(path.parent), form, seed=0)


def planted(made: Made, folder: Path) -> Transformer:
    """The model with some channels of each norm far larger, and what reads them smaller by that."""
    model = load_pretrained(made.source.folder)
    generator = torch.Generator().manual_seed(2)
    save_pretrained(model, folder)
    source = TensorFolder(folder)
    tensors = {name: source.read(name).clone() for name in source.names}
    for group in groups_of(made.config, source.names):
        if group.divided.endswith("kv_b_proj.weight"):
            continue
        width = tensors[group.divided].shape[0]
        chosen = torch.randperm(width, generator=generator)[: width // 32]
        tensors[group.divided][chosen] *= OUTLIER
        for reader in group.readers:
            tensors[reader][:, chosen] /= OUTLIER
    for path in folder.glob("*.safetensors"):
        save_file({n: tensors[n] for n in load_file(path)}, path, metadata={"format": "pt"})
    return load_pretrained(folder)


def gap(one: Transformer, other: Transformer) -> float:
    """Mean KL in nats of the second from the first."""
    return parity.compare(one, other, TOKENS).mean_kl_nats


def test_smoothing_changes_nothing_that_is_not_rounded(made: Made, tmp_path: Path) -> None:
    """Factors are powers of two, so only sums differ, in float32's last places."""
    model = planted(made, tmp_path / "planted")
    source = TensorFolder(tmp_path / "planted")
    ranges = measure(model, TOKENS)
    one = Integers(made.config)
    smooth, after = smoothed(source, one, ranges)
    assert any(not torch.equal(source.read(n), smooth.read(n)) for n in source.names)
    tensors = {name: smooth.read(name) for name in smooth.names}
    again = shutil.copytree(tmp_path / "planted", tmp_path / "smooth")
    for path in again.glob("*.safetensors"):
        save_file({n: tensors[n] for n in load_file(path)}, path, metadata={"format": "pt"})
    moved = load_pretrained(again)
    with torch.no_grad():
        torch.testing.assert_close(
            moved(torch.from_numpy(TOKENS)), model(torch.from_numpy(TOKENS)), atol=2e-4, rtol=0
        )
    for name, seen in measure(moved, TOKENS).items():
        if name.startswith(f"model.layers.{made.config.num_hidden_layers}."):
            continue
        torch.testing.assert_close(seen.absmax_C, after[name].absmax_C, atol=1e-3, rtol=1e-3)


def test_smoothing_helps_where_channels_stand_out(made: Made, tmp_path: Path) -> None:
    model = planted(made, tmp_path / "planted")
    source = TensorFolder(tmp_path / "planted")
    ranges = measure(model, TOKENS)
    rough = emulated(source, made.form(ranges), tmp_path / "rough")
    smooth, after = smoothed(source, Integers(made.config), ranges)
    fine = emulated(smooth, made.form(after), tmp_path / "fine")
    assert gap(model, fine) < 0.5 * gap(model, rough)


def test_rotation_changes_nothing_that_is_not_rounded(made: Made) -> None:
    folder = RotatedFolder(made.source.folder, made.config, seed=3)
    bare = without_mtp(made.config)
    turned = read_model(folder, bare, made.model)
    assert all(torch.equal(p, torch.ones_like(p)) for p in norms_of(turned).values())
    state, before = turned.state_dict(), made.model.state_dict()
    assert not torch.allclose(state["lm_head.weight"], before["lm_head.weight"], atol=0.1)
    with torch.no_grad():
        torch.testing.assert_close(
            turned(torch.from_numpy(TOKENS)),
            made.model(torch.from_numpy(TOKENS)),
            atol=2e-4,
            rtol=0,
        )


def norms_of(model: Transformer) -> dict[str, Tensor]:
    """Weights of the norms that read the residual streams."""
    leaves = ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight")
    return {name: p for name, p in model.named_parameters() if name.endswith(leaves)}


def test_a_turn_is_orthogonal_and_drawn() -> None:
    for width, block in ((128, 128), (96, 32)):
        one, other = (turn(width, seed=seed) for seed in (1, 2))
        torch.testing.assert_close(one @ one.T, torch.eye(width, dtype=torch.float64))
        assert int((one[0] != 0).sum()) == block
        assert not torch.equal(one, other)


def test_rotation_helps_where_channels_stand_out(made: Made, tmp_path: Path) -> None:
    model = planted(made, tmp_path / "planted")
    source = TensorFolder(tmp_path / "planted")
    rough = emulated(source, made.form(measure(model, TOKENS)), tmp_path / "rough")
    folder = RotatedFolder(source.folder, made.config, seed=3)
    bare = without_mtp(made.config)
    ranges = measure(read_model(folder, bare, model), TOKENS)
    form = Integers(bare)
    known = {n: of_weight(ranges, n).whole for n in form.calibrated(folder.names)}
    form = Integers(bare, ranges=known)
    stored = write(folder, form, tmp_path / "turned")
    (tmp_path / "turned" / "config.json").write_text(json.dumps(to_hf_config(bare)))
    parity.prove_weights(folder, stored, form)
    fine = parity.reload(stored, form, folder.names)
    emulator.emulate(fine, form, stored)
    assert gap(model, fine) < 0.5 * gap(model, rough)


def test_a_rotated_bundle_says_that_it_has_no_mtp_layer(tmp_path: Path) -> None:
    make_bundle(tmp_path, "ascend", variants=("w8a8",), rotate=True, smooth=True, **LOOSE)
    folder = files_of(tmp_path / "bundle") / "w8a8"
    assert read_config(folder) == without_mtp(MODELS["v3"])
    assert not any(".layers.3." in name for name in TensorFolder(folder).names)
    card = (folder / "README.md").read_text()
    assert "Weights were rotated and smoothed" in card
    assert "The MTP layer is left out" in card
    assert "--speculative-config" not in card
    assert "and the MTP layer in bfloat16" not in card
    assert ", and 0 for multi-token prediction" in card
    assert load_pretrained(folder).config == without_mtp(MODELS["v3"])


def test_activations_are_blamed_where_weights_are_not(made: Made, tmp_path: Path) -> None:
    """Ranges far too narrow cut activations off, and no weight is wrong."""
    names = Integers(made.config).calibrated(made.source.names)
    if not names:
        return
    form = Integers(made.config, ranges=dict.fromkeys(names, (-0.05, 0.05)))
    stored = write(made.source, form, tmp_path / "narrow")
    model = parity.reload(stored, form, made.source.names)
    emulator.emulate(model, form, stored)
    measured = parity.compare(made.model, model, TOKENS).mean_kl_nats
    found = blame.find_culprit(made.source, stored, form, made.model, TOKENS, measured)
    assert "activations are to blame before weights" in str(found)


def test_bits_per_byte_are_nearer_with_smoothing(made: Made, tmp_path: Path) -> None:
    model = planted(made, tmp_path / "planted")
    source = TensorFolder(tmp_path / "planted")
    ranges = measure(model, TOKENS)
    smooth, after = smoothed(source, Integers(made.config), ranges)
    text = np.random.default_rng(4).integers(2, 384, (16, 32))
    rises: list[float] = []
    for folder, seen in ((source, ranges), (smooth, after)):
        variant = emulated(folder, made.form(seen), tmp_path / f"variant-{len(rises)}")
        found = parity.compare(model, variant, text, num_bytes=text.size)
        assert found.bits_per_byte_rise is not None
        rises.append(abs(found.bits_per_byte_rise))
    assert rises[1] < rises[0]


def test_activations_are_measured_once_for_all_variants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counted(model: Transformer, rows_NS: Int64) -> dict[str, Range]:
        calls.append(len(rows_NS))
        return measure(model, rows_NS)

    monkeypatch.setattr(variants, "measure", counted)
    make_bundle(
        tmp_path, "ascend", variants=("w8a8", "w4a8"), rotate=True, calibration_rows=3, **LOOSE
    )
    assert calls == [3]


def test_calibration_lets_no_document_see_another(made: Made) -> None:
    """As neither training nor a server does: rows of two documents are as rows of one each."""
    halves = TOKENS[:, :16].copy()
    halves[:, 0] = 0
    others = TOKENS[:, 16:].copy()
    others[:, 0] = 0
    together = measure(made.model, np.concatenate([halves, others], 1))
    # An attention that is told no positions but distances sees the same in both.
    apart = measure(made.model, np.concatenate([halves, others]))
    for name, seen in together.items():
        torch.testing.assert_close(seen.absmax_C, apart[name].absmax_C, atol=1e-4, rtol=1e-4)
