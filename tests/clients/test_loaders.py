"""What loaders of servers make of quantised files, read back parameter by parameter."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from configs.delivery import ExportConfig, Variant
from configs.errors import ClientError
from configs.model import ModelConfig, V4Config
from configs.reading import load_recipe, shipped_recipes
from model.transformer import Transformer
from model.weights.files import save_pretrained
from stages.export.cuda import Fp8Blocks
from stages.export.formats import Format
from stages.export.programs import ask
from stages.export.servers import verdicts
from stages.export.tensors import TensorFolder, write_weights
from stages.export.trial import Comparison
from stages.export.variants import formats
from tests.clients.conftest import Folders
from tests.clients.environments import ready
from tests.clients.trying import tried
from tests.stages.bundles import MODEL

pytestmark = [pytest.mark.clients, pytest.mark.slow]
MOST_PARAMETERS = 20_000_000
"""Of a recipe that is tried in its own sizes."""
HEAD_DIM = 512
"""Of V4, without which vLLM does not make the model."""


def recipes() -> Mapping[str, ModelConfig]:
    """Models of the recipes that export FP8 for servers and can be made here, by recipe."""
    found = {}
    for name in shipped_recipes():
        recipe = load_recipe(name)
        wanted = recipe.export is not None and "fp8" in recipe.export.variants
        # No server knows the memory.
        if wanted and not recipe.model.engram and recipe.model.parameters() <= MOST_PARAMETERS:
            found[name] = recipe.model
    return found


RECIPES = recipes()
TRIED = [
    (name, variant)
    for name, model in RECIPES.items()
    for variant in ("fp8", "fp4")
    if variant == "fp8" or isinstance(model, V4Config)
    if not isinstance(model, V4Config) or model.head_dim == HEAD_DIM
]


def read_back(folder: Path) -> dict[str, Comparison]:
    """vLLM's loader of block FP8 on a folder of any sizes, whatever rules it breaks."""
    job = {"bundle": str(folder), "ascend": False}
    answer = ask(ready("vllm"), "vllm_loader.py", job, deadline_seconds=900)
    made = [Comparison(**one) for one in answer["checks"]]
    return {one.what: one for one in made}


def require_whole(made: Mapping[str, Comparison]) -> None:
    assert not [str(one) for one in made.values() if not one.passed]
    assert made["parameters equal to the files"].of > 40
    assert made["stored tensors loaded"].of > 40


@pytest.mark.parametrize(("recipe", "variant"), TRIED)
def test_vllm_reads_no_row_of_a_recipes_blocks_wrongly(
    recipe: str, variant: Variant, tmp_path: Path
) -> None:
    require_whole(read_back(write(RECIPES[recipe], variant, tmp_path)))


def test_vllm_refuses_heads_of_v4_that_its_rule_says_it_refuses(tmp_path: Path) -> None:
    model = RECIPES["tiny-v4"]
    (verdict,) = (one for one in verdicts(model, "cuda", "fp8") if one.program == "vllm")
    assert "head_dim = 32" in [breach.found for breach in verdict.of("refuses")]
    with pytest.raises(ClientError, match=r"Unsupported head_dim .*: 32"):
        read_back(write(model, "fp8", tmp_path))


def write(model: ModelConfig, variant: Variant, root: Path) -> Path:
    """A random model as the exporter stores this variant of it."""
    save_pretrained(Transformer(model).initialize(seed=3), root / "source")
    (form,) = formats("cuda", model, ExportConfig(variants=(variant,)))
    return write_as(form, root)


def write_as(form: Format, root: Path) -> Path:
    """The model in `root / "source"` as a format has it."""
    folder = root / form.variant
    folder.mkdir()
    source = TensorFolder(root / "source")
    write_weights(source, form, folder, max_shard_bytes=10**9, before_write=lambda: None)
    config = json.loads((source.folder / "config.json").read_text())
    config |= {"dtype": "bfloat16", **form.config_entries}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_scales_in_a_byte_beside_fp8_experts_are_misread(tmp_path: Path) -> None:
    """Why they are float32: vLLM takes them for the codes of FP4's, and says nothing."""
    model = RECIPES["servable-v4"]
    save_pretrained(Transformer(model).initialize(seed=3), tmp_path / "source")
    made = read_back(write_as(Fp8Blocks(model, scales="e8m0"), tmp_path))
    assert made["stored tensors loaded"].passed
    wrong = made["parameters equal to the files"]
    assert wrong.of - wrong.equal == 4 * model.num_hidden_layers
    assert ".experts." in wrong.first_apart


def test_blocks_that_straddle_a_fused_matrix_are_found_out(tmp_path: Path) -> None:
    """What export refuses: 64 rows of queries fill half a block, whose scale 64 of keys get."""
    ragged = MODEL.model_copy(update={"q_lora_rank": 64})
    save_pretrained(Transformer(ragged).initialize(seed=3), tmp_path, dtype="float8")
    made = read_back(tmp_path)
    rows = made["rows of weights equal to the files"]
    assert rows.of - rows.equal == 64 * ragged.num_hidden_layers
    assert "fused_qkv_a_proj" in rows.first_apart


@pytest.mark.parametrize("variant", ["w8a8", "w4a8"])
@pytest.mark.parametrize("family", ["v3", "v32", "v4"])
def test_vllm_ascend_writes_every_parameter(folders: Folders, family: str, variant: str) -> None:
    require_whole(tried("vllm-ascend", folders(family)[f"ascend/{variant}"]))


def test_a_scale_that_nothing_stores_is_found_out(folders: Folders, tmp_path: Path) -> None:
    """What a server would make up: the loader says nothing of it."""
    folder = shutil.copytree(folders("v3")["ascend/w8a8"], tmp_path / "w8a8")
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.down_proj.weight_scale"]
    save_file(tensors, path)
    for index in folder.glob("*.index.json"):
        index.unlink()
    made = tried("vllm-ascend", folder)
    assert "down_proj.weight_scale" in made["parameters equal to the files"].first_apart
