"""Promises of the CUDA variants, with transformers as the reader that is not ours."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config

from configs.delivery import ExportConfig
from configs.errors import ExportError
from configs.model import ModelConfig
from model.transformer import Transformer
from model.weights.files import load_pretrained
from stages.export import parity
from stages.export.cuda import Fp4Experts, Fp8Blocks
from stages.export.tensors import TensorFolder
from stages.export.variants import formats
from stages.framing import BOS_ID, EOS_TOKEN
from stages.tokens import load_tokenizer
from tests.stages.bundles import (
    LOOSE,
    MODELS,
    chat_ids,
    files_of,
    lines,
    make_bundle,
    unquantised_dtype,
)

MAX_SHARD_BYTES = 90_000
_V3_LINEARS = {
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
}
QUANTISED = {
    "v3": _V3_LINEARS,
    "v32": _V3_LINEARS | {"wq_b", "wk"},
    "v4": {"wq_a", "wq_b", "wkv", "wo_a", "wo_b", "w1", "w2", "w3", "e_proj", "h_proj"},
}
"""As in the released files of each family, wherever it is not in a compressor."""
_SCHEME = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
SCHEMES: dict[str, dict[str, Any]] = {
    "v3": _SCHEME,
    "v32": _SCHEME | {"scale_fmt": "ue8m0"},
    "v4": _SCHEME | {"scale_fmt": "ue8m0", "expert_dtype": "fp8"},
}
ARCHITECTURES = {
    "v3": "DeepseekV3ForCausalLM",
    "v32": "DeepseekV32ForCausalLM",
    "v4": "DeepseekV4ForCausalLM",
}


@dataclass(frozen=True)
class Made:
    """A bundle's folder and the model it was made of."""

    root: Path
    model: ModelConfig

    @property
    def family(self) -> str:
        return self.model.family

    @property
    def source(self) -> Path:
        """The checkpoint's files."""
        return files_of(self.root / "checkpoint")

    def folder(self, variant: str) -> Path:
        """Those of one variant."""
        return files_of(self.root / "bundle") / variant

    def scales(self, name: str) -> str | None:
        """Where the scales of the tensor `name` must lie, if it must have any."""
        *path, module, _ = ("", *name.split("."))
        if module not in QUANTISED[self.family] or "compressor" in path:
            return None
        return f"{name[:-7]}.scale" if self.family == "v4" else f"{name}_scale_inv"


@pytest.fixture(scope="module", params=MODELS)
def made(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Made:
    root, model = tmp_path_factory.mktemp("cuda"), MODELS[request.param]
    make_bundle(root, "cuda", model, max_shard_bytes=MAX_SHARD_BYTES, **LOOSE)
    return Made(root, model)


@dataclass
class Loaded:
    """One variant, as transformers reads it and as Ingot does."""

    model: ModelConfig
    theirs: Any
    info: dict[str, Any]
    ours: Transformer


@pytest.fixture(scope="module", params=["bf16", "fp8"])
def loaded(made: Made, request: pytest.FixtureRequest) -> Loaded:
    folder = made.folder(request.param)
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
    form = next(form for form in formats("cuda", made.model) if form.variant == request.param)
    names = TensorFolder(made.source).names
    ours = parity.reload(TensorFolder(folder), form, names)
    return Loaded(made.model, theirs.float().eval(), info, ours)


def test_transformers_misses_nothing_and_finds_only_the_mtp_layer_unexpected(
    loaded: Loaded,
) -> None:
    mtp = f"model.layers.{loaded.model.num_hidden_layers}."
    assert not loaded.info["missing_keys"]
    assert not loaded.info["mismatched_keys"]
    assert not loaded.info["error_msgs"]
    # Of V4 it knows that there is such a layer, and says nothing of it.
    assert bool(loaded.info["unexpected_keys"]) == (loaded.model.family != "v4")
    assert all(name.startswith(mtp) for name in loaded.info["unexpected_keys"])


@torch.no_grad()
def test_transformers_gives_the_same_logits(loaded: Loaded) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens_BS = torch.randint(loaded.model.vocab_size, (6, 48), generator=generator)
    torch.testing.assert_close(
        loaded.theirs(tokens_BS).logits, loaded.ours(tokens_BS), atol=1e-4, rtol=0
    )


@torch.no_grad()
@pytest.mark.parametrize("variant", ["bf16", "fp8"])
def test_ingots_own_reader_of_released_folders_reads_the_same_weights(
    made: Made, variant: str
) -> None:
    folder = made.folder(variant)
    form = next(form for form in formats("cuda", made.model) if form.variant == variant)
    names = TensorFolder(made.source).names
    proved = parity.reload(TensorFolder(folder), form, names).state_dict()
    read = load_pretrained(folder).state_dict()
    assert read.keys() == proved.keys()
    assert all(torch.equal(read[name], proved[name]) for name in proved)


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
def test_auto_tokenizer_encodes_as_training_did(made: Made, variant: str) -> None:
    theirs = AutoTokenizer.from_pretrained(made.folder(variant))
    ours = load_tokenizer(made.source / "tokenizer.json")
    text = lines()
    assert len(text) == 1000
    expected = [[BOS_ID, *one.ids] for one in ours.encode_batch(text, add_special_tokens=False)]
    plain = [number for number, line in enumerate(text) if EOS_TOKEN not in line]
    assert 800 < len(plain) < 1000
    found = theirs(text)["input_ids"]
    assert [found[number] for number in plain] == [expected[number] for number in plain]
    # Clients look for special tokens in text unless they are told that there are none.
    assert theirs(text, split_special_tokens=True)["input_ids"] == expected
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)


def test_a_chat_begins_as_training_texts_do_and_ends_each_answer(made: Made) -> None:
    theirs = AutoTokenizer.from_pretrained(made.folder("bf16"))
    ours = load_tokenizer(made.source / "tokenizer.json")

    def ids(text: str) -> list[int]:
        return list(ours.encode(text, add_special_tokens=False).ids)

    def chat(*contents: str, **settings: Any) -> list[int]:
        roles = ("user", "assistant") * len(contents)
        turns = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
        return chat_ids(theirs, turns, **LOOSE)

    assert chat("12+34=", add_generation_prompt=True) == [0, *ids("12+34=")]
    assert chat("12+34=", "640", "5+5=", add_generation_prompt=True) == [
        *(0, *ids("12+34="), *ids("640"), 1),
        *(0, *ids("5+5=")),
    ]
    assert chat("12+34=", "6", continue_final_message=True) == [0, *ids("12+34="), *ids("6")]


@pytest.mark.parametrize("variant", ["bf16", "fp8"])
def test_the_index_counts_the_bytes_that_the_files_hold(made: Made, variant: str) -> None:
    folder = made.folder(variant)
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
        owners = {name.removesuffix("_scale_inv").removesuffix(".scale") for name in within}
        alone = len({owner.removesuffix(".weight") for owner in owners}) == 1
        assert sum(within.values()) <= MAX_SHARD_BYTES or alone


def test_fp8_quantises_every_linear_and_nothing_else(made: Made) -> None:
    stored = TensorFolder(made.folder("fp8"))
    expected = set()
    for name in TensorFolder(made.source).names:
        tensor, at = stored.read(name), made.scales(name)
        expected |= {name, at} - {None}
        if at is None:
            assert tensor.dtype == unquantised_dtype(name)
            continue
        scales = stored.read(at)
        rows, columns = tensor.shape
        assert tensor.dtype == torch.float8_e4m3fn
        # vLLM 0.32 would take V4's experts' scales for codes of FP4 if they were E8M0.
        assert scales.dtype == torch.float32
        assert scales.shape == (-(-rows // 128), -(-columns // 128))
        powers_of_two = bool((torch.frexp(scales.float()).mantissa == 0.5).all())
        assert powers_of_two or made.family == "v3"
    assert set(stored.names) == expected


def test_only_the_fp8_config_names_a_quantisation(made: Made) -> None:
    read = {
        variant: json.loads((made.folder(variant) / "config.json").read_text())
        for variant in ("bf16", "fp8")
    }
    assert read["fp8"].pop("quantization_config") == SCHEMES[made.family]
    assert read["fp8"].pop("expert_dtype", None) == SCHEMES[made.family].get("expert_dtype")
    assert read["bf16"] == read["fp8"]
    assert read["bf16"]["architectures"] == [ARCHITECTURES[made.family]]
    assert read["bf16"]["dtype"] == "bfloat16"


def _block_by_block(weight: Tensor, scales: Tensor) -> Tensor:
    out = torch.empty(weight.shape)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            block = slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128)
            out[block] = weight[block].float() * scales[row, column]
    return out


@pytest.mark.parametrize(
    ("family", "name", "scale_name"),
    [
        ("v3", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight", None),
        ("v32", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight", None),
        ("v4", "layers.0.attn.wkv.weight", "layers.0.attn.wkv.scale"),
    ],
)
def test_blocks_at_the_edge_count_as_padded_with_zeros(
    family: str, name: str, scale_name: str | None
) -> None:
    """576 rows are the real key-value down-projection's; transformers cannot read them."""
    x = torch.randn(576, 200, generator=torch.Generator().manual_seed(2))
    x[:, 128:] *= 100
    form = Fp8Blocks(MODELS[family])
    parts = form.encode(name, x)
    scales = parts[scale_name or f"{name}_scale_inv"].float()
    assert scales.shape == (5, 2)
    for row, column in ((0, 0), (4, 0), (4, 1)):
        block = x[row * 128 : row * 128 + 128, column * 128 : column * 128 + 128]
        expected = block.abs().max() / 448
        if family != "v3":
            expected = 2 ** expected.log2().ceil()
        torch.testing.assert_close(scales[row, column], expected)
    decoded = form.decode(name, parts.__getitem__)
    assert torch.equal(decoded, _block_by_block(parts[name], scales))
    assert ((decoded - x).abs() <= form.error_bound(name, x)).all()
    assert ((decoded - x).abs() > form.error_bound(name, x) / 2).any()


def test_a_scale_that_is_a_power_of_two_already_is_kept() -> None:
    """An off-by-one in rounding up would give such a block twice its scale, and the bound too."""
    x = torch.full((128, 128), 448.0 * 2.0**-7)
    x[0, 1] = 2.0**-16
    form, name = Fp8Blocks(MODELS["v4"]), "layers.0.attn.wq_a.weight"
    parts = form.encode(name, x)
    assert parts["layers.0.attn.wq_a.scale"].float().tolist() == [[2.0**-7]]
    assert form.decode(name, parts.__getitem__)[0, 1] == 2.0**-16
    # Half the smallest step of E4M3, 2^-9, under that scale.
    assert form.error_bound(name, x)[0, 1] == pytest.approx(2.0**-10 * 2.0**-7, rel=1e-5)


def test_scales_may_be_powers_of_two_on_request(tmp_path: Path) -> None:
    """Of V3, whose released models have any float32."""
    make_bundle(tmp_path, "cuda", variants=("fp8",), fp8_scales="ue8m0", **LOOSE)
    folder = files_of(tmp_path / "bundle") / "fp8"
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["scale_fmt"] == "ue8m0"
    stored = TensorFolder(folder)
    scales = [stored.read(n) for n in stored.names if n.endswith("_scale_inv")]
    assert scales
    for scale in scales:
        assert scale.dtype == torch.float32
        assert torch.equal(scale.log2(), scale.log2().round())
    assert load_pretrained(folder).config == MODELS["v3"]


def test_v4_has_no_other_scales() -> None:
    with pytest.raises(ExportError, match=r'export.fp8_scales = "float32", but V4 has'):
        formats("cuda", MODELS["v4"], ExportConfig(fp8_scales="float32"))
    (form,) = formats("cuda", MODELS["v4"], ExportConfig(variants=("fp8",), fp8_scales="ue8m0"))
    assert form == Fp8Blocks(MODELS["v4"])


@pytest.fixture(scope="module")
def fp4(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("fp4")
    make_bundle(root, "cuda", MODELS["v4"], variants=("fp4",), **LOOSE)
    return Made(root, MODELS["v4"])


def test_experts_in_fp4_lie_as_released_ones_do(fp4: Made) -> None:
    """Each code and scale against the definition, expert by expert, the MTP layer's too."""
    stored, source = TensorFolder(fp4.folder("fp4")), TensorFolder(fp4.source)
    magnitudes = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    values = torch.tensor([*magnitudes, *(-one for one in magnitudes)])
    experts = [name for name in source.names if ".experts." in name]
    assert any(name.startswith("mtp.") for name in experts)
    for name in experts:
        x, packed = source.read(name), stored.read(name)
        scale = stored.read(f"{name.removesuffix('.weight')}.scale")
        assert (packed.dtype, scale.dtype) == (torch.int8, torch.float8_e8m0fnu)
        assert packed.shape == (x.shape[0], x.shape[1] // 2)
        assert scale.shape == (x.shape[0], x.shape[1] // 32)
        bytes_RH = packed.view(torch.uint8).int()
        found = torch.empty_like(x)
        found[:, ::2], found[:, 1::2] = values[bytes_RH & 15], values[bytes_RH >> 4]
        groups = (x.abs() / scale.float().repeat_interleave(32, 1)).unflatten(1, (-1, 32)).amax(2)
        assert ((groups > 3) & (groups <= 6)).all()
        spread = scale.float().repeat_interleave(32, 1)
        nearest = (values - (x / spread).unsqueeze(-1)).abs().amin(-1)
        assert torch.equal((found - x / spread).abs(), nearest)


def test_all_but_experts_is_as_in_fp8_with_scales_in_a_byte(fp4: Made) -> None:
    stored, form = TensorFolder(fp4.folder("fp4")), Fp8Blocks(fp4.model)
    source = TensorFolder(fp4.source)
    for name in source.names:
        if ".experts." not in name:
            x = source.read(name)
            x = x.float() if x.is_floating_point() else x
            for part, tensor in form.encode(name, x).items():
                same = stored.read(part)
                is_scale = part.endswith(".scale")
                assert same.dtype == (torch.float8_e8m0fnu if is_scale else tensor.dtype)
                assert torch.equal(same.float(), tensor.float()), part
    config = json.loads((fp4.folder("fp4") / "config.json").read_text())
    assert config["expert_dtype"] == config["quantization_config"]["expert_dtype"] == "fp4"


def test_fp4_is_read_back(fp4: Made) -> None:
    form = Fp4Experts(fp4.model)
    proved = parity.reload(TensorFolder(fp4.folder("fp4")), form, TensorFolder(fp4.source).names)
    read = load_pretrained(fp4.folder("fp4")).state_dict()
    assert all(torch.equal(read[name], x) for name, x in proved.state_dict().items())


def test_fp4_is_for_v4_alone() -> None:
    with pytest.raises(ExportError, match="asks for fp4, but the model is of family v3"):
        formats("cuda", MODELS["v3"], ExportConfig(variants=("fp4",)))
