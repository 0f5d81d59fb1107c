"""The real line is wired as promised, and takes a recipe's own nodes."""

import pytest

from configs.errors import ConfigError, PlanError
from configs.recipe import NodeConfig, Recipe, load_recipe
from pipeline.graph import make_graph
from pipeline.production import production

FAKE = "tests.pipeline.fakes"


def with_nodes(**nodes: NodeConfig) -> Recipe:
    return load_recipe("smoke").model_copy(update={"nodes": nodes})


def added(stage: str, inputs: dict[str, str] | None = None, **config: object) -> NodeConfig:
    return NodeConfig(use=f"{FAKE}:{stage}", inputs=inputs or {}, config=config)


def test_the_line_is_wired_from_text_to_bundles() -> None:
    graph = make_graph(production(load_recipe("smoke")))
    assert {node.name: set(node.inputs.values()) for node in graph} == {
        "data": set(),
        "pretrain": {"data"},
        "posttrain": {"data", "pretrain"},
        "evaluate": {"data", "pretrain", "posttrain"},
        "export.cuda": {"data", "posttrain"},
        "export.ascend": {"data", "posttrain"},
    }


def test_machines_store_and_tracking_change_no_identity() -> None:
    sets = ["cluster.trainers=1", "store.url='/x'", "tracking.experiment='y'", "name='z'"]
    plain, moved = (make_graph(production(load_recipe("smoke", sets=s))) for s in ([], sets))
    assert [n.fingerprint for n in plain] == [n.fingerprint for n in moved]


def test_one_target_less_leaves_the_other_bundle_what_it_is() -> None:
    both, one = (
        make_graph(production(load_recipe("smoke", sets=s)))
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
    assert line["first"].config.steps == 7  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("node", "error", "message"),
    [
        (NodeConfig(use="no.such:thing"), PlanError, "cannot import no.such"),
        (added("World"), PlanError, "its stages: gather, judge, pack, train"),
        (
            added("train", {"corpus": "dat"}),
            PlanError,
            "'dat' is not a node",
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
