"""What stands beside the weights is proved, and what is wrong there is named by file and row."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.delivery import Target
from configs.errors import ExportError
from stages.conventions import read_conventions
from stages.export import proofs
from stages.export.formats import Format
from stages.export.tensors import TensorFolder
from stages.export.variants import formats
from stages.tokens import load_tokenizer
from tests.stages.bundles import MODEL, MODEL_V4, files_of, make_bundle

EXPERT = "model.layers.1.mlp.experts.3.up_proj"
NORM = "model.layers.0.input_layernorm.weight"
Rows = dict[str, Any]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("proofs")
    open_: dict[str, Any] = {"min_top1_agreement": 0.0, "max_kl_nats": 9.0, "problems": 0}
    make_bundle(root / "ascend", "ascend", variants=("w8a8",), **open_)
    make_bundle(root / "cuda", "cuda", MODEL_V4, variants=("fp8",), **open_)
    return root


@pytest.fixture
def folder(root: Path, tmp_path: Path) -> Path:
    """A copy of the INT8 variant that a test may change."""
    shutil.copytree(files_of(root / "ascend" / "bundle") / "w8a8", tmp_path / "w8a8")
    return tmp_path / "w8a8"


@pytest.fixture
def fp8(root: Path, tmp_path: Path) -> Path:
    """A copy of V4's FP8 variant that a test may change."""
    shutil.copytree(files_of(root / "cuda" / "bundle") / "fp8", tmp_path / "fp8")
    return tmp_path / "fp8"


def form_of(target: Target) -> Format:
    model, variant = (MODEL, "w8a8") if target == "ascend" else (MODEL_V4, "fp8")
    return next(form for form in formats(target, model) if form.variant == variant)


def edit(path: Path, change: Callable[[Any], object]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def linear(name: str, kind: str) -> Callable[[Rows], object]:
    """Another type for all tensors of one Linear."""
    leaves = ("weight", "weight_scale", "weight_offset")
    return lambda rows: rows.update({f"{name}.{leaf}": kind for leaf in leaves})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows.pop(NORM), rf"no row for tensor {NORM}"),
        (lambda rows: rows.update(more="FLOAT"), r"row more stands for no stored tensor"),
        (lambda rows: rows.pop("version"), r"no row version"),
        (lambda rows: rows.update({NORM: "W9"}), rf"row {NORM} has the type 'W9', which is none"),
        (
            lambda rows: rows.update({NORM: "W8A8_DYNAMIC"}),
            rf"row {NORM} says W8A8_DYNAMIC, which needs .*input_layernorm\.weight_offset",
        ),
        (linear(EXPERT, "W8A8"), rf"row {EXPERT}\.weight says W8A8, which needs .*deq_scale"),
        (
            lambda rows: rows.update({f"{EXPERT}.weight": "FLOAT"}),
            rf"row {EXPERT}\.weight says FLOAT of int8",
        ),
        (
            lambda rows: rows.update({f"{EXPERT}.weight_scale": "FLOAT"}),
            rf"row {EXPERT}\.weight_scale says FLOAT, row {EXPERT}\.weight W8A8_DYNAMIC",
        ),
        (
            lambda rows: rows.update({f"{EXPERT}.weight_offset": "W4A8_DYNAMIC"}),
            rf"row {EXPERT}\.weight_offset says W4A8_DYNAMIC, row {EXPERT}\.weight W8A8_DYNAMIC",
        ),
        (
            lambda rows: rows.update(model_quant_type="W4A8_DYNAMIC"),
            r"row model_quant_type = 'W4A8_DYNAMIC', but no tensor has that type",
        ),
        (lambda rows: rows.update(model_quant_type="no"), r"model_quant_type has the type 'no'"),
    ],
)
def test_a_wrong_row_of_the_description_is_named(
    folder: Path, change: Callable[[Rows], object], said: str
) -> None:
    stored, form = TensorFolder(folder), form_of("ascend")
    proofs.prove_description(stored, form, MODEL)
    edit(folder / "quant_model_description.json", change)
    with pytest.raises(ExportError, match=rf"^w8a8/quant_model_description\.json: .*{said}"):
        proofs.prove_description(stored, form, MODEL)


def test_a_row_that_stands_twice_is_named(folder: Path) -> None:
    path = folder / "quant_model_description.json"
    path.write_text(path.read_text().replace("{", f'{{"{NORM}": "FLOAT",', 1))
    with pytest.raises(ExportError, match=rf"json: {NORM} stands there twice"):
        proofs.prove_description(TensorFolder(folder), form_of("ascend"), MODEL)


@pytest.mark.parametrize(
    ("alone", "others"),
    [
        (f"{EXPERT}.weight", "model.layers.1.mlp.experts.3.gate_proj.weight"),
        (
            "model.layers.1.mlp.experts.5.down_proj.weight",
            "model.layers.1.mlp.experts.0.down_proj.weight",
        ),
        (
            "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
            "model.layers.0.self_attn.q_a_proj.weight",
        ),
    ],
)
def test_matrices_that_servers_join_have_one_type(folder: Path, alone: str, others: str) -> None:
    """A Linear left in bfloat16, with a row that says so, beside others that are INT8."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    beside = [one for one in tensors if one.startswith(alone.removesuffix("weight"))]
    beside.remove(alone)
    for part in beside:
        del tensors[part]
    tensors[alone] = tensors[alone].to(torch.bfloat16)
    save_file(tensors, path)

    def left_out(rows: Rows) -> None:
        for part in beside:
            del rows[part]
        rows[alone] = "FLOAT"

    edit(folder / "quant_model_description.json", left_out)
    said = rf"row {alone} says FLOAT, row {others} W8A8\w*, but servers make one matrix"
    with pytest.raises(ExportError, match=said):
        proofs.prove_description(TensorFolder(folder), form_of("ascend"), MODEL)


def test_an_index_under_another_name_says_the_same(folder: Path) -> None:
    form = form_of("ascend")
    proofs.prove_indexes(folder, form)
    other = folder / "quant_model_weights.safetensors.index.json"
    edit(other, lambda index: index["weight_map"].update({NORM: "elsewhere.safetensors"}))
    with pytest.raises(ExportError, match=rf"{other.name}: disagrees with .* about '{NORM}'"):
        proofs.prove_indexes(folder, form)
    other.unlink()
    with pytest.raises(ExportError, match=rf"{other.name}: cannot be read"):
        proofs.prove_indexes(folder, form)


def exchange(record: Any) -> None:
    words = record["model"]["vocab"]
    one, other = list(words)[-2:]
    words[one], words[other] = words[other], words[one]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (exchange, r"token '.*' is not as in the source's"),
        (lambda record: record["model"]["merges"].pop(), r"merge \d+ is not"),
        (lambda record: record["model"]["merges"].reverse(), r"merge 0 is not"),
        (lambda record: record["added_tokens"].pop(), r"added token 1 is not"),
        (lambda record: record["added_tokens"][1].update(special=False), r"added token 1 is not"),
        (lambda record: record.update(pre_tokenizer=None), r"field 'pre_tokenizer' is not"),
        (lambda record: record.update(normalizer={"type": "NFC"}), r"field 'normalizer' is not"),
        (lambda record: record["model"].update(byte_fallback=True), r"'model\.byte_fallback'"),
        (lambda record: record.update(post_processor=None), r"post_processor makes .* in front"),
    ],
)
def test_a_stale_tokenizer_is_named_by_what_is_not_the_sources(
    folder: Path, root: Path, change: Callable[[Any], object], said: str
) -> None:
    source = files_of(root / "ascend" / "checkpoint")
    proofs.prove_tokenizer(folder, source, "w8a8")
    edit(folder / "tokenizer.json", change)
    with pytest.raises(ExportError, match=rf"^w8a8/tokenizer\.json: .*{said}"):
        proofs.prove_tokenizer(folder, source, "w8a8")


@pytest.mark.parametrize(
    ("file", "fields", "said"),
    [
        ("config.json", {"rms_norm_eps": 0.5}, r"rms_norm_eps = 0\.5, in the source 1e-06"),
        ("config.json", {"num_experts_per_tok": 3}, r"num_experts_per_tok = 3, in the source 2"),
        ("config.json", {"model_type": "llama"}, r"model_type = 'llama' is unknown"),
        ("config.json", {"quantization_config": None}, r"quantization_config = 'None', but must"),
        ("config.json", {"eos_token_id": 0}, r"eos_token_id = 0, but answers end with \[1\]"),
        ("generation_config.json", {"eos_token_id": [1, 2]}, r"eos_token_id = \[1, 2\], but"),
        (
            "generation_config.json",
            {"temperature": 0.2},
            r"temperature = '0\.2', but must be '1\.0",
        ),
        ("tokenizer_config.json", {"bos_token": "<s>"}, r"bos_token = '<s>', but must be '<|begin"),
        ("tokenizer_config.json", {"add_bos_token": False}, r"add_bos_token = False would have"),
    ],
)
def test_a_field_that_misleads_a_server_is_named(
    fp8: Path, root: Path, file: str, fields: Rows, said: str
) -> None:
    source = files_of(root / "cuda" / "checkpoint")
    tokenizer = load_tokenizer(source / "tokenizer.json")
    conventions = read_conventions(source, tokenizer, max_tokens=64)
    proofs.prove_configs(fp8, form_of("cuda"), source, conventions)
    edit(fp8 / file, lambda record: record.update(fields))
    with pytest.raises(ExportError, match=rf"^fp8/{file}: .*{said}"):
        proofs.prove_configs(fp8, form_of("cuda"), source, conventions)


def test_plain_weights_announce_no_quantisation(folder: Path, root: Path) -> None:
    source = files_of(root / "ascend" / "checkpoint")
    tokenizer = load_tokenizer(source / "tokenizer.json")
    conventions = read_conventions(source, tokenizer, max_tokens=64)
    edit(folder / "config.json", lambda record: record.update(quantization_config={}))
    with pytest.raises(ExportError, match="quantization_config, but nothing is quantised"):
        proofs.prove_configs(folder, form_of("ascend"), source, conventions)


def test_every_template_is_there_word_for_word(folder: Path, root: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(files_of(root / "ascend" / "checkpoint"), source)
    more = "additional_chat_templates/tool_use.jinja"
    for place in (source, folder):
        (place / more).parent.mkdir()
        (place / more).write_text("{{ bos_token }}tools")
        (place / "chat_template.jinja").write_text("{{ bos_token }}{{ messages }}")
    edit(folder / "tokenizer_config.json", lambda record: record.pop("chat_template"))
    tokenizer = load_tokenizer(source / "tokenizer.json")
    conventions = read_conventions(source, tokenizer, max_tokens=64)

    def wrongs() -> Iterator[str]:
        (folder / more).write_text("tools")
        yield rf"w8a8/{more} is not the source's"
        (folder / more).unlink()
        yield rf"w8a8/{more} is not the source's"
        edit(folder / "tokenizer_config.json", lambda record: record.update(chat_template="x"))
        yield r"w8a8/tokenizer_config\.json: chat_template is not the source's"

    proofs.prove_templates(folder, form_of("ascend"), conventions)
    for said in wrongs():
        with pytest.raises(ExportError, match=said):
            proofs.prove_templates(folder, form_of("ascend"), conventions)
