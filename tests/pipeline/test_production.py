"""The real line is wired as promised, and takes a recipe's own nodes."""

from pathlib import Path

import pytest

from configs.errors import ConfigError, PlanError
from configs.reading import load_recipe
from configs.recipe import NodeConfig, Recipe
from model.weights.files import save_pretrained
from pipeline.graph import Graph, make_graph, side_by_side
from pipeline.production import production
from stages.hashing import Hashes
from tests.pipeline.fakes import FakeConfig
from tests.references import random_model, tiny
from tests.stages.bundles import MODEL, make_tokenizer

HASHES = Hashes()
FAKE = "tests.pipeline.fakes"


def with_nodes(**nodes: NodeConfig) -> Recipe:
    return load_recipe("smoke").model_copy(update={"nodes": nodes})


def added(stage: str, inputs: dict[str, str] | None = None, **config: object) -> NodeConfig:
    return NodeConfig(use=f"{FAKE}:{stage}", inputs=inputs or {}, config=config)


def test_the_line_is_wired_from_text_to_bundles() -> None:
    graph = make_graph(production(load_recipe("smoke")), HASHES)
    assert {node.name: set(node.inputs.values()) for node in graph} == {
        "data": set(),
        "pretrain": {"data"},
        "posttrain": {"data", "pretrain"},
        "evaluate": {"data", "pretrain", "posttrain"},
        "export.cuda": {"data", "posttrain"},
        "export.ascend": {"data", "posttrain"},
    }


def test_precisions_are_compared_seed_by_seed_on_one_corpus() -> None:
    graph = make_graph(production(load_recipe("smoke", sets=["parity.seeds=[3, 5]"])), HASHES)
    runs = {f"pretrain.{precision}.{seed}" for precision in ("fp8", "high") for seed in (3, 5)}
    assert {node.name: set(node.inputs.values()) for node in graph} == {
        "data": set(),
        **{run: {"data"} for run in runs},
        "parity": runs,
    }
    assert graph["parity"].inputs["high_5"] == "pretrain.high.5"
    specs = {run: graph[run].planned.config.model_dump() for run in runs}
    assert {run: spec["seed"] for run, spec in specs.items()} == {run: int(run[-1]) for run in runs}
    # The two of a seed differ in their precision and in nothing else.
    for seed in (3, 5):
        fp8, high = (specs[f"pretrain.{precision}.{seed}"] for precision in ("fp8", "high"))
        assert (fp8["pretrain"]["precision"], high["pretrain"]["precision"]) == ("fp8", "high")
        high["pretrain"]["precision"] = "fp8"
        assert fp8 == high


def test_a_comparison_trains_what_the_line_trains() -> None:
    """At the recipe's own seed the FP8 training is the one of the line, and is reused."""
    line, compared = (
        make_graph(production(load_recipe("smoke", sets=sets)), HASHES)
        for sets in ([], ["parity.seeds=[0]"])
    )
    assert compared["pretrain.fp8.0"].fingerprint == line["pretrain"].fingerprint


def test_machines_store_and_tracking_change_no_identity() -> None:
    sets = [
        "cluster.trainers=4",
        "cluster.pp=2",
        "cluster.ep=1",
        "cluster.parallel_nodes=3",
        "store.url='/x'",
        "tracking.experiment='y'",
        "name='z'",
    ]
    plain, moved = (
        make_graph(production(load_recipe("smoke", sets=s)), HASHES) for s in ([], sets)
    )
    assert [n.fingerprint for n in plain] == [n.fingerprint for n in moved]


def test_one_target_less_leaves_the_other_bundle_what_it_is() -> None:
    both, one = (
        make_graph(production(load_recipe("smoke", sets=s)), HASHES)
        for s in ([], ["export.targets=['cuda']"])
    )
    assert "export.ascend" not in one.nodes
    assert both["export.cuda"].fingerprint == one["export.cuda"].fingerprint


def test_a_recipes_own_nodes_join_in_any_order() -> None:
    line = production(
        with_nodes(
            second=NodeConfig(
                use=f"{FAKE}:judge", inputs={"corpus": "data", "checkpoint": "first"}
            ),
            first=NodeConfig(use=f"{FAKE}:train", inputs={"corpus": "data"}, config={"steps": 7}),
        )
    )
    assert line["second"].inputs["checkpoint"] is line["first"]
    config = line["first"].config
    assert isinstance(config, FakeConfig)
    assert config.steps == 7


@pytest.mark.parametrize(
    ("node", "error", "message"),
    [
        (NodeConfig(use="no.such:thing"), PlanError, "cannot import no.such"),
        (added("World"), PlanError, "its stages: gather, judge, pack, train"),
        (
            added("train", {"corpus": "dat"}),
            PlanError,
            "nodes.mine: its input corpus is to come from 'dat', which is no node of this line; "
            "did you mean 'data'?",
        ),
        (
            added("train", {"corpus": "pretrain"}),
            PlanError,
            "must be a corpus",
        ),
        (added("train"), PlanError, "takes inputs"),
        (added("gather", stps=1), ConfigError, "did you mean 'steps'"),
    ],
)
def test_a_node_that_cannot_be_planned_is_named(
    node: NodeConfig, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=r"nodes\.mine") as caught:
        production(with_nodes(mine=node))
    assert message in str(caught.value)


def test_a_name_of_the_lines_own_cannot_be_taken() -> None:
    with pytest.raises(PlanError, match="choose another"):
        production(with_nodes(data=added("gather")))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model made elsewhere, with a tokenizer."""
    folder = tmp_path / "base"
    theirs = tiny(vocab_size=MODEL.vocab_size, max_position_embeddings=64)
    save_pretrained(random_model(theirs), folder)
    make_tokenizer(folder / "tokenizer.json")
    return folder


def based_on(folder: Path, *sets: str) -> Graph:
    # The base's matrices are too narrow for the blocks of FP8, and no bundle in it is asked for.
    plain = "export.variants=['bf16', 'w8a8']"
    recipe = load_recipe("smoke", sets=[f"base='{folder}'", plain, *sets])
    return make_graph(production(recipe), HASHES)


def test_a_base_stands_where_pretraining_stood(base: Path) -> None:
    assert {node.name: set(node.inputs.values()) for node in based_on(base)} == {
        "import": set(),
        "data": set(),
        "posttrain": {"data", "import"},
        "evaluate": {"data", "import", "posttrain"},
        "export.cuda": {"data", "posttrain"},
        "export.ascend": {"data", "posttrain"},
    }


def test_the_corpus_of_a_base_is_in_its_tokens(base: Path) -> None:
    plain = make_graph(production(load_recipe("smoke")), HASHES)
    mine = based_on(base)
    assert mine["data"].fingerprint != plain["data"].fingerprint
    reads = mine["data"].identity.fields["reads"]
    assert reads["tokenizer.json"] == mine["import"].identity.fields["reads"]["tokenizer.json"]
    # Its address is not part of what it is, nor is the model that the recipe would have made.
    moved = base.rename(base.with_name("moved"))
    again = based_on(moved, "model.n_group=1", "model.n_routed_experts=7", "pretrain.steps=9")
    assert [n.fingerprint for n in again] == [n.fingerprint for n in mine]


def test_seeds_share_the_import_and_nothing_else(base: Path) -> None:
    graph = side_by_side({seed: based_on(base, f"seed={seed}") for seed in (0, 1)})
    shared = [node.name for node in graph if node.seed is None]
    assert shared == ["import"]
    assert len(graph.nodes) == 1 + 2 * 5
    plain = make_graph(production(load_recipe("smoke", sets=["seed=1"])), HASHES)
    lines = {seed: load_recipe("smoke", sets=[f"seed={seed}"]) for seed in (0, 1)}
    both = side_by_side({s: make_graph(production(one), HASHES) for s, one in lines.items()})
    assert {node.seed for node in both} == {0, 1}
    for node in plain:
        assert both[f"{node.name}.seed-1"].fingerprint == node.fingerprint


def test_what_a_recipe_says_of_a_tokenizer_of_its_own_means_nothing_beside_a_base(
    base: Path,
) -> None:
    sets = ["data.tokenizer.vocab_size=300", "data.tokenizer.training_bytes=5"]
    assert based_on(base, *sets)["data"].fingerprint == based_on(base)["data"].fingerprint


def test_a_base_is_divided_as_far_as_experts_are(base: Path) -> None:
    assert based_on(base, "cluster.trainers=16", "cluster.ep=8")
    with pytest.raises(ConfigError, match=r"8 does not divide over cluster\.ep = 16, .*; change"):
        based_on(base, "cluster.trainers=16", "cluster.ep=16")


def test_a_base_is_divided_into_no_more_stages_than_it_has_layers(base: Path) -> None:
    assert based_on(base, "cluster.trainers=4", "cluster.pp=2")
    with pytest.raises(
        ConfigError,
        match=r"its num_hidden_layers = 2 is below cluster\.pp = 4, .*; lower the second",
    ):
        based_on(base, "cluster.trainers=4", "cluster.pp=4")


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            "data.sequence_tokens=65",
            "max_position_embeddings = 64 is below data.sequence_tokens = 65; lower the second",
        ),
        (
            "cluster.trainers=16",
            "n_routed_experts = 8 does not divide over cluster.trainers = 16, which leaves some "
            "without any; change the second",
        ),
    ],
)
def test_a_recipe_too_large_for_its_base_is_refused_when_planned(
    base: Path, ask: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=r"^base = ") as caught:
        based_on(base, ask)
    assert str(base) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ("batch_sequences=3", "pretrain.phases.a.batch_sequences = 3 does not divide over"),
        ("fp8.engram='fp8'", 'pretrain.phases.a.fp8.engram = "fp8", but this model has no such'),
    ],
)
def test_phases_on_a_base_are_held_to_its_model(base: Path, ask: str, message: str) -> None:
    found = based_on(base, "pretrain.phases.a={}")
    assert found["pretrain.a"].inputs == {"corpus": "data", "base": "import"}
    with pytest.raises(ConfigError) as caught:
        based_on(base, f"pretrain.phases.a.{ask}")
    assert message in str(caught.value)


def test_fp8_of_a_part_that_a_base_lacks_is_refused_when_planned(base: Path) -> None:
    """What the base lacks is otherwise left out of what the recipe means."""
    with pytest.raises(ConfigError, match=r'posttrain\.fp8\.engram = "fp8", but this model has no'):
        based_on(base, "posttrain.precision='fp8'", "posttrain.fp8.engram='fp8'")
    usual = based_on(base, "posttrain.precision='fp8'")
    mine = based_on(base, "posttrain.precision='fp8'", "posttrain.fp8.engram='high'")
    assert mine["posttrain"].fingerprint == usual["posttrain"].fingerprint


def test_a_base_that_is_nowhere_is_refused_when_planned(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"base = .*no such folder"):
        based_on(tmp_path / "nowhere")


def test_a_base_without_a_tokenizer_is_refused_when_planned(base: Path) -> None:
    (base / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"base = .*holds no tokenizer\.json"):
        based_on(base)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ["model.q_lora_rank=64"],
            "model.q_lora_rank = 64: vLLM 0.32.0 on GPUs wants whole blocks of 128 rows",
        ),
        (
            ["model.moe_intermediate_size=96"],
            "model.moe_intermediate_size = 96: vLLM 0.32.0 on GPUs wants whole blocks",
        ),
    ],
)
def test_a_bundle_that_servers_would_read_wrongly_is_refused_when_planned(
    sets: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        production(load_recipe("smoke", sets=sets))
    assert message in str(caught.value)
    assert 'export.variants = ["bf16", "w8a8"]' in str(caught.value)
    for without in ("export.variants=['bf16', 'w8a8']", "export.targets=['ascend']"):
        assert "export.ascend" in production(load_recipe("smoke", sets=[*sets, without]))


@pytest.mark.parametrize(
    ("recipe", "setting", "message"),
    [
        ("smoke", "export.variants=['bf16', 'fp4']", "asks for fp4, but the model is of family v3"),
        ("tiny-v4", "export.fp8_scales='float32'", "powers of two for its scales"),
        ("tiny-engram", "export.rotate=true", "export.rotate = true, but the model has a memory"),
    ],
)
def test_a_bundle_that_cannot_be_is_refused_when_planned(
    recipe: str, setting: str, message: str
) -> None:
    assert "export.cuda" in production(load_recipe(recipe))
    with pytest.raises(ConfigError, match=message):
        production(load_recipe(recipe, sets=[setting]))


def test_the_same_bundle_of_a_base_is_refused_by_the_name_of_its_folder(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"base = .* its config\.\w+ = 16: vLLM .* whole blocks"):
        based_on(base, "export.variants=['fp8', 'w8a8']")
