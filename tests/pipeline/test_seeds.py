"""One recipe for several seeds: one run of them all, and what their figures came to."""

import json
import math
import re
import shutil
import signal
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from configs.errors import ConfigError, PlanError
from configs.parallel import StoreConfig, TrackingConfig
from configs.recipe import Recipe
from pipeline import cli
from pipeline.graph import Graph, Role, Selection, assign_roles, make_graph, side_by_side
from pipeline.places import tracking_uri
from pipeline.records import AcrossSeeds, Built, Run
from pipeline.seeds import across_seeds, parse_seeds
from pipeline.verbs import asked, clean
from stages.contract import Planned
from stages.hashing import Hashes
from tests.pipeline.fakes import FakeConfig, World, gather, make_line, outcomes

# MLflow's own use of SQLAlchemy and of protobuf is behind their deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

HASHES = Hashes()
VARYING = ("train", "judge", "pack.cuda", "pack.ascend")
NODES = ["data", *(f"{node}.seed-{seed}" for seed in (0, 1, 2) for node in VARYING)]


def seeded(
    seed: int, *, failing: tuple[int, ...] = (), diary: str = "", steps: int = 3
) -> dict[str, Planned[Any]]:
    """The fake line of one seed, on whose corpus the seed has no bearing."""
    training = {"seed": seed, "steps": steps, "fails": seed in failing}
    return make_line(train=training, judge={"seed": seed}, every={"diary": diary})


def graph_of(*seeds: int, failing: tuple[int, ...] = (), diary: str = "") -> Graph:
    lines = {seed: seeded(seed, failing=failing, diary=diary) for seed in seeds}
    return side_by_side({seed: make_graph(line, HASHES) for seed, line in lines.items()})


@pytest.fixture
def world(store_config: StoreConfig) -> World:
    return World(store_config)


def test_seeds_are_taken_in_the_order_given() -> None:
    assert parse_seeds("2,0, 11") == (2, 0, 11)
    assert parse_seeds(None) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,1", "1 is named twice"),
        ("01,2,1", "1 is named twice"),
        ("x", "'x' is no whole number"),
        ("0,-1", "'-1' is no whole number of 0 or more"),
        ("0,1.5", "'1.5' is no whole number"),
        ("0,1,", "'' is no whole number"),
        ("", "'' is no whole number"),
        ("0,٣", "'٣' is no whole number"),
        ("3", "a single seed, of which there is no spread; .* --set seed=3 in its place"),
    ],
)
def test_what_is_no_list_of_seeds_is_named_with_the_remedy(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^--seeds {re.escape(text)}: {message}") as caught:
        parse_seeds(text)
    assert "list seeds as --seeds 0,1,2" in str(caught.value) or "once" in str(caught.value)


def test_the_graph_of_one_seed_is_the_graph_of_its_line() -> None:
    alone = make_graph(seeded(1), HASHES)
    beside = side_by_side({1: alone})
    assert list(beside.nodes) == list(alone.nodes)
    assert beside.nodes == alone.nodes


def test_each_seed_follows_the_other_whole_and_what_they_share_is_there_once() -> None:
    graph = graph_of(0, 1, 2)
    assert list(graph.nodes) == NODES
    for seed in (0, 1, 2):
        alone = make_graph(seeded(seed), HASHES)
        for name in VARYING:
            node = graph[f"{name}.seed-{seed}"]
            assert (node.line_name, node.seed) == (name, seed)
            assert node.fingerprint == alone[name].fingerprint
        judged = graph[f"judge.seed-{seed}"].inputs
        assert judged == {"corpus": "data", "checkpoint": f"train.seed-{seed}"}
    assert (graph["data"].line_name, graph["data"].seed) == ("data", None)


def test_a_name_without_its_seed_selects_the_node_of_every_seed() -> None:
    graph = graph_of(0, 1)
    assert graph.resolve("train") == ["train.seed-0", "train.seed-1"]
    assert graph.resolve("pack.cuda") == ["pack.cuda.seed-0", "pack.cuda.seed-1"]
    assert graph.resolve("pack") == [
        f"pack.{target}.seed-{seed}" for seed in (0, 1) for target in ("cuda", "ascend")
    ]
    assert graph.resolve("train.seed-1") == ["train.seed-1"]
    assert graph.resolve("data") == ["data"]
    with pytest.raises(PlanError, match=r"did you mean 'pack\.cuda'"):
        graph.resolve("pack.cda")
    # Of two nodes of one stage, the one that bears its name is meant.
    lines = {seed: seeded(seed) for seed in (0, 1)}
    for line in lines.values():
        line["pack"] = line.pop("pack.ascend")
    graph = side_by_side({seed: make_graph(line, HASHES) for seed, line in lines.items()})
    assert graph.resolve("pack") == ["pack.seed-0", "pack.seed-1"]


def test_selectors_reach_every_seed_or_one() -> None:
    graph = graph_of(0, 1)

    def chosen(role: Role, **selectors: tuple[str, ...]) -> set[str]:
        roles = assign_roles(graph, Selection(**selectors))
        return {name for name, one in roles.items() if one is role}

    assert chosen(Role.IF_STALE, only=("judge",)) == {"judge.seed-0", "judge.seed-1"}
    assert chosen(Role.IF_STALE, only=("judge.seed-1",)) == {"judge.seed-1"}
    assert chosen(Role.ALWAYS_FROM, start=("train.seed-1",)) == {f"{n}.seed-1" for n in VARYING}
    assert chosen(Role.ALWAYS_FORCE, force=("train",)) == {"train.seed-0", "train.seed-1"}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_node_whose_name_a_seeds_node_would_get_is_refused(order: tuple[int, ...]) -> None:
    lines = {seed: seeded(seed) for seed in order}
    for line in lines.values():
        line["train.seed-1"] = gather(FakeConfig(steps=9))
    graphs = {seed: make_graph(line, HASHES) for seed, line in lines.items()}
    with pytest.raises(PlanError, match=r"^node train\.seed-1: with --seeds another .* rename it"):
        side_by_side(graphs)


def test_a_name_that_a_seed_makes_too_long_is_refused_by_its_own() -> None:
    lines = {seed: seeded(seed) for seed in (0, 1)}
    for seed, line in lines.items():
        line["a" * 95] = gather(FakeConfig(seed=seed))
    graphs = {seed: make_graph(line, HASHES) for seed, line in lines.items()}
    with pytest.raises(PlanError, match=f"^node {'a' * 95} of seed 0: .* at most 100 characters"):
        side_by_side(graphs)


def test_one_run_holds_all_seeds_and_builds_once_what_they_share(
    world: World, tmp_path: Path
) -> None:
    diary = tmp_path / "diary"
    done = world.run(graph=graph_of(0, 1, 2, diary=str(diary)))
    assert outcomes(done) == dict.fromkeys(NODES, "built")
    assert done.succeeded
    assert diary.read_text().split().count("gather") == 1
    assert diary.read_text().split().count("train") == 3
    assert len(list(world.store.records.newest_first())) == 1
    # What a seed's own run builds is what is built here.
    alone = world.run(graph=make_graph(seeded(1), HASHES))
    assert set(outcomes(alone).values()) == {"reused"}


def figures(found: tuple[AcrossSeeds, ...], node: str) -> dict[str, AcrossSeeds]:
    return {one.figure: one for one in found if one.node == node}


def test_mean_and_spread_are_those_of_every_figure_but_bounds(world: World) -> None:
    graph = graph_of(0, 2, 1)
    found = across_seeds(graph, world.run(graph=graph), world.store.root)
    # In the order of the line, and without what all seeds share.
    assert list(dict.fromkeys(one.node for one in found)) == list(VARYING)
    judged = figures(found, "judge")
    assert list(judged) == ["before_pass_at_1", "after_pass_at_1", "after_greedy_accuracy"]
    expected = {0: 0.75, 2: 0.75 + 2 / 64, 1: 0.75 + 1 / 64}
    after = judged["after_pass_at_1"]
    assert list(after.values.items()) == list(expected.items())
    assert after.mean == statistics.mean(expected.values())
    assert after.spread == statistics.stdev(expected.values())
    assert judged["after_greedy_accuracy"].values == {0: 1, 2: 1 - 2 / 32, 1: 1 - 1 / 32}
    assert judged["before_pass_at_1"].spread == 0
    assert figures(found, "train")["loss"].values == dict.fromkeys((0, 2, 1), pytest.approx(1 / 3))


def test_what_is_not_finite_costs_no_other_figure(world: World) -> None:
    graph = graph_of(0, 1, 2)
    done = world.run(graph=graph)
    rough = done.outcomes["train.seed-1"]
    assert isinstance(rough, Built)
    figures_of_it = {**rough.figures, "loss": math.inf}
    outcomes = {**done.outcomes, "train.seed-1": replace(rough, figures=figures_of_it)}
    found = across_seeds(graph, replace(done, outcomes=outcomes), world.store.root)
    loss = figures(found, "train")["loss"]
    assert loss.values.keys() == {0, 2}
    assert loss.spread == 0


def test_how_fast_the_machine_was_is_no_figure_of_a_seed(world: World) -> None:
    graph = graph_of(0, 1)
    done = world.run(graph=graph)
    made = done.outcomes["train.seed-1"]
    assert isinstance(made, Built)
    fast = replace(made, figures={**made.figures, "tokens_per_second": 9.0})
    outcomes = {**done.outcomes, "train.seed-1": fast}
    found = across_seeds(graph, replace(done, outcomes=outcomes), world.store.root)
    assert figures(found, "train").keys() == {"loss"}


def test_a_run_of_one_seed_has_no_figures_over_seeds(world: World) -> None:
    graph = graph_of(1)
    done = world.run(graph=graph)
    assert list(done.outcomes) == ["data", *VARYING]
    assert across_seeds(graph, done, world.store.root) == ()


def test_a_seed_that_fails_leaves_the_others_their_figures(world: World) -> None:
    graph = graph_of(0, 1, 2, failing=(0,))
    done = world.run(graph=graph)
    assert {name: what for name, what in outcomes(done).items() if what != "built"} == {
        "train.seed-0": "failed",
        **dict.fromkeys((f"{node}.seed-0" for node in VARYING[1:]), "blocked"),
    }
    assert not done.succeeded
    found = across_seeds(graph, done, world.store.root)
    assert list(dict.fromkeys(one.node for one in found)) == list(VARYING)
    after = figures(found, "judge")["after_pass_at_1"]
    assert after.values == {1: 0.75 + 1 / 64, 2: 0.75 + 2 / 64}
    assert after.mean == statistics.mean(after.values.values())
    again = graph_of(0, 1, 2)
    assert outcomes(world.run(graph=again)) == {
        name: "built" if name.endswith(".seed-0") else "reused" for name in NODES
    }


def test_of_a_single_seed_that_succeeds_there_is_no_spread(world: World) -> None:
    graph = graph_of(0, 1, failing=(1,))
    found = across_seeds(graph, world.run(graph=graph), world.store.root)
    assert {one.spread for one in found} == {None}


def test_a_report_that_somebody_deleted_counts_with_what_the_record_knows(world: World) -> None:
    graph = graph_of(0, 1)
    done = world.run(graph=graph)
    shutil.rmtree(world.generation(done, "judge.seed-1"))
    judged = figures(across_seeds(graph, done, world.store.root), "judge")
    assert judged["after_pass_at_1"].values == {0: 0.75, 1: 0.75 + 1 / 64}
    assert judged["after_greedy_accuracy"].values == {0: 1}


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, and the fake line in place of the real one.

    `pretrain.steps` of the recipe is the steps of the fake `train`; of 13 steps, seed 1 fails.
    """

    def fake(recipe: Recipe) -> dict[str, Planned[Any]]:
        steps = recipe.pretraining["pretrain"].steps
        return seeded(recipe.seed, failing=(1,) if steps == 13 else (), steps=steps)

    monkeypatch.setattr(asked, "production", fake)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "1")
    # Only one test looks at what MLflow got.
    (tmp_path / "over.toml").write_text('[tracking]\nuri = "http://127.0.0.1:9"\n')
    return tmp_path


def ingot(*words: str) -> int:
    return cli.main(words)


def record(folder: Path) -> Run:
    recipe = asked.load_asked(cli.parse(["status", "--set", f"store.url='{folder}/.ingot'"]))
    return next(recipe.store(pytest.fail).records.newest_first())


def rows(told: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.split("│")][1:-1] for row in told.splitlines()]


def test_a_run_prints_and_records_mean_spread_and_each_value(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ingot("run", "smoke", "@over.toml", "--seeds", "0,1,2") == 0
    told = capsys.readouterr().out
    table = rows(told[told.index("mean over seeds, and spread: the standard deviation (n - 1)") :])
    values = [0.75, 0.75 + 1 / 64, 0.75 + 2 / 64]
    mean, spread = f"{statistics.mean(values):.4g}", f"{statistics.stdev(values):.4g}"
    by_seed = "0: 0.75, 1: 0.7656, 2: 0.7812"
    assert ["judge", "after pass at 1", mean, spread, "3", by_seed] in table
    kept = record(line)
    assert kept.finished
    assert list(kept.outcomes) == NODES
    assert kept.invocation.seeds == (0, 1, 2)
    (after,) = (one for one in kept.across_seeds if one.figure == "after_pass_at_1")
    assert after.values == dict(enumerate(values))
    assert (after.mean, after.spread) == (statistics.mean(values), statistics.stdev(values))


def test_a_run_without_seeds_is_told_and_recorded_as_ever(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ingot("run", "smoke", "@over.toml", "--set", "seed=1") == 0
    assert "mean over seeds" not in capsys.readouterr().out
    kept = record(line)
    assert list(kept.outcomes) == ["data", *VARYING]
    assert (kept.invocation.seeds, kept.across_seeds) == ((), ())
    assert ingot("plan", "smoke", "--json", "--set", "seed=1") == 0
    assert all("seed" not in node for node in json.loads(capsys.readouterr().out)["nodes"])


def test_a_plan_shows_what_would_be_built_for_each_seed(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ingot("run", "smoke", "@over.toml", "--set", "seed=1") == 0
    capsys.readouterr()
    assert ingot("plan", "smoke", "--seeds", "1,2") == 0
    told = capsys.readouterr().out
    assert told.startswith(f"smoke with seeds 1, 2 in {line}/.ingot\n")
    found = dict(re.findall(r"^  (\S+) +(build|reuse) ", told, re.M))
    assert found == {
        "data": "reuse",
        **{f"{node}.seed-1": "reuse" for node in VARYING},
        **{f"{node}.seed-2": "build" for node in VARYING},
    }
    assert ingot("run", "smoke", "--dry-run", "--json", "--seeds", "1,2") == 0
    nodes = json.loads(capsys.readouterr().out)["nodes"]
    assert {node["node"]: node.get("seed") for node in nodes} == {
        name: int(name[-1]) if "seed" in name else None for name in found
    }


def test_a_seed_that_fails_is_one_line_on_stderr_and_exit_1_and_is_not_counted(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ("--set", "pretrain.steps=13")
    assert ingot("run", "smoke", "@over.toml", "--seeds", "0,1,2", *sets) == 1
    captured = capsys.readouterr()
    assert captured.err == "ingot: error: train.seed-1: train was told to fail\n"
    (row,) = (one for one in rows(captured.out) if one[1:2] == ["after pass at 1"])
    assert row[4:] == ["2 of 3", "0: 0.75, 2: 0.7812"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "1,1"], "--seeds 1,1: 1 is named twice"),
        (["--seeds", "x"], "--seeds x: 'x' is no whole number"),
        (["--seeds", "-1,2"], "--seeds -1,2: '-1' is no whole number of 0 or more"),
        (["--seeds=-1"], "--seeds -1: '-1' is no whole number of 0 or more"),
        (["--seeds", "0,1", "--set", "seed = 3"], "--set seed = 3 beside --seeds 0,1: both say"),
        (["--seeds", "0,1", "--only", "judge.seed-2"], "did you mean 'judge.seed-"),
        (
            ["--seeds", "0,1", "--only", "judge"],
            "judge.seed-0, which is asked for, is made of data",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_it(
    line: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    for verb in ("run", "plan"):
        assert ingot(verb, "smoke", "@over.toml", *words) == 2
        error = capsys.readouterr().err
        assert error.startswith("ingot: error: ")
        assert message in error
        assert error.count("\n") == 1


def test_later_commands_speak_of_all_seeds_of_the_latest_run(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ingot("run", "smoke", "@over.toml", "--seeds", "0,1", "--only", "data") == 0
    assert ingot("run", "smoke", "@over.toml", "--seeds", "0,1", "--only", "train.seed-1") == 0
    capsys.readouterr()
    assert ingot("status") == 3
    told = capsys.readouterr().out
    assert told.startswith(f"smoke with seeds 0, 1 in {line}/.ingot\n")
    found = dict(re.findall(r"^  (\S+) +(\w+)", told, re.M))
    assert [name for name, state in found.items() if state == "fresh"] == ["data", "train.seed-1"]
    assert ingot("why", "train") == 0
    assert re.findall(r"^(\S+) is (\w+)$", capsys.readouterr().out, re.M) == [
        ("train.seed-0", "missing"),
        ("train.seed-1", "fresh"),
    ]
    assert ingot("show", "train.seed-1", "--verify") == 0
    assert "verified: 1 files" in capsys.readouterr().out
    assert ingot("show", "train") == 2
    assert "built: train.seed-1, data" in capsys.readouterr().err
    # A seed that is then asked for by itself stands in the place of all.
    assert ingot("status", "--set", "seed=1") == 3
    told = capsys.readouterr().out
    assert told.startswith(f"smoke in {line}/.ingot\n")
    assert re.search(r"^  train +fresh", told, re.M)


def test_a_stopped_run_names_the_command_that_goes_on_with_all_seeds() -> None:
    words = ["run", "tiny", "--set", "pretrain.steps=500", "--seeds", "2,0"]
    first = asked.load_asked(cli.parse(words)).invocation
    again = asked.command("run", first)
    assert again == "ingot run tiny --set pretrain.steps=500 --seeds 2,0"
    assert asked.load_asked(cli.parse(again.split()[1:])).invocation == first


def test_clean_keeps_the_latest_of_every_seed(line: Path) -> None:
    def trained() -> list[str]:
        store = asked.load_asked(cli.parse(["clean"])).store(pytest.fail)
        entries = clean.inventory(store, unfinished=True)
        return sorted(one.reason for one in entries if one.path.parts[-3] == "train")

    several = ("run", "smoke", "@over.toml", "--seeds", "0,1")
    assert ingot(*several) == 0
    # A run of the recipe's own seed replaces none of theirs.
    assert ingot("run", "smoke", "@over.toml", "--set", "pretrain.steps=5") == 0
    theirs = [f"latest of smoke train.seed-{seed}" for seed in (0, 1)]
    assert trained() == ["latest of smoke train", *theirs]
    assert ingot(*several, "--set", "pretrain.steps=6") == 0
    assert trained() == ["latest of smoke train", *theirs, "superseded", "superseded"]


@pytest.fixture
def client(line: Path) -> MlflowClient:
    """What MLflow got of a run of three seeds, of which the second fails."""
    sets = ("--set", "pretrain.steps=13", "--set", "tracking.timeout_seconds=30")
    assert ingot("run", "smoke", "--seeds", "0,1,2", *sets) == 1
    return MlflowClient(tracking_uri(TrackingConfig(), line / ".ingot"))


def test_mlflow_has_one_parent_with_every_seeds_nodes_and_what_they_came_to(
    line: Path, client: MlflowClient
) -> None:
    (experiment,) = {one.experiment_id for one in client.search_experiments()} - {"0"}
    found = client.search_runs([experiment])
    (parent,) = (one for one in found if "mlflow.parentRunId" not in one.data.tags)
    children = {one.info.run_name: one for one in found if one is not parent}
    assert set(children) == {name for name in NODES if name[-1] != "1"} | {"train.seed-1"}
    assert {one.data.tags["mlflow.parentRunId"] for one in children.values()} == {
        parent.info.run_id
    }
    assert children["judge.seed-2"].data.tags["ingot.seed"] == "2"
    assert "ingot.seed" not in children["data"].data.tags
    assert parent.info.status == "FAILED"
    assert parent.data.params["seed"] == "[0, 1, 2]"

    values = [0.75, 0.75 + 2 / 64]
    metrics = parent.data.metrics
    assert metrics["seeds/judge.after_pass_at_1.mean"] == pytest.approx(statistics.mean(values))
    assert metrics["seeds/judge.after_pass_at_1.spread"] == pytest.approx(statistics.stdev(values))
    assert metrics["seeds/judge.after_pass_at_1.count"] == 2
    # One seed's figure is not that of the run.
    assert not [name for name in metrics if name.endswith("/after_pass_at_1")]
    assert children["judge.seed-2"].data.metrics["figures/after_pass_at_1"] == values[1]

    table = client.load_table(experiment, "seeds.json", [parent.info.run_id])
    (row,) = table[table["figure"] == "after_pass_at_1"].to_dict("records")
    assert (row.pop("node"), row.pop("figure")) == ("judge", "after_pass_at_1")
    expected = {
        "mean": statistics.mean(values),
        "spread": statistics.stdev(values),
        "seed 0": values[0],
        "seed 1": math.nan,
        "seed 2": values[1],
    }
    # Read back with fewer digits than were written.
    assert row == pytest.approx(expected, rel=1e-12, nan_ok=True)
