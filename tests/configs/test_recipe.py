"""Promises of recipes: what merges, what is refused, and how it is said."""

import copy
from pathlib import Path
from typing import Any

import pytest

from configs.data import ArithmeticSource, FilesSource, ProblemsSource, TokenizerConfig
from configs.errors import ConfigError
from configs.model import V4Config, V32Config
from configs.reading import load_recipe, shipped_recipes
from configs.recipe import Recipe
from tests.configs.test_model import TINY

RECIPE = """
name = "mine"
seed = 3

[model]
{model}

[data]
train_tokens = 100_000

[data.sources.stdlib]
type = "stdlib"
share = 0.5

[data.sources.sums]
type = "arithmetic"
share = 0.5

[data.tokenizer]
vocab_size = 512

[pretrain]
steps = 100

[posttrain]
steps = 10
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    shape = {key: value for key, value in TINY.items() if value is not None}
    path = tmp_path / "mine.toml"
    path.write_text(RECIPE.format(model="\n".join(f"{k} = {v}" for k, v in shape.items())))
    return str(path)


def message(recipe: str, *sets: str, overlays: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, overlays, sets)
    return str(caught.value)


def test_a_recipe_becomes_a_checked_value(recipe: str) -> None:
    loaded = load_recipe(recipe)
    assert isinstance(loaded.data.sources["sums"], ArithmeticSource)
    assert (loaded.seed, loaded.pretraining["pretrain"].steps, loaded.model.hidden_size) == (
        3,
        100,
        64,
    )


def test_overlays_merge_key_by_key_and_the_last_word_wins(recipe: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    first.write_text("[pretrain]\nsteps = 200\nbatch_sequences = 8\n[evaluate]\npass_at = [1]\n")
    second.write_text("[pretrain]\nsteps = 300\n")
    loaded = load_recipe(recipe, [str(first), str(second)], ["pretrain.optim.beta1=0.8"])
    assert loaded.pretraining["pretrain"].steps == 300
    assert loaded.pretraining["pretrain"].batch_sequences == 8
    assert loaded.pretraining["pretrain"].optim.beta1 == 0.8
    assert loaded.pretraining["pretrain"].optim.beta2 == 0.95
    assert loaded.evaluate is not None
    assert loaded.evaluate.pass_at == (1,)


def test_a_table_that_changes_its_type_replaces_the_whole_table(
    recipe: str, tmp_path: Path
) -> None:
    own, more = tmp_path / "own.toml", tmp_path / "more.toml"
    table = '[data.sources.stdlib]\ntype = "{}"\n'
    more.write_text(table.format("stdlib") + "max_bytes = 4_000_000\n")
    own.write_text(table.format("files") + 'glob = "*.txt"\nshare = 0.5\n')
    loaded = load_recipe(recipe, [str(more), str(own)])
    assert loaded.data.sources["stdlib"] == FilesSource(glob="*.txt", share=0.5)
    more.write_text(table.format("files") + "max_bytes = 7\n")
    loaded = load_recipe(recipe, [str(own), str(more)])
    assert loaded.data.sources["stdlib"] == FilesSource(glob="*.txt", share=0.5, max_bytes=7)


def test_settings_are_one_overlay_whatever_their_order(recipe: str) -> None:
    sets = ["type=files", "glob=*.txt", "share=0.5"]
    sets = [f"data.sources.stdlib.{one}" for one in sets]
    for order in (sets, sets[::-1]):
        found = load_recipe(recipe, (), order).data.sources["stdlib"]
        assert found == FilesSource(glob="*.txt", share=0.5)


def test_a_source_of_share_zero_is_left_out(recipe: str, tmp_path: Path) -> None:
    overlay = tmp_path / "own.toml"
    overlay.write_text(
        '[data.sources.stdlib]\nshare = 0\n[data.sources.own]\ntype = "files"\n'
        'glob = "*.txt"\nshare = 0.5\n'
    )
    loaded = load_recipe(recipe, [str(overlay)])
    assert set(loaded.data.sources) == {"own", "sums"}
    assert set(loaded.model_dump()["data"]["sources"]) == {"own", "sums"}
    everything_else = ["data.sources.stdlib.share=0", "data.sources.sums.share=0"]
    assert "shares add up to 0, not 1" in message(recipe, *everything_else)


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("pretrain.steps=70", "pretrain.steps", 70),
        ("pretrain.precision=high", "pretrain.precision", "high"),
        ('cluster.address="auto"', "cluster.address", "auto"),
        ("evaluate.pass_at=[1, 2]", "evaluate.pass_at", (1, 2)),
        (" pretrain.optim.epsilon = 1e-6 ", "pretrain.optim.epsilon", 1e-6),
        ("pretrain.attend_across_documents=true", "pretrain.attend_across_documents", True),
    ],
)
def test_set_reads_a_toml_value_or_else_plain_text(
    recipe: str, assignment: str, path: str, value: object
) -> None:
    found: Any = load_recipe(recipe, (), [assignment])
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


def test_a_misspelt_key_is_answered_with_the_nearest_name(recipe: str) -> None:
    said = message(recipe, "pretrain.stesp=3")
    assert "pretrain.stesp = 3" in said
    assert "did you mean 'steps'?" in said


@pytest.mark.parametrize("name", ["stdlib", "mine"])
def test_a_fault_in_a_source_names_its_whole_path(recipe: str, name: str) -> None:
    sets = [f'data.sources.{name}.type="stdlib"', f"data.sources.{name}.max_byte=3"]
    said = message(recipe, *sets)
    assert f"data.sources.{name}.max_byte = 3: no such field; did you mean 'max_bytes'?" in said


def test_only_the_fields_of_the_sources_own_type_are_offered(recipe: str) -> None:
    said = message(recipe, "data.sources.stdlib.digits=3")
    assert "data.sources.stdlib.digits = 3: no such field" in said
    assert "allowed: max_bytes, max_epochs, quality, share, type" in said


FAMILIES: dict[str, dict[str, Any]] = {
    "v3": TINY,
    "v32": TINY | {"family": "v32", "q_lora_rank": 16},
    "v4": {"family": "v4"},
}


def with_model(path: Path, fields: dict[str, Any]) -> str:
    """A recipe whose model table holds `fields`."""
    spelt = [f'{k} = "{v}"' if isinstance(v, str) else f"{k} = {v}" for k, v in fields.items()]
    path.write_text(RECIPE.format(model="\n".join(one for one in spelt if "None" not in one)))
    return str(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_misspelt_field_of_any_family_is_named_as_the_recipe_spells_it(
    tmp_path: Path, family: str
) -> None:
    own = with_model(tmp_path / "own.toml", FAMILIES[family])
    said = message(own, "model.hiden_size=96")
    assert said.endswith("model.hiden_size = 96: no such field; did you mean 'hidden_size'?")
    said = message(own, "model.rope_scaling.facto=8.0", "model.engram.layer_id=[1]")
    assert "model.rope_scaling.facto = 8.0: no such field; did you mean 'factor'?" in said
    assert "model.engram.layer_id = [1]: no such field; did you mean 'layer_ids'?" in said
    said = message(own, "model.vocab_size=0", "model.qk_rope_head_dim=a")
    assert "model.vocab_size = 0: should be greater than 0" in said
    assert "model.qk_rope_head_dim = 'a': should be a whole number" in said
    said = message(own, "model.qk_rope_head_dim=7")
    assert "model: qk_rope_head_dim = 7 is odd" in said


def test_only_the_fields_of_the_models_own_family_are_offered(tmp_path: Path) -> None:
    said = message(with_model(tmp_path / "own.toml", FAMILIES["v3"]), "model.zzz=1")
    assert "kv_lora_rank" in said
    assert "index_topk" not in said
    assert "compress_ratios" not in said


def test_an_unknown_family_is_one_line_with_the_known_ones(recipe: str) -> None:
    said = message(recipe, "model.family=v5")
    assert said == f"recipe {recipe}: model.family = 'v5': unknown; known: v3, v32, v4"


def test_a_family_is_changed_by_giving_its_fields(recipe: str, tmp_path: Path) -> None:
    """V3.2 has all fields of V3; V4 has not, and leaving them out would be V4 at full size."""
    sets = ["model.family=v32", "model.q_lora_rank=16", "model.index_topk=8"]
    sets += ["pretrain.indexer.dense_steps=20"]
    changed = load_recipe(recipe, (), sets).model
    assert isinstance(changed, V32Config)
    assert (changed.hidden_size, changed.index_topk) == (64, 8)
    assert "model.kv_lora_rank = 32: no such field" in message(recipe, "model.family=v4")
    shape = {"num_hidden_layers": 2, "num_hash_layers": 1, "compress_ratios": [0, 4]}
    own = with_model(tmp_path / "own.toml", FAMILIES["v4"] | shape)
    assert isinstance(load_recipe(own, sets=sets[3:]).model, V4Config)


def test_a_model_that_would_never_train_as_sparse_as_it_is_used_is_refused(
    recipe: str, tmp_path: Path
) -> None:
    assert load_recipe(recipe, sets=["pretrain.indexer.dense_steps=100"])
    sparse = ["model.family=v32", "model.q_lora_rank=16"]
    told = message(recipe, *sparse, "pretrain.indexer.dense_steps=100")
    assert "dense_steps = 100 leaves none of pretrain.steps = 100" in told
    shape = {"num_hidden_layers": 2, "num_hash_layers": 1, "compress_ratios": [0, 128]}
    assert load_recipe(with_model(tmp_path / "own.toml", FAMILIES["v4"] | shape))


def test_every_fault_is_told_at_once(recipe: str) -> None:
    said = message(recipe, "pretrain.steps=many", "posttrain.group_size=1", "modell.x=1")
    assert "pretrain.steps = 'many': should be a whole number" in said
    assert "posttrain.group_size = 1: should be greater than or equal to 2" in said
    assert "did you mean 'model'?" in said


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text('name = "empty"')
    said = message(str(path))
    assert "pretrain: missing; add it" in said


@pytest.mark.parametrize(
    ("assignment", "complaint"),
    [
        ("cluster.trainers=3", "n_routed_experts = 8 does not divide over cluster.trainers = 3"),
        ("pretrain.batch_sequences=5", "batch_sequences = 5 does not divide"),
        ("posttrain.minibatches=5", "prompts_per_step = 32 is not divisible by minibatches = 5"),
        ("data.tokenizer.vocab_size=600", "model.vocab_size = 512 is below"),
        ("data.sequence_tokens=300", "max_position_embeddings = 256 is below"),
        ("data.sources.sums.share=0.6", "shares add up to 1.1, not 1"),
        ("cluster.address=127.0.0.1", "names no port; write it as HOST:6379"),
        ("cluster.placement=sprea", "cluster.placement = 'sprea'"),
        ("store.url=s3:/bucket/x", "folder of this machine; did you mean s3://bucket/x?"),
        ("pretrain.warmup_steps=100", "warmup_steps = 100 leaves nothing of steps = 100"),
        ("evaluate.pass_at=[1, 16]", "pass@16"),
        ("evaluate.pass_at=[]", "evaluate.pass_at = []: should have at least 1 item"),
        ("data.sources.sums.share=-0.5", "share = -0.5: should be greater than or equal"),
        ("data.sources.sums.type=sum", "sums.type = 'sum': unknown; known: stdlib, arithmetic, "),
        ("data.sources.more={share=0.5}", "data.sources.more.type: missing; known: stdlib, "),
        (
            "pretrain.optim.beta2=0.99",
            "pretrain.optim: beta2 = 0.99 with moments = 'bfloat16': so slow",
        ),
        (
            "pretrain.optim.beta1=0.99",
            "may stay 39% wrong for ever; set moments = 'float32' beside it",
        ),
        ("pretrain.fp8=high", "pretrain.fp8 = 'high': should be a table"),
        (
            "export.variants=['fp8']",
            "export.variants = ['fp8'] has none for ascend of export.targets; add one of bf16, "
            "w4a8, w8a8, or drop the target: export.targets = ['cuda']",
        ),
        ("export.variants=['int4']", "export.variants"),
        ("pretrain.fp8.fp4_experts=ja", "fp4_experts = 'ja': should be true or false"),
        ("pretrain.steps=many", "steps = 'many': should be a whole number"),
        ("parity.seeds=0", "parity.seeds = 0: should be a list, as [0, 1]"),
        (
            'pretrain.fp8.engram="fp8"',
            'fp8.engram = "fp8", but this model has no such part',
        ),
        ("model=3", "model = 3: should be a table"),
        (
            "data.dedup.exact=false",
            "data.dedup: exact = false, but near = true drops equal documents too; set near = "
            "false as well, or leave exact",
        ),
        ("data.dedup.min_jaccard=0.59", "min_jaccard = 0.59: should be greater than or equal to"),
        ('data.sources."a/b"={type="stdlib", share=0.1}', "string should match pattern"),
        ("nodes.extra.use=nonsense", "string should match pattern"),
        ('nodes."my/other"={use="mine:made"}', "as posttrain.math; rename"),
    ],
)
def test_the_impossible_is_refused_before_anything_starts(
    recipe: str, assignment: str, complaint: str
) -> None:
    assert complaint in message(recipe, assignment)


def test_a_fault_within_a_list_is_not_told_as_the_lists_own(recipe: str) -> None:
    said = message(recipe, "parity.seeds=[-1]")
    assert "parity.seeds.0 = -1: should be greater" in said
    assert "at least 1 item" not in said


def test_fp8_that_no_part_of_the_model_has_is_refused(recipe: str) -> None:
    parts = ("attention", "dense_ffn", "shared_experts", "routed_experts")
    high = [f'posttrain.fp8.{part}="high"' for part in parts]
    load_recipe(recipe, sets=high)
    said = message(recipe, *high, "posttrain.precision=fp8")
    assert 'posttrain.precision = "fp8", but posttrain.fp8 sets every part of this model' in said


def test_averages_may_be_slow_in_float32(recipe: str) -> None:
    settings = ["pretrain.optim.beta2=0.999", "pretrain.optim.moments=float32"]
    assert load_recipe(recipe, sets=settings).pretraining["pretrain"].optim.beta2 == 0.999
    bound = load_recipe(recipe, sets=["pretrain.optim.beta2=0.984375"])
    assert bound.pretraining["pretrain"].optim.moments == "bfloat16"


def test_a_line_without_checkable_problems_is_refused(recipe: str) -> None:
    sets = ['data.sources.sums={type="files", share=0.5, glob="*.txt"}']
    said = message(recipe, *sets)
    assert "needs checkable problems, and its corpus has no source of them" in said
    assert 'add one of type = "arithmetic" or "problems" to its sources' in said


def test_problems_of_files_are_checkable(recipe: str) -> None:
    sums = 'data.sources.sums={type="problems", share=0.5, glob="*.jsonl"}'
    loaded = load_recipe(recipe, sets=[sums])
    assert loaded.posttraining["posttrain"].steps == 10
    assert loaded.data.sources["sums"] == ProblemsSource(share=0.5, glob="*.jsonl")


def test_equal_documents_may_stay_where_near_duplicates_do(recipe: str) -> None:
    sets = ["data.dedup.exact=false", "data.dedup.near=false", "data.dedup.min_jaccard=0.6"]
    assert not load_recipe(recipe, sets=sets).data.dedup.exact


def test_a_set_without_an_equals_sign_is_refused(recipe: str) -> None:
    assert "expected key=value" in message(recipe, "pretrain.steps")


def test_broken_toml_names_the_file_and_the_place(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("name = \n")
    assert "broken.toml': not valid TOML" in message(str(path))


def test_an_unknown_recipe_lists_what_is_shipped() -> None:
    said = message("nowhere")
    assert "neither a .toml file nor a shipped recipe" in said
    assert all(name in said for name in shipped_recipes())


def test_a_file_that_is_not_there_is_named_and_one_that_is_is_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "nowhere.toml': there is no such file in" in message(str(tmp_path / "nowhere.toml"))
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").touch()
    assert "did you mean 'mine.toml'?" in message("mine")


def test_loading_changes_none_of_its_inputs(recipe: str) -> None:
    sets = ["pretrain.steps=70"]
    before = copy.copy(sets)
    assert load_recipe(recipe, (), sets) == load_recipe(recipe, (), sets)
    assert sets == before


def test_a_recipe_survives_the_way_through_json(recipe: str) -> None:
    loaded = load_recipe(recipe)
    assert Recipe.model_validate_json(loaded.model_dump_json()) == loaded


def test_a_glob_is_a_place_and_no_identity() -> None:
    assert "glob" in FilesSource.provenance_fields


def test_beside_a_tokenizer_file_the_size_of_one_to_train_means_nothing(recipe: str) -> None:
    file = "data.tokenizer.file='tok.json'"
    plain = load_recipe(recipe, sets=[file])
    sized = load_recipe(recipe, sets=[file, "data.tokenizer.vocab_size=600"])
    assert sized == load_recipe(recipe, sets=[file, "data.tokenizer.training_bytes=7"]) == plain
    assert plain.data.tokenizer == TokenizerConfig(file="tok.json")
    # Without a file it says what is made; and a misspelt field stays an error.
    assert load_recipe(recipe).data.tokenizer.vocab_size == 512
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.size = 3: no such field"):
        load_recipe(recipe, sets=[file, "data.tokenizer.size=3"])


def test_a_recipe_says_what_comes_after_pretraining(recipe: str) -> None:
    text = Path(recipe).read_text()
    Path(recipe).write_text(text[: text.index("[posttrain]")])
    assert load_recipe(recipe).posttraining == {}
    assert load_recipe(recipe, sets=["parity={}"]).posttrain is None


def test_what_packing_and_the_tokenizer_need_of_each_other_is_said_at_once(recipe: str) -> None:
    said = message(recipe, "data.pack.fim_rate=0.1")
    assert (
        'data.pack.fim_rate = 0.1 needs control tokens; add "fim" to data.tokenizer.special_tokens'
        in said
    )
    kinds = 'data.tokenizer.special_tokens=["fim", "chat", "fim"]'
    loaded = load_recipe(recipe, sets=["data.pack.fim_rate=0.1", kinds])
    assert loaded.data.tokenizer.special_tokens == ("chat", "fim")
    loaded = load_recipe(recipe, sets=["data.pack.fim_rate=0.1", "data.tokenizer.file='tok.json'"])
    assert loaded.data.pack.fim_rate == 0.1
    tools = 'data.tokenizer.special_tokens=["tools"]'
    said = message(recipe, tools, "data.tokenizer.vocab_size=266")
    assert "has no room for 256 bytes and 11 special tokens; set it to 267 or more" in said


@pytest.mark.parametrize("table", ["data", "data.corpora.more"])
def test_any_corpus_may_ask_for_the_middle_if_the_tokenizer_of_all_has_its_tokens(
    recipe: str, table: str
) -> None:
    source = 'sources.own={type="stdlib", share=1.0}'
    sets = [f"data.corpora.more={{train_tokens=5000, {source}}}", f"{table}.pack.fim_rate=0.1"]
    for tokens in ('special_tokens=["fim"]', "file='tok.json'"):
        loaded = load_recipe(recipe, sets=[*sets, f"data.tokenizer.{tokens}"]).data
        assert loaded.corpora["more"].pack.fim_rate == 0.1
        assert loaded.pack.fim_rate == (0.1 if table == "data" else 0)
    assert f"{table}.pack.fim_rate = 0.1 needs control tokens" in message(recipe, *sets)
