"""Promises of the CUDA variants, with transformers as the reader that is not ours."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config

from model.transformer import Transformer
from stages.export import parity
from stages.export.bundle import formats
from stages.export.cuda import Fp8Blocks
from stages.export.tensors import TensorFolder
from tests.stages.bundles import MODEL, lines, make_bundle

MAX_SHARD_BYTES = 90_000
QUANTISED = {
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cuda")
    settings: dict[str, Any] = {"min_top1_agreement": 0.5, "max_kl_nats": 0.1}
    make_bundle(root, "cuda", max_shard_bytes=MAX_SHARD_BYTES, **settings)
    return root


@dataclass
class Loaded:
    """One variant, as transformers reads it and as Ingot does."""

    theirs: Any
    info: dict[str, Any]
    ours: Transformer


@pytest.fixture(scope="module", params=["bf16", "fp8"])
def loaded(root: Path, request: pytest.FixtureRequest) -> Loaded:
    folder = root / "bundle" / request.param
    widened: dict[str, Any] = {}
    if request.param == "fp8":
        widened = {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    with warnings.catch_warnings():
        # transformers says that the file's own quantisation settings are kept beside this one.
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        both: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **widened
        )
    theirs, info = both
    form = next(form for form in formats("cuda", MODEL) if form.variant == request.param)
    names = TensorFolder(root / "checkpoint").names
    return Loaded(theirs.float().eval(), info, parity.reload(TensorFolder(folder), form, names))


def test_transformers_misses_nothing_and_finds_only_the_mtp_layer_unexpected(
    loaded: Loaded,
) -> None:
    mtp = f"model.layers.{MODEL.num_hidden_layers}."
    assert not loaded.info["missing_keys"]
    assert not loaded.info["mismatched_keys"]
    assert not loaded.info["error_msgs"]
    assert loaded.info["unexpected_keys"]
    assert all(name.startswith(mtp) for name in loaded.info["unexpected_keys"])


@torch.no_grad()
def test_transformers_gives_the_same_logits(loaded: Loaded) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens_BS = torch.randint(MODEL.vocab_size, (6, 48), generator=generator)
    torch.testing.assert_close(
        loaded.theirs(tokens_BS).logits, loaded.ours(tokens_BS), atol=1e-4, rtol=0
    )


@torch.no_grad()
def test_transformers_continues_greedily_with_the_same_tokens(loaded: Loaded) -> None:
    prompt_BS = torch.tensor([[0, 40, 17, 99, 201]])
    mask_BS = torch.ones_like(prompt_BS)
    theirs = loaded.theirs.generate(
        prompt_BS, attention_mask=mask_BS, max_new_tokens=20, do_sample=False, temperature=None
    )
    ours = prompt_BS
    while ours.shape[1] < prompt_BS.shape[1] + 20 and int(ours[0, -1]) != 1:
        ours = torch.cat([ours, loaded.ours(ours)[:, -1:].argmax(-1)], dim=1)
    assert theirs.tolist() == ours.tolist()


@pytest.mark.parametrize("variant", ["bf16", "fp8"])
def test_auto_tokenizer_encodes_as_the_tokenizers_file(root: Path, variant: str) -> None:
    theirs = AutoTokenizer.from_pretrained(root / "bundle" / variant)
    ours = Tokenizer.from_file(str(root / "checkpoint" / "tokenizer.json"))
    text = lines()
    assert len(text) == 1000
    assert theirs(text)["input_ids"] == [encoded.ids for encoded in ours.encode_batch(text)]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)


@pytest.mark.parametrize("variant", ["bf16", "fp8"])
def test_the_index_counts_the_bytes_that_the_files_hold(root: Path, variant: str) -> None:
    folder = root / "bundle" / variant
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    stored = TensorFolder(folder)
    tensors = {name: stored.read(name) for name in stored.names}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"] == stored.file_of
    files = sorted(set(stored.file_of.values()))
    assert len(files) > 2
    assert files == [f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))]
    for file in files:
        within = {name: t.nbytes for name, t in tensors.items() if stored.file_of[name] == file}
        alone = len({name.removesuffix("_scale_inv") for name in within}) == 1
        assert sum(within.values()) <= MAX_SHARD_BYTES or alone


def test_fp8_quantises_every_linear_and_nothing_else(root: Path) -> None:
    stored = TensorFolder(root / "bundle" / "fp8")
    for name in TensorFolder(root / "checkpoint").names:
        tensor = stored.read(name)
        if name.split(".")[-2] in QUANTISED:
            scales = stored.read(f"{name}_scale_inv")
            rows, columns = tensor.shape
            assert tensor.dtype == torch.float8_e4m3fn
            assert scales.dtype == torch.float32
            assert scales.shape == (-(-rows // 128), -(-columns // 128))
        else:
            wide = name.endswith("e_score_correction_bias")
            assert tensor.dtype == (torch.float32 if wide else torch.bfloat16)
            assert f"{name}_scale_inv" not in stored.file_of


def test_only_the_fp8_config_names_a_quantisation(root: Path) -> None:
    read = {
        variant: json.loads((root / "bundle" / variant / "config.json").read_text())
        for variant in ("bf16", "fp8")
    }
    assert read["fp8"].pop("quantization_config") == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    assert read["bf16"] == read["fp8"]
    assert read["bf16"]["architectures"] == ["DeepseekV3ForCausalLM"]
    assert read["bf16"]["dtype"] == "bfloat16"


def _block_by_block(weight: Tensor, scales: Tensor) -> Tensor:
    out = torch.empty(weight.shape)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            block = slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128)
            out[block] = weight[block].float() * scales[row, column]
    return out


def test_blocks_at_the_edge_count_as_padded_with_zeros() -> None:
    """576 rows are the real key-value down-projection's; transformers cannot read them."""
    x = torch.randn(576, 200, generator=torch.Generator().manual_seed(2))
    x[:, 128:] *= 100
    form, name = Fp8Blocks(), "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    parts = form.encode(name, x)
    assert parts[f"{name}_scale_inv"].shape == (5, 2)
    for row, column in ((0, 0), (4, 0), (4, 1)):
        block = x[row * 128 : row * 128 + 128, column * 128 : column * 128 + 128]
        expected = block.abs().max() / 448
        torch.testing.assert_close(parts[f"{name}_scale_inv"][row, column], expected)
    decoded = form.decode(name, parts.__getitem__)
    assert torch.equal(decoded, _block_by_block(parts[name], parts[f"{name}_scale_inv"]))
    assert ((decoded - x).abs() <= form.error_bound(name, x)).all()
    assert ((decoded - x).abs() > form.error_bound(name, x) / 2).any()
