"""Promises of the stage `export`, whatever the target."""

import json
import os
import shutil
import stat
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.delivery import ExportConfig, ExportSpec, Target
from configs.errors import ExportError, LeaseLost
from model.weights.config import read_config
from stages.artifacts import Bundle, Checkpoint, Corpus, Parity
from stages.contract import Workspace
from stages.conventions import read_conventions
from stages.export import bundle, parity
from stages.export.card import Served, render
from stages.export.cuda import Fp8Blocks
from stages.export.tensors import TensorFolder, write_weights
from stages.tokens import load_tokenizer
from tests.conftest import steal, workspace_at
from tests.stages import bundles
from tests.stages.bundles import (
    BRIEF,
    MODEL,
    MODEL_ENGRAM,
    MODELS,
    Notebook,
    make_bundle,
    make_checkpoint,
    make_corpus,
)

VARIANTS = {"cuda": ["bf16", "fp8"], "ascend": ["bf16", "w8a8"]}
LOOSE = BRIEF | bundles.LOOSE


def card_of(
    target: Target, variant: str, measured: Parity, corpus: Corpus, source: Checkpoint
) -> str:
    """The card of a variant that was asked nothing."""
    tokenizer = load_tokenizer(source.path("tokenizer.json"))
    conventions = read_conventions(source.path(), tokenizer, max_tokens=64)
    return render(Served(target, variant, measured, None, 1), corpus, source, conventions)


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Checkpoint, Corpus, Workspace]:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    return (
        checkpoint,
        make_corpus(tmp_path / "corpus"),
        workspace_at(tmp_path / "bundle", Notebook()),
    )


def _export(parts: tuple[Checkpoint, Corpus, Workspace], target: str, **settings: Any) -> Bundle:
    checkpoint, corpus, work = parts
    spec = ExportSpec.model_validate({"seed": 1, "target": target, "export": settings})
    return bundle.export(spec, work, corpus=corpus, checkpoint=checkpoint)


@pytest.mark.parametrize("target", ["cuda", "ascend"])
def test_a_bundle_holds_a_whole_folder_for_each_variant(
    parts: tuple[Checkpoint, Corpus, Workspace], target: str
) -> None:
    made = _export(parts, target, **LOOSE)
    assert made.target == target
    assert list(made.parity) == VARIANTS[target]
    work = parts[2]
    assert made.uri == work.out
    for variant, measured in made.parity.items():
        names = {path.name for path in Path(made.uri, variant).iterdir()}
        assert names >= {
            *("config.json", "tokenizer.json", "tokenizer_config.json", "README.md"),
            *("generation_config.json", "model.safetensors.index.json"),
        }
        assert measured.positions > 1000
        card = Path(made.uri, variant, "README.md").read_text()
        assert f"{measured.top1_agreement:.2%}" in card
        assert ("--quantization ascend" in card) == (variant == "w8a8")
    assert isinstance(work.tracker, Notebook)
    assert sorted(work.tracker.logged) == list(range(1, work.tracker.steps + 1))


def test_weight_files_can_be_read_by_whoever_may_read_the_folder(
    parts: tuple[Checkpoint, Corpus, Workspace],
) -> None:
    made = _export(parts, "cuda", **LOOSE)
    folder = Path(made.uri, "fp8")
    readers = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH
    weights = list(folder.glob("*.safetensors"))
    assert weights
    for path in weights:
        assert path.stat().st_mode & readers == folder.stat().st_mode & readers


@pytest.mark.parametrize(
    ("settings", "figure"),
    [
        ({"min_top1_agreement": 1.0, "max_kl_nats": 9.0}, "min_top1_agreement = 1.0"),
        ({"min_top1_agreement": 0.0, "max_kl_nats": 1e-12}, "max_kl_nats = 1e-12"),
    ],
)
def test_a_variant_that_strays_fails_the_export(
    parts: tuple[Checkpoint, Corpus, Workspace], settings: dict[str, Any], figure: str
) -> None:
    with pytest.raises(ExportError, match=rf"bf16: .*export\.{figure}"):
        _export(parts, "cuda", **settings)


def test_an_interrupted_export_leaves_nothing_in_the_next(
    parts: tuple[Checkpoint, Corpus, Workspace],
) -> None:
    leftover = Path(parts[2].out, "bf16", "model-00009.draft")
    leftover.parent.mkdir()
    leftover.write_text("half a shard")
    made = _export(parts, "ascend", **LOOSE)
    assert not leftover.exists()
    assert not list(Path(made.uri).rglob("*.draft"))


def test_two_exports_give_equal_bytes(tmp_path: Path) -> None:
    one, other = (
        make_bundle(tmp_path / name, "ascend", max_shard_bytes=400_000, **LOOSE)[0] for name in "ab"
    )
    files = sorted(p.relative_to(one.uri) for p in Path(one.uri).rglob("*") if p.is_file())
    assert files
    for file in files:
        assert Path(one.uri, file).read_bytes() == Path(other.uri, file).read_bytes(), file
    assert one.facts() == other.facts()


def test_whoever_lost_the_lease_writes_no_weights(
    parts: tuple[Checkpoint, Corpus, Workspace],
) -> None:
    steal(parts[2])
    with pytest.raises(LeaseLost):
        _export(parts, "cuda", **LOOSE)
    assert os.listdir(parts[2].out) == []


def test_a_weight_that_is_not_finite_is_named(
    parts: tuple[Checkpoint, Corpus, Workspace],
) -> None:
    path = parts[0].path("model.safetensors")
    tensors = load_file(path)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[name][0, 0] = float("inf")
    save_file(tensors, path)
    with pytest.raises(ExportError, match=rf"tensor {name}: 1 of 16384 values are not finite"):
        _export(parts, "cuda", **LOOSE)


def test_a_disk_too_small_is_said_beforehand(
    parts: tuple[Checkpoint, Corpus, Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage())
    with pytest.raises(ExportError, match=r"needs up to [\d,]+ bytes, the disk has 1,000 free"):
        _export(parts, "cuda", **LOOSE)
    assert os.listdir(parts[2].out) == []


def test_writing_holds_one_shard_and_one_tensor(
    parts: tuple[Checkpoint, Corpus, Workspace], tmp_path: Path
) -> None:
    max_shard_bytes, largest = 60_000, 0
    alive: list[weakref.ref[Tensor]] = []
    held: list[int] = []
    writes: list[int] = []

    class Watched(Fp8Blocks):
        def encode(self, name: str, x: Tensor) -> dict[str, Tensor]:
            nonlocal largest
            encoded = super().encode(name, x)
            alive.extend(weakref.ref(tensor) for tensor in encoded.values())
            largest = max(largest, sum(tensor.nbytes for tensor in encoded.values()))
            held.append(sum(t.nbytes for ref in alive if (t := ref()) is not None))
            return encoded

    folder = tmp_path / "watched"
    folder.mkdir()
    source = TensorFolder(parts[0].path())
    total = write_weights(
        source,
        Watched(MODEL),
        folder,
        max_shard_bytes=max_shard_bytes,
        before_write=lambda: writes.append(1),
    )
    assert len(writes) == len(list(folder.glob("*.safetensors"))) > 10
    assert max(held) <= max(max_shard_bytes, largest) + largest
    assert total > 7 * max(held)
    assert largest > max_shard_bytes
    layers = parity.prove_weights(source, TensorFolder(folder), Fp8Blocks(MODEL))
    assert max(one.share for one in layers.values()) <= 1


def test_layers_are_written_in_numerical_order(tmp_path: Path) -> None:
    names = ["lm_head.weight", *(f"model.layers.{n}.mlp.gate.weight" for n in range(12))]
    save_file({name: torch.ones(1) for name in names}, tmp_path / "model.safetensors")
    assert TensorFolder(tmp_path).names == names


def test_a_truncated_weight_file_is_said_to_be_one(tmp_path: Path) -> None:
    save_file({"lm_head.weight": torch.ones(99)}, tmp_path / "model.safetensors")
    os.truncate(tmp_path / "model.safetensors", 200)
    with pytest.raises(ExportError, match="not a whole safetensors file"):
        TensorFolder(tmp_path)
    with pytest.raises(ExportError, match="holds no safetensors"):
        TensorFolder(tmp_path / "nowhere")


def test_the_card_warns_of_sizes_that_fp8_kernels_refuse(
    parts: tuple[Checkpoint, Corpus, Workspace],
) -> None:
    checkpoint, corpus, _ = parts
    measured = Parity(positions=1, max_abs_logit_error=0, top1_agreement=1, mean_kl_nats=0)
    for width, warned in ((64, True), (128, False)):
        model = MODEL.model_copy(update={"moe_intermediate_size": width})
        source = checkpoint.model_copy(update={"model": model})
        card = card_of("cuda", "fp8", measured, corpus, source)
        assert ("multiples of 128" in card) == warned


@pytest.mark.parametrize(
    ("family", "variant", "said"),
    [
        ("v3", "fp8", ["DeepSeek-V3 family", "one float32 scale per", "the first 1 dense"]),
        (
            "v32",
            "fp8",
            ["an indexer picks", "a power of two,", "indexer's norm and head"],
        ),
        ("v32", "w8a8", ["indexer, router, norms", "neither rotated nor smoothed"]),
        ("v4", "bf16", ["hyper-connections in float32", "128, in 4 residual streams"]),
        (
            "v4",
            "fp8",
            ["one float32 scale, a power of two, per", "experts in FP4; these are in FP8"],
        ),
        (
            "v4",
            "w8a8",
            ["attention's output projections", "head_dim = 32 (wants 512)"],
        ),
        (
            "v4",
            "w8a8",
            ["1 with a window alone, 2 compressing by 4 and selecting, 1 "],
        ),
    ],
)
def test_the_card_says_what_is_particular_to_a_family(
    parts: tuple[Checkpoint, Corpus, Workspace], family: str, variant: str, said: list[str]
) -> None:
    checkpoint, corpus, _ = parts
    measured = Parity(positions=1, max_abs_logit_error=0, top1_agreement=1, mean_kl_nats=0)
    source = checkpoint.model_copy(update={"model": MODELS[family]})
    target: Target = "ascend" if variant == "w8a8" else "cuda"
    card = card_of(target, variant, measured, corpus, source)
    assert [words for words in said if words not in card] == []
    assert "Engram" not in card


@pytest.mark.parametrize("target", ["cuda", "ascend"])
def test_a_model_with_a_memory_is_exported_whole_and_its_card_says_who_reads_it(
    tmp_path: Path, target: Target
) -> None:
    made, checkpoint = make_bundle(tmp_path, target, MODEL_ENGRAM, **LOOSE)
    names = [name for name in TensorFolder(checkpoint.path()).names if ".engram." in name]
    assert names
    for variant in VARIANTS[target]:
        stored = TensorFolder(Path(made.uri, variant))
        kinds = {stored.read(name).dtype for name in names}
        assert kinds == {torch.bfloat16, torch.int64}
        assert not {f"{name}_scale" for name in names} & stored.file_of.keys()
        card = Path(made.uri, variant, "README.md").read_text()
        assert "library_name: ingot" in card
        assert "Neither transformers nor the servers know this memory" in card
        assert "vllm serve" not in card
        config = json.loads(Path(made.uri, variant, "config.json").read_text())
        assert config["architectures"] == ["IngotEngramForCausalLM"]
        assert read_config(Path(made.uri, variant)) == MODEL_ENGRAM


def test_the_card_says_what_the_training_text_was_and_what_of_it_is_wrong_on_purpose(
    parts: tuple[Checkpoint, Corpus, Workspace],
) -> None:
    checkpoint, corpus, _ = parts
    measured = Parity(positions=1, max_abs_logit_error=0, top1_agreement=1, mean_kl_nats=0)
    card = card_of("cuda", "bf16", measured, corpus, checkpoint)
    assert "by tokens: 60% `sums` (arithmetic), 40% `text` (files)." in card
    assert "About 25% of the training answers in `sums` are wrong on purpose" in card
    statistics = json.loads(corpus.path("statistics.json").read_text())
    statistics["sources"]["sums"]["slip_share"] = 0.0
    corpus.path("statistics.json").write_text(json.dumps(statistics))
    assert "wrong on purpose" not in card_of("cuda", "bf16", measured, corpus, checkpoint)


def test_defaults_hold_the_line() -> None:
    assert ExportConfig().min_top1_agreement >= 0.9
    assert ExportConfig().max_kl_nats <= 0.05
