"""A recipe says which nodes there are, and in which order they are made of one another."""

import json
from pathlib import Path

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from configs.errors import ConfigError, PlanError
from configs.reading import load_recipe
from pipeline.feasible import unpipelined, unserved
from pipeline.graph import Graph, make_graph
from pipeline.phases import rows_before
from pipeline.production import production
from stages.byte_level import alphabet
from stages.hashing import Hashes

HASHES = Hashes()
FAKE = "tests.pipeline.fakes"


@pytest.fixture
def shaped(tmp_path: Path) -> Path:
    """An overlay to write."""
    return tmp_path / "shape.toml"


def plan(overlay: Path | None = None, text: str = "", *sets: str) -> Graph:
    if overlay is not None:
        overlay.write_text(text)
    recipe = load_recipe("smoke", [] if overlay is None else [str(overlay)], sets)
    return make_graph(production(recipe), HASHES)


def edges(graph: Graph) -> dict[str, dict[str, str]]:
    return {node.name: dict(node.inputs) for node in graph}


PLAIN = plan()


def test_without_reinforcement_learning_the_pretrained_model_is_judged_and_delivered() -> None:
    graph = plan(None, "", "posttrain=false")
    assert edges(graph) == {
        "data": {},
        "pretrain": {"corpus": "data"},
        "evaluate": {"corpus": "data", "model": "pretrain"},
        "export.cuda": {"corpus": "data", "checkpoint": "pretrain"},
        "export.ascend": {"corpus": "data", "checkpoint": "pretrain"},
    }
    assert graph["pretrain"].fingerprint == PLAIN["pretrain"].fingerprint


@pytest.mark.parametrize("left_out", ["evaluate", "export"])
def test_a_stage_that_is_left_out_changes_no_other(left_out: str) -> None:
    graph = plan(None, "", f"{left_out}=false")
    assert [n.name for n in graph] == [n.name for n in PLAIN if n.planned.stage.name != left_out]
    assert all(node.fingerprint == PLAIN[node.name].fingerprint for node in graph)


def test_a_line_may_end_with_the_corpus() -> None:
    sets = [f"{stage}=false" for stage in ("pretrain", "posttrain", "evaluate", "export")]
    assert edges(plan(None, "", *sets)) == {"data": {}}
    with pytest.raises(ConfigError, match="pretrain = false leaves evaluate without a model"):
        plan(None, "", "pretrain=false", "posttrain=false", "export=false")


PHASES = """
[data.corpora.sums]
train_tokens = 20_000
[data.corpora.sums.sources.arithmetic]
type = "arithmetic"
share = 1.0
digits = 1

[pretrain.phases.short]
[pretrain.phases.long]
steps = 12
[pretrain.phases.sums]
corpus = "sums"
after = "short"

[posttrain.phases.words]
after = "pretrain.long"
[posttrain.phases.math]
corpus = "sums"
steps = 3

[evaluate]
models = { base = "pretrain.long", sums = "pretrain.sums", after = "posttrain.math" }

[export]
checkpoint = "pretrain.sums"
targets = ["cuda"]
"""


def test_phases_corpora_and_models_are_wired_as_they_are_named(shaped: Path) -> None:
    assert edges(plan(shaped, PHASES)) == {
        "data": {},
        "data.sums": {"tokenizer": "data"},
        "pretrain.short": {"corpus": "data"},
        "pretrain.long": {"corpus": "data", "base": "pretrain.short"},
        "pretrain.sums": {"corpus": "data.sums", "base": "pretrain.short"},
        "posttrain.words": {"corpus": "data", "base": "pretrain.long"},
        "posttrain.math": {"corpus": "data.sums", "base": "posttrain.words"},
        "evaluate": {
            "corpus": "data",
            "base": "pretrain.long",
            "sums": "pretrain.sums",
            "after": "posttrain.math",
        },
        "export.cuda": {"corpus": "data", "checkpoint": "pretrain.sums"},
    }


def test_rows_that_were_consumed_count_within_one_corpus(shaped: Path) -> None:
    graph = plan(shaped, PHASES)
    before = {
        name: graph[f"pretrain.{name}"].planned.config.model_dump()["rows_before"]
        for name in ("short", "long", "sums")
    }
    steps, batch = (
        PLAIN["pretrain"].planned.config.model_dump()["pretrain"][field]
        for field in ("steps", "batch_sequences")
    )
    assert before == {"short": 0, "long": steps * batch, "sums": 0}


def test_a_phase_has_its_sections_settings_where_it_says_nothing_else(shaped: Path) -> None:
    recipe_text = "[pretrain.phases.short]\n[pretrain.phases.long]\nsteps = 12\n"
    graph = plan(shaped, recipe_text, "pretrain.batch_sequences=8", "pretrain.steps=9")
    specs = {
        name: graph[f"pretrain.{name}"].planned.config.model_dump() for name in ("short", "long")
    }
    assert {name: spec["pretrain"]["steps"] for name, spec in specs.items()} == {
        "short": 9,
        "long": 12,
    }
    assert {spec["pretrain"]["batch_sequences"] for spec in specs.values()} == {8}
    # The second goes on where the first ended.
    assert {name: spec["rows_before"] for name, spec in specs.items()} == {"short": 0, "long": 72}


def test_one_named_phase_is_what_an_unnamed_one_is(shaped: Path) -> None:
    graph = plan(shaped, "[pretrain.phases.only]\n")
    assert graph["pretrain.only"].fingerprint == PLAIN["pretrain"].fingerprint
    assert graph["posttrain"].fingerprint == PLAIN["posttrain"].fingerprint


def test_a_model_of_another_corpus_is_compared_with_no_ngrams(shaped: Path) -> None:
    plain = plan(shaped, PHASES)["evaluate"].planned.config.model_dump()
    assert (plain["order"], plain["has_baseline"]) == (("base", "sums", "after"), False)
    assert PLAIN["evaluate"].planned.config.model_dump()["has_baseline"]


def test_a_plugins_node_may_stand_in_the_middle(shaped: Path) -> None:
    text = f"""
[posttrain]
after = "mine"
[nodes.mine]
use = "{FAKE}:train"
inputs = {{ corpus = "data" }}
"""
    found = edges(plan(shaped, text))
    assert found["posttrain"] == {"corpus": "data", "base": "mine"}
    assert list(found).index("mine") < list(found).index("posttrain")
    # What is not said stays: the model before post-training is still the pretrained one.
    assert found["evaluate"] == {"corpus": "data", "before": "pretrain", "after": "posttrain"}


def test_rows_count_through_a_plugins_node_between_two_phases(shaped: Path) -> None:
    text = f"""
[pretrain.phases.a]
steps = 9
[pretrain.phases.b]
after = "mid"
[pretrain.phases.c]
after = "a"
[pretrain.phases.d]
after = "both"
[nodes.mid]
use = "{FAKE}:judge"
inputs = {{ corpus = "data", checkpoint = "pretrain.a" }}
[nodes.both]
use = "{FAKE}:judge"
inputs = {{ corpus = "data", checkpoint = "pretrain.c" }}
"""
    shaped.write_text(text)
    recipe = load_recipe("smoke", [str(shaped)])
    steps = recipe.pretraining["pretrain.c"].steps
    batch = recipe.pretraining["pretrain.a"].batch_sequences
    assert {name: rows_before(recipe, name) for name in recipe.pretraining} == {
        "pretrain.a": 0,
        "pretrain.b": 9 * batch,
        "pretrain.c": 9 * batch,
        "pretrain.d": (9 + steps) * batch,
    }


def test_a_plan_notes_which_sizes_servers_refuse() -> None:
    assert list(unserved(load_recipe("deepseek-v3"))) == []
    assert list(unserved(load_recipe("deepseek-v4-flash"))) == []
    assert list(unserved(load_recipe("servable"))) == []
    assert list(unserved(load_recipe("servable-v3.2"))) == []
    (ascend,) = unserved(load_recipe("servable-v4"))
    assert ascend.startswith("vllm-ascend 0.23.0 does not load bundles of these sizes: hidden_size")
    assert list(unserved(load_recipe("servable-v4", sets=["export.targets=['cuda']"]))) == []
    (told,) = unserved(load_recipe("tiny"))
    assert told == (
        "vLLM 0.32.0 on CPUs does not load bundles of these sizes: "
        "kv_lora_rank + qk_rope_head_dim = 80 (wants 576)"
    )
    small = list(unserved(load_recipe("tiny-v4")))
    assert len(small) == 4
    assert "head_dim = 32 (wants 512), index_head_dim = 32 (wants 128)" in small[0]
    assert list(unserved(load_recipe("tiny-engram"))) == []
    assert list(unserved(load_recipe("tiny", sets=["export=false"]))) == []


def test_stages_that_train_are_refused_over_pipeline_stages_each_in_its_own_words() -> None:
    """The remedy is a recipe that loads, and divides rows and experts as before."""
    recipe = load_recipe("deepseek-v3")
    told = unpipelined(recipe.cluster, ["data", "pretrain", "posttrain"])
    assert told is not None
    assert told.startswith("cluster.pp = 16: pretraining over several pipeline stages is not built")
    remedy = ["cluster.pp=1", "cluster.trainers=128"]
    assert told.endswith(
        "set cluster.pp = 1 and cluster.trainers = 128, which divide rows and experts as these do"
    )
    other = unpipelined(recipe.cluster, ["evaluate", "posttrain"])
    assert other is not None
    assert other.startswith("cluster.pp = 16: the losses of post-training need all layers in one")
    assert unpipelined(recipe.cluster, ["data", "evaluate", "export"]) is None
    one = load_recipe("deepseek-v3", sets=remedy).cluster
    assert (one.stage_trainers, one.ep) == (recipe.cluster.stage_trainers, recipe.cluster.ep)
    assert unpipelined(one, ["pretrain", "posttrain"]) is None


def test_a_gate_stands_between_the_report_and_the_bundles(shaped: Path) -> None:
    graph = plan(shaped, "[evaluate.gates]\nafter_pass_at_1 = { at_least = 0.5 }\n")
    assert edges(graph)["gate"] == {"report": "evaluate"}
    assert edges(graph)["export.cuda"] == {
        "corpus": "data",
        "checkpoint": "posttrain",
        "report": "gate",
    }
    assert graph["evaluate"].fingerprint == PLAIN["evaluate"].fingerprint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[posttrain]\nafter = "posttrain"\n', "posttrain is made of itself; name another node"),
        (
            '[pretrain.phases.a]\nafter = "b"\n[pretrain.phases.b]\nafter = "a"\n',
            "pretrain.a needs pretrain.b needs pretrain.a: these nodes are made of one another",
        ),
        (
            '[pretrain.phases.a]\n[pretrain.phases.b]\nafter = "c"\n',
            "pretrain.phases.b: its input base is to come from 'c', which is no node of this line",
        ),
        (
            '[evaluate]\nmodels = { a = "pretrian" }\n',
            "evaluate.models: its input a is to come from 'pretrian', which is no node of "
            "this line; did you mean 'pretrain'?",
        ),
        (
            '[evaluate]\nmodels = { corpus = "pretrain" }\n',
            "evaluate.models.corpus: a model cannot be called",
        ),
        ('[evaluate]\nmodels = { a = "data" }\n', "input a must be a checkpoint"),
        ('[export]\ncheckpoint = "evaluate"\n', "export.checkpoint: stage export: input"),
        (
            "[evaluate.gates]\nafter_pass_at_2 = { at_least = 0.5 }\n",
            "evaluate.gates.after_pass_at_2: no figure that evaluate reports; did you mean "
            "'after_pass_at_1'?",
        ),
        ("[evaluate.gates]\nafter_pass_at_1 = {}\n", "asks for nothing"),
        ('[pretrain]\ncorpus = "sums"\n', "pretrain.corpus = 'sums' is none of data.corpora"),
        (
            "[data.corpora.x]\ntrain_tokens = 5\ntokenizer = { vocab_size = 300 }\n"
            '[data.corpora.x.sources.s]\ntype = "stdlib"\nshare = 1.0\n',
            "all corpora are encoded by data.tokenizer",
        ),
        ("[pretrain.phases.'a.b']\n", "a name is one word"),
        ('[posttrain]\nafter = "x"\n[posttrain.phases.a]\n', "means nothing beside"),
        ('[parity]\n[pretrain]\nafter = "x"\n', "pretrain.after = 'x', but parity"),
        ('[evaluate]\nmodels = { ngram = "pretrain" }\n', "a model cannot be called 'ngram'"),
        (
            "pretrain = false\nposttrain = false\nexport = false\n"
            f'[nodes.own]\nuse = "{FAKE}:gather"\n',
            "evaluate.models: names no model",
        ),
    ],
)
def test_a_line_that_cannot_be_wired_is_one_clear_error(
    shaped: Path, text: str, message: str
) -> None:
    with pytest.raises((ConfigError, PlanError)) as caught:
        plan(shaped, text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ["posttrain.max_new_tokens=124"],
            "posttrain.max_new_tokens = 124 and prompts of 5 tokens exceed the model's "
            "max_position_embeddings = 128",
        ),
        (["evaluate.max_new_tokens=124"], "evaluate.max_new_tokens = 124 and prompts"),
        (["export.max_new_tokens=124"], "export.max_new_tokens = 124 and prompts"),
        (["export.parity_prompts=100000"], "export.parity_prompts = 100000, but"),
    ],
)
def test_what_is_sure_to_fail_later_fails_when_it_is_planned(sets: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(None, "", *sets)
    assert message in str(caught.value)


def test_problems_of_files_are_asked_and_counted_as_those_of_a_generator(tmp_path: Path) -> None:
    """Of unknown length: begin-of-text and two tokens are the least that a prompt has."""
    rows = tmp_path / "asked.jsonl"
    rows.write_text('{"question": "What is 1 and 1?", "answer": "#### 2"}\n')
    sums = f"data.sources.arithmetic={{type='problems', share=0.5, glob='{rows}'}}"
    sets = [sums, "evaluate.gates.after_pass_at_1={at_least=0.5}"]
    assert "posttrain" in plan(None, "", *sets, "evaluate.max_new_tokens=125").nodes
    with pytest.raises(ConfigError, match=r"evaluate\.max_new_tokens = 126 and prompts of 3 token"):
        plan(None, "", *sets, "evaluate.max_new_tokens=126")
    longer = "data.sources.sums={type='arithmetic', share=0.25, digits=2}"
    shares = ["data.sources.stdlib.share=0.25", longer]
    with pytest.raises(ConfigError, match=r"evaluate\.max_new_tokens = 122 and prompts of 7 token"):
        plan(None, "", *sets, *shares, "evaluate.max_new_tokens=122")


def test_answers_that_just_fit_are_planned() -> None:
    assert "evaluate" in plan(None, "", "evaluate.max_new_tokens=123").nodes


def tokenizer(path: Path, **odd: int) -> str:
    """A setting that names a byte-level vocabulary of 300 words, and odd ones beside."""
    words = {chr(256 + number): number for number in range(300)}
    words = {word: number for word, number in words.items() if word in alphabet()}
    record = {"model": {"type": "BPE", "vocab": words | odd}, "added_tokens": []}
    path.write_text(json.dumps(record))
    return f"data.tokenizer.file='{path}'"


def test_a_tokenizer_larger_than_the_vocabulary_is_refused_when_planned(tmp_path: Path) -> None:
    setting = tokenizer(tmp_path / "tokenizer.json", abc=100_000)
    with pytest.raises(ConfigError, match=r"has 100001 tokens, which is above .* vocab_size = 512"):
        plan(None, "", setting)


def test_a_tokenizer_that_is_not_byte_level_is_refused_where_bytes_are_counted(
    tmp_path: Path,
) -> None:
    setting = tokenizer(tmp_path / "tokenizer.json", **{"▁word": 7})
    with pytest.raises(ConfigError, match="its token '▁word' is not spelt in bytes"):
        plan(None, "", setting)
    assert "data" in plan(None, "", setting, "evaluate=false").nodes


def test_our_alphabet_of_bytes_is_that_of_the_tokenizers() -> None:
    assert alphabet() == set(ByteLevel.alphabet())
