"""Promises of the proof that a bundle reproduces its source."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.delivery import ExportConfig, Target
from configs.errors import ExportError
from configs.model import V3Config
from model.transformer import Transformer
from model.weights.files import load_pretrained
from stages.artifacts import Parity
from stages.evaluate.text import byte_lengths, score_text
from stages.export import parity
from stages.export.cuda import Fp8Blocks
from stages.export.formats import Bf16, Format, half_step
from stages.export.tensors import TensorFolder, write_weights
from stages.export.variants import formats
from stages.tokens import load_tokenizer
from tests.stages.bundles import (
    LOOSE,
    MODEL,
    MODEL_ENGRAM,
    MODELS,
    ROWS,
    SEQUENCE_TOKENS,
    files_of,
    make_bundle,
    make_checkpoint,
    make_corpus,
    make_tokenizer,
)

VARIANTS = {form.variant: form for target in ("cuda", "ascend") for form in formats(target, MODEL)}
BLOCK = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parity")
    for target in ("cuda", "ascend"):
        # Without calibration a format needs to know nothing but the model.
        make_bundle(root / target, target, calibration_rows=0, **LOOSE)
    return root


@pytest.fixture
def copied(root: Path, tmp_path: Path) -> Callable[[str], tuple[TensorFolder, Path, Format]]:
    """Source, a copy of one variant that a test may damage, and its format."""

    def copy(variant: str) -> tuple[TensorFolder, Path, Format]:
        target = "ascend" if variant == "w8a8" else "cuda"
        shutil.copytree(files_of(root / target / "bundle") / variant, tmp_path / variant)
        return (
            TensorFolder(files_of(root / target / "checkpoint")),
            tmp_path / variant,
            VARIANTS[variant],
        )

    return copy


def _edit(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a folder's one weight file, and its index with them."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    for index in folder.glob("*.index.json"):
        total = sum(tensor.nbytes for tensor in tensors.values())
        weight_map = dict.fromkeys(tensors, path.name)
        index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def largest(layers: dict[str, parity.LayerErrors]) -> float:
    """How near any element comes to its bound."""
    return max(one.share for one in layers.values())


def _put(folder: Path, changed: dict[str, Tensor]) -> None:
    _edit(folder, lambda tensors: tensors.update(changed))


@pytest.mark.parametrize("variant", VARIANTS)
def test_rounding_comes_close_to_its_bound_and_never_beyond(
    copied: Callable[[str], tuple[TensorFolder, Path, Format]], variant: str
) -> None:
    source, folder, form = copied(variant)
    assert 0.99 < largest(parity.prove_weights(source, TensorFolder(folder), form)) <= 1


@pytest.mark.parametrize("family", [*MODELS, "engram"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_of_every_family_is_proved(tmp_path: Path, family: str, variant: str) -> None:
    model = MODELS.get(family, MODEL_ENGRAM)
    make_checkpoint(tmp_path / "checkpoint", model)
    target: Target = "ascend" if variant == "w8a8" else "cuda"
    (form,) = (form for form in formats(target, model) if form.variant == variant)
    source, folder = TensorFolder(files_of(tmp_path / "checkpoint")), tmp_path / variant
    folder.mkdir()
    write_weights(source, form, folder, max_shard_bytes=10**9, before_write=lambda: None)
    assert 0.98 < largest(parity.prove_weights(source, TensorFolder(folder), form)) <= 1
    # What is not rounded must be right to the last bit: the first such tensor of each type.
    exact: dict[torch.dtype, str] = {}
    for name in source.names:
        x = source.read(name)
        if not x.is_floating_point() or not bool(form.error_bound(name, x).any()):
            exact.setdefault(x.dtype, name)
    assert len(exact) == (1 if isinstance(model, V3Config) else 2 + bool(model.engram))
    for name in exact.values():
        x = source.read(name)
        bits = x.view({4: torch.int32, 8: torch.int64}[x.element_size()]) ^ 1
        _put(folder, {name: bits.view(x.dtype)})
        with pytest.raises(ExportError, match=rf"tensor {name}, element 0"):
            parity.prove_weights(source, TensorFolder(folder), form)
        _put(folder, {name: x})


@pytest.mark.parametrize(
    ("variant", "part", "factor"),
    [("fp8", "_scale_inv", 1.2), ("w8a8", "_scale", 1.02), ("bf16", "", 1.02)],
)
def test_a_corrupted_weight_or_scale_is_named(
    copied: Callable[[str], tuple[TensorFolder, Path, Format]],
    variant: str,
    part: str,
    factor: float,
) -> None:
    source, folder, form = copied(variant)
    _edit(folder, lambda tensors: tensors[f"{BLOCK}{part}"][0].mul_(factor))
    with pytest.raises(ExportError, match=rf"{variant}: tensor {BLOCK}.*apart by more than"):
        parity.prove_weights(source, TensorFolder(folder), form)


def test_a_corrupted_scale_shows_in_the_logits(
    copied: Callable[[str], tuple[TensorFolder, Path, Format]], root: Path, tmp_path: Path
) -> None:
    source, folder, form = copied("w8a8")
    corpus = make_corpus(tmp_path / "corpus")
    rows_NS = parity.held_out_rows(corpus, 8, seed=1)
    reference = load_pretrained(source.folder)

    def measure() -> Parity:
        variant = parity.reload(TensorFolder(folder), form, source.names)
        return parity.compare(reference, variant, rows_NS)

    parity.require(measure(), "w8a8", ExportConfig(max_kl_nats=0.01))
    _edit(folder, lambda tensors: tensors[f"{BLOCK}_scale"].mul_(8))
    with pytest.raises(ExportError, match=r"w8a8: .*export\.(min_top1_agreement|max_kl_nats)"):
        parity.require(measure(), "w8a8", ExportConfig(max_kl_nats=0.01))


def test_a_scale_that_is_not_a_number_is_no_agreement(
    copied: Callable[[str], tuple[TensorFolder, Path, Format]],
) -> None:
    source, folder, form = copied("fp8")
    _edit(folder, lambda tensors: tensors[f"{BLOCK}_scale_inv"].fill_(float("nan")))
    with pytest.raises(ExportError, match=BLOCK):
        parity.prove_weights(source, TensorFolder(folder), form)
    variant = parity.reload(TensorFolder(folder), form, source.names)
    rows_NS = np.full((1, 8), 5, dtype=np.int64)
    with pytest.raises(ExportError, match="not finite"):
        parity.compare(load_pretrained(source.folder), variant, rows_NS)


def test_every_source_tensor_is_there_exactly_once(
    copied: Callable[[str], tuple[TensorFolder, Path, Format]],
) -> None:
    source, folder, form = copied("fp8")
    kept = dict(load_file(next(folder.glob("*.safetensors"))))
    _edit(folder, lambda tensors: tensors.pop(f"{BLOCK}_scale_inv"))
    with pytest.raises(ExportError, match=rf"tensor {BLOCK}_scale_inv is missing"):
        parity.prove_weights(source, TensorFolder(folder), form)
    _edit(folder, lambda tensors: tensors.update(kept, **{"model.more.weight": torch.ones(1)}))
    with pytest.raises(ExportError, match=r"model\.more\.weight stands for no tensor"):
        parity.prove_weights(source, TensorFolder(folder), form)
    save_file({BLOCK: torch.ones(1)}, folder / "twice.safetensors")
    with pytest.raises(ExportError, match=rf"tensor {BLOCK} lies in .* and in twice"):
        TensorFolder(folder)


@pytest.mark.parametrize("field", ["total_size", "weight_map"])
def test_an_index_that_disagrees_with_the_files_is_refused(
    copied: Callable[[str], tuple[TensorFolder, Path, Format]], field: str
) -> None:
    source, folder, form = copied("bf16")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    if field == "total_size":
        index["metadata"]["total_size"] += 1
    else:
        index["weight_map"][BLOCK] = "elsewhere.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ExportError, match=r"index\.json: (total_size|disagrees)"):
        parity.prove_weights(source, TensorFolder(folder), form)


def test_figures_equal_those_computed_position_by_position(root: Path, tmp_path: Path) -> None:
    source, variant = (Transformer(MODEL).initialize(seed).eval() for seed in (1, 2))
    corpus = make_corpus(tmp_path / "corpus", rows=3)
    rows_NS = parity.held_out_rows(corpus, 6, seed=1)
    errors, agree, kls = [], [], []
    with torch.no_grad():
        for row in torch.from_numpy(rows_NS):
            logits = [model(row[None])[0] for model in (source, variant)]
            for position in range(len(row) - 1):
                if int(row[position + 1]) == 0:
                    continue
                p, q = (one[position].double() for one in logits)
                errors.append(float((p - q).abs().max()))
                agree.append(int(p.argmax()) == int(q.argmax()))
                log_p, log_q = p.log_softmax(0), q.log_softmax(0)
                kl = torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
                kls.append(float(kl))
    measured = parity.compare(source, variant, rows_NS)
    padded = SEQUENCE_TOKENS // 2
    assert measured.positions == len(errors) == 6 * (SEQUENCE_TOKENS - 1) - 2 * padded
    assert measured.max_abs_logit_error == pytest.approx(max(errors), rel=1e-4)
    assert measured.top1_agreement == pytest.approx(np.mean(agree))
    assert measured.mean_kl_nats == pytest.approx(np.mean(kls), rel=1e-4)


def test_bits_per_byte_are_those_that_evaluation_measures(tmp_path: Path) -> None:
    source, variant = (Transformer(MODEL).initialize(seed).eval() for seed in (1, 2))
    make_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    text = [tokenizer.encode(f"{n}+{n}={2 * n}", add_special_tokens=False).ids for n in range(90)]
    tokens = [token for ids in text for token in (0, *ids, 1)]
    rows_NS = np.array(tokens[: len(tokens) // 40 * 40]).reshape(-1, 40)
    lengths_V = byte_lengths(tmp_path / "tokenizer.json")
    num_bytes = parity.bytes_of(tokenizer, rows_NS)
    measured = parity.compare(source, variant, rows_NS, num_bytes=num_bytes)
    for found, model in (
        (measured.source_bits_per_byte, source),
        (measured.bits_per_byte, variant),
    ):
        expected = score_text(model, rows_NS, lengths_V)
        assert expected.bytes == num_bytes
        assert found == pytest.approx(expected.bits_per_byte, rel=1e-5)
    rise = measured.bits_per_byte_rise
    assert rise is not None
    assert rise == pytest.approx(measured.measured()["bits_per_byte_rise"])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"top1_agreement": 0.8}, r"agreement .* 0\.8000, below export\.min_top1_agreement = 0\.9"),
        ({"mean_kl_nats": 0.2}, r"KL .* 0\.2 nats, above export\.max_kl_nats = 0\.05"),
        (
            {"bits_per_byte": 2.05},
            r"2\.0500 bits per byte, in the source 2\.0000: more by 2\.50%, above "
            r"export\.max_bits_per_byte_rise = 0\.01",
        ),
        (
            {"greedy_agreement": 0.4},
            r"greedily 0\.4000 .*below export\.min_greedy_agreement = 0\.5",
        ),
    ],
)
def test_a_figure_beyond_its_threshold_is_said_with_value_setting_and_tensor(
    changed: dict[str, float], said: str
) -> None:
    figures = {
        "positions": 9,
        "max_abs_logit_error": 0.1,
        "top1_agreement": 0.95,
        "mean_kl_nats": 0.01,
        "source_bits_per_byte": 2.0,
        "bits_per_byte": 2.01,
        "greedy_agreement": 0.6,
    }
    config = ExportConfig()
    parity.require(Parity.model_validate(figures), "fp8", config, lambda: "; never asked")
    measured = Parity.model_validate(figures | changed)
    with pytest.raises(ExportError, match=rf"^fp8: .*{said}; up_proj; train .* that setting$"):
        parity.require(measured, "fp8", config, lambda: "; up_proj")


def test_the_worst_tensors_of_each_layer_are_known(
    copied: Callable[[str], tuple[TensorFolder, Path, Format]],
) -> None:
    source, folder, form = copied("w8a8")
    stored = TensorFolder(folder)
    layers = parity.prove_weights(source, stored, form)
    assert {"model.layers.0", "model.layers.2", "lm_head.weight"} < layers.keys()
    within = [name for name in source.names if name.startswith("model.layers.2.")]
    lengths = {name: float(source.read(name).norm()) for name in within}
    errors = {
        name: float((form.decode(name, stored.read) - source.read(name)).norm()) / lengths[name]
        for name in within
    }
    worst = layers["model.layers.2"]
    assert worst.coarsest == max(errors, key=errors.__getitem__)
    assert worst.relative_error == pytest.approx(max(errors.values()), rel=1e-5)
    assert 0.002 < worst.relative_error < 0.02
    assert parity.layer_of("mtp.0.norm.weight") == "mtp.0"


def test_a_model_agrees_wholly_with_itself(tmp_path: Path) -> None:
    model = Transformer(MODEL).initialize(1).eval()
    measured = parity.compare(model, model, np.full((9, 8), 5, dtype=np.int64))
    assert measured == Parity(positions=63, max_abs_logit_error=0, top1_agreement=1, mean_kl_nats=0)
    with pytest.raises(ExportError, match="nothing but padding"):
        parity.compare(model, model, np.zeros((2, 8), dtype=np.int64))


def test_rows_are_fixed_by_the_seed_and_shared_between_sources(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    rows_NS = parity.held_out_rows(corpus, 9, seed=1)
    assert rows_NS.shape == (9, SEQUENCE_TOKENS)
    assert np.array_equal(rows_NS, parity.held_out_rows(corpus, 9, seed=1))
    assert not np.array_equal(rows_NS, parity.held_out_rows(corpus, 9, seed=2))
    assert len(np.unique(rows_NS, axis=0)) == 9
    assert len(parity.held_out_rows(corpus, 10_000, seed=1)) == 2 * ROWS
    uneven = corpus.model_copy(update={"held_out_rows": {"sums": 1, "text": ROWS}})
    assert len(parity.held_out_rows(uneven, 9, seed=1)) == 9
    nothing = corpus.model_copy(update={"held_out_rows": {"sums": 0}})
    with pytest.raises(ExportError, match="no held-out rows"):
        parity.held_out_rows(nothing, 9, seed=1)


def test_half_a_step_is_half_the_distance_to_the_next_number() -> None:
    bfloat = torch.tensor([1.0, 1.5, -3.0, 1e-3, 7e30, 2.0**-126, 2.0**-130]).bfloat16()
    # One more in the last place: neighbours in value are neighbours as integers.
    above = (bfloat.view(torch.int16) + 1).view(torch.bfloat16)
    expected = (above.double() - bfloat.double()).abs() / 2
    assert torch.equal(half_step(bfloat.double(), bits=8, smallest_exponent=-126), expected)
    fp8 = torch.tensor([1.0, 15.0, -400.0, 2.0**-6, 2.0**-9]).to(torch.float8_e4m3fn)
    above = (fp8.view(torch.uint8) + 1).view(torch.float8_e4m3fn)
    expected = (above.double() - fp8.double()).abs() / 2
    assert torch.equal(half_step(fp8.double(), bits=4, smallest_exponent=-6), expected)


def test_a_zero_must_stay_zero_in_bfloat16() -> None:
    bound = Bf16(MODEL).error_bound("model.norm.weight", torch.zeros(2))
    assert bound.max() < 2.0**-133


def joint_rows(stored: TensorFolder, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(as a server's one matrix reads, as each by itself) of block-scaled matrices, row by row.

    What vLLM's loader does: rows one below the other, each matrix's scales from row
    ceil(first row / 128) of a grid of ceil(rows / 128), and row r scaled by grid row r // 128.
    """
    weights = [stored.read(name).float() for name in names]
    scales = [stored.read(f"{name}_scale_inv").float() for name in names]
    total = sum(len(weight) for weight in weights)
    grid = torch.zeros((total + 127) // 128, scales[0].shape[1])
    joint, alone, begin = [], [], 0
    for weight, scale in zip(weights, scales, strict=True):
        first = (begin + 127) // 128
        for row in range(len(scale)):
            if first + row < len(grid):
                grid[first + row] = scale[row]
        begin += len(weight)
    number = 0
    for weight, scale in zip(weights, scales, strict=True):
        for row in range(len(weight)):
            columns = torch.arange(weight.shape[1]) // 128
            joint.append(weight[row] * grid[number // 128][columns])
            alone.append(weight[row] * scale[row // 128][columns])
            number += 1
    return torch.stack(joint), torch.stack(alone)


def test_a_fused_block_scaled_loader_reads_every_row_of_an_fp8_bundle_right(root: Path) -> None:
    stored = TensorFolder(files_of(root / "cuda" / "bundle") / "fp8")
    groups = [
        ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
        ("mlp.experts.3.gate_proj", "mlp.experts.3.up_proj"),
    ]
    read = 0
    for layer in range(MODEL.num_hidden_layers + 1):
        for group in groups:
            names = [f"model.layers.{layer}.{module}.weight" for module in group]
            if names[0] in stored.file_of:
                joint, alone = joint_rows(stored, names)
                assert torch.equal(joint, alone), names
                read += 1
    assert read >= 10
    assert parity.prove_fused(stored, Fp8Blocks(MODEL)) > read


def test_a_rank_that_ends_within_a_block_is_caught_by_the_fused_reading(tmp_path: Path) -> None:
    model = MODEL.model_copy(update={"q_lora_rank": 64})
    make_checkpoint(tmp_path / "checkpoint", model)
    source, folder = TensorFolder(files_of(tmp_path / "checkpoint")), tmp_path / "fp8"
    folder.mkdir()
    write_weights(
        source, Fp8Blocks(model), folder, max_shard_bytes=10**9, before_write=lambda: None
    )
    stored = TensorFolder(folder)
    names = [f"model.layers.0.self_attn.{one}.weight" for one in ("q_a_proj", "kv_a_proj_with_mqa")]
    joint, alone = joint_rows(stored, names)
    assert int((joint != alone).any(1).sum()) == 64
    with pytest.raises(ExportError, match=r"kv_a_proj_with_mqa.* 64 of its 144 rows by another"):
        parity.prove_fused(stored, Fp8Blocks(model))
    with pytest.raises(ExportError, match=r"q_lora_rank = 64 is no multiple of 128.*leave it out"):
        formats("cuda", model)
    assert [
        form.variant for form in formats("cuda", model, ExportConfig(variants=("bf16", "w8a8")))
    ] == ["bf16"]
