"""What a stage may take, and what is refused when it is planned."""

from pathlib import Path

import pytest

from configs.errors import PlanError
from configs.parallel import StoreConfig
from configs.recipe import NodeConfig
from pipeline.fingerprint import differences, identify
from pipeline.graph import Graph, make_graph
from pipeline.records import Run
from pipeline.wiring import added, wire
from stages.artifacts import Checkpoint, Corpus, Report
from stages.contract import Planned, Workspace, stage
from stages.hashing import Hashes
from tests.pipeline.fakes import FakeConfig, World, gather, outcomes, train


@stage(revision=1)
def collect(config: FakeConfig, work: Workspace, *, corpus: Corpus, **runs: Checkpoint) -> Report:
    """The steps of each run, by its name."""
    work.path("report.json").write_text("{}")
    return Report(uri=work.out, headline={name: float(run.step) for name, run in runs.items()})


HASHES = Hashes()
CORPUS = gather(FakeConfig())


def run_of(steps: int) -> Planned[Checkpoint]:
    return train(FakeConfig(steps=steps), corpus=CORPUS)


def graph(**runs: Planned[Checkpoint]) -> Graph:
    """`collect` of these runs, each a node of its own name."""
    line = {"data": CORPUS, **runs, "all": collect(FakeConfig(), corpus=CORPUS, **runs)}
    return make_graph(line, HASHES)


def test_a_stage_takes_any_number_of_further_inputs_of_one_kind() -> None:
    assert collect.takes == {"corpus": Corpus}
    assert collect.takes_more is Checkpoint
    assert train.takes_more is None
    found = graph(a=run_of(1), b=run_of(2))
    assert found["all"].inputs == {"corpus": "data", "a": "a", "b": "b"}
    assert [node.name for node in found.before("all")] == ["data", "a", "b"]
    assert [node.name for node in found.after("b")] == ["all"]
    assert list(graph()["all"].inputs) == ["corpus"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"a": run_of(1)}, "takes inputs ['corpus'] and any number of checkpoints, not ['a']"),
        (
            {"corpus": CORPUS, "a": CORPUS},
            "input a must be a checkpoint, but gather makes a corpus",
        ),
        ({"corpus": run_of(1)}, "input corpus must be a corpus"),
        ({"corpus": CORPUS, "work": run_of(1)}, "an input cannot be called 'work'"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_when_planned(
    inputs: dict[str, Planned[Corpus]], message: str
) -> None:
    with pytest.raises(PlanError) as caught:
        collect(FakeConfig(), **inputs)
    assert message in str(caught.value)


def test_a_stage_without_further_inputs_takes_none() -> None:
    with pytest.raises(PlanError, match=r"takes inputs \['corpus'\], not \['a', 'corpus'\]"):
        train(FakeConfig(), corpus=CORPUS, a=run_of(1))


def test_further_inputs_enter_identity_by_name_and_in_no_order() -> None:
    one, two = run_of(1), run_of(2)
    identities = {
        graph(**runs)["all"].fingerprint
        for runs in ({"a": one, "b": two}, {"a": two, "b": one}, {"a": one}, {"a": one, "c": two})
    }
    assert len(identities) == 4
    assert graph(b=two, a=one)["all"].fingerprint == graph(a=one, b=two)["all"].fingerprint


def test_an_input_more_or_less_is_told_as_that() -> None:
    node = collect(FakeConfig(), corpus=CORPUS)
    few, many = (
        identify(node, {"corpus": "0", **more}, HASHES).fields
        for more in ({"a": "1", "b": "2"}, {"a": "3", "c": "4"})
    )
    told = differences(few, many, node.config)
    assert told == ("input a changed", "input b gone", "input c added")


def test_further_inputs_are_built_handed_over_and_recorded(store_config: StoreConfig) -> None:
    world = World(store_config)

    def run(**steps: int) -> Run:
        return world.run(graph=graph(**{name: run_of(count) for name, count in steps.items()}))

    assert set(outcomes(run(a=1, b=2)).values()) == {"built"}
    made = world.store.find(graph(a=run_of(1), b=run_of(2))["all"])
    assert made is not None
    assert isinstance(made.artifact, Report)
    assert made.artifact.headline == {"a": 1.0, "b": 2.0}
    assert set(made.manifest.inputs) == {"corpus", "a", "b"}
    assert set(outcomes(run(a=1, b=2)).values()) == {"reused"}
    again = outcomes(run(a=1, b=3))
    assert again == {"data": "reused", "a": "reused", "b": "built", "all": "built"}


PLUGIN = """
from configs.base import Frozen
from stages.artifacts import Corpus
from stages.contract import Workspace, stage

class Config(Frozen):
    steps: int = 1

@stage(revision=1)
def clean(config: Config, work: Workspace) -> Corpus:
    work.path("text.txt").write_text({text!r})
    return Corpus(
        uri=work.out, train_rows=1, held_out_rows={{}}, sequence_tokens=8, vocab_size=300,
        train_problems=0, held_out_problems=0,
    )
"""


def test_stages_of_two_plugins_are_two_though_their_functions_share_a_name(
    store_config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    world, made = World(store_config), {}
    for plugin in ("first_plugin", "second_plugin"):
        (tmp_path / f"{plugin}.py").write_text(PLUGIN.format(text=plugin))
        node = NodeConfig(use=f"{plugin}:clean")
        planned = wire(added({"mine": node}, {}))["mine"]
        assert planned.stage.function == f"{plugin}:clean"
        line = make_graph({"mine": planned}, HASHES)
        assert outcomes(world.run(graph=line)) == {"mine": "built"}
        found = world.store.find(line["mine"])
        assert found is not None
        assert found.manifest.stage == f"{plugin}:clean"
        made[plugin] = found
    assert len({one.manifest.fingerprint for one in made.values()}) == 2
    for plugin, one in made.items():
        assert one.artifact.path("text.txt").read_text() == plugin


@pytest.mark.parametrize("name", ["größer", "a" * 65])
def test_a_stage_whose_name_is_no_folder_and_no_selector_is_refused(name: str) -> None:
    def function(config: FakeConfig, work: Workspace) -> Corpus:
        raise AssertionError

    function.__name__ = name
    with pytest.raises(PlanError, match="a stage's name holds at most 64 of"):
        stage(revision=1)(function)
    function.__name__ = "a" * 64
    assert stage(revision=1)(function).name == "a" * 64
