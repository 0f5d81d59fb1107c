"""What a plan says and what the run after it does are the same, whatever there is and is asked."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from configs.errors import PlanError
from configs.parallel import StoreConfig
from pipeline.decide import Block, Build, Judged, Leave, Recheck, Refuse, Reuse, decide
from pipeline.graph import Graph, Role, Selection, assign_roles, make_graph
from pipeline.removal import remove
from pipeline.slots import Slot
from pipeline.states import Examiner
from stages.artifacts import Corpus
from stages.contract import Planned, Workspace, stage
from tests.pipeline.fakes import RECIPE, FakeConfig, World, fill, outcomes

ACCIDENTS = ("lost", "lost for good", "damaged", "rebuilt", "asked anew", "will differ")
VERSIONS: dict[int, int] = {}
"""By number of the node: as what its next build comes out. No part of identity."""


@stage(revision=1)
def mixing(config: FakeConfig, work: Workspace, **others: Corpus) -> Corpus:
    """A corpus of its inputs' text, or, of an odd number, of its own text alone."""
    number = config.seed
    texts = [] if number % 2 else [one.path("text.txt").read_text() for one in others.values()]
    own = f"{number} in version {VERSIONS.get(number, 0)}"
    slot = Slot(Path(work.out).parent, work.lease, 1, ())
    return fill(slot, "; ".join([own, *texts]))


@dataclass(frozen=True)
class Story:
    """A line, what happened to its artifacts, what is asked for, and how many nodes at a time."""

    inputs: Sequence[Sequence[int]]
    """Of each node, the numbers of those that it is made of."""
    accidents: Sequence[tuple[str, int]]
    selection: Selection
    at_once: int

    def graph(self, world: World, anew: Sequence[int] = ()) -> Graph:
        """The line; those nodes that are asked for anew have another config."""
        line: dict[str, Planned[Corpus]] = {}
        for number, suppliers in enumerate(self.inputs):
            config = FakeConfig(seed=number, steps=3 + anew.count(number))
            given = {f"from_{one}": line[f"n{one}"] for one in suppliers}
            line[f"n{number}"] = mixing(config, **given)
        return make_graph(line, world.store.hashes)

    def happen(self, world: World) -> Graph:
        """Build the line, let the accidents happen, and return the line as it is then asked for."""
        anew: list[int] = []
        world.run(graph=self.graph(world))
        for accident, number in self.accidents:
            graph, name = self.graph(world, anew), f"n{number}"
            generation = world.store.newest(graph[name])
            folder = world.store.folder(graph[name]) / f"g{generation}"
            match accident:
                case "lost" | "lost for good" if generation:
                    remove(folder)
                    VERSIONS[number] = VERSIONS.get(number, 0) + (accident != "lost")
                case "damaged" if generation:
                    (file,) = folder.glob("*/files/text.txt")
                    file.write_text("x")
                case "asked anew":
                    anew.append(number)
                case "will differ":
                    VERSIONS[number] = VERSIONS.get(number, 0) + 1
                case "rebuilt":
                    VERSIONS[number] = VERSIONS.get(number, 0) + 1
                    world.run(graph=graph, selection=Selection(only=(name,), force=(name,)))
        return self.graph(world, anew)


@st.composite
def stories(draw: st.DrawFn) -> Story:
    count = draw(st.integers(2, 5))
    numbers = st.integers(0, count - 1)
    # Chains more often than not: what happens above must reach far down.
    inputs = [[], *([draw(st.integers(0, one))] for one in range(count - 1))]
    for number in range(2, count):
        inputs[number] = sorted({*inputs[number], *draw(st.sets(st.integers(0, 1), max_size=1))})
    accidents = draw(
        st.lists(st.tuples(st.sampled_from(ACCIDENTS), numbers), min_size=1, max_size=4)
    )
    names = st.sets(numbers.map("n{}".format), min_size=1, max_size=2).map(sorted).map(tuple)
    match draw(st.sampled_from(["plain", "plain", "from", "force", "only", "both", "forced only"])):
        case "from":
            chosen = Selection(start=draw(names))
        case "force":
            chosen = Selection(force=draw(names))
        case "only":
            chosen = Selection(only=draw(names))
        case "both":
            chosen = Selection(start=draw(names), force=draw(names))
        case "forced only":
            chosen = Selection(only=(only := draw(names)), force=only[:1])
        case _:
            chosen = Selection()
    return Story(inputs, accidents, chosen, draw(st.sampled_from([1, 3])))


def allowed(
    graph: Graph, roles: Mapping[str, Role], judged: Mapping[str, Judged]
) -> dict[str, set[str]]:
    """By node: the outcomes that a run may have after this plan; `none` if it records nothing."""
    found: dict[str, set[str]] = {}
    for node in graph:
        # What is made of a node that may be blocked may be blocked as well.
        above = (
            {"blocked"} if any("blocked" in found[one] for one in node.inputs.values()) else set()
        )
        match judged[node.name].decision:
            case Reuse():
                found[node.name] = {"reused"}
            case Build(provided=provided):
                found[node.name] = {"built"} | ({"blocked"} if provided else above)
            case Recheck(provided=provided):
                found[node.name] = {"built", "reused"} | ({"blocked"} if provided else above)
            case Refuse():
                found[node.name] = {"failed"} | above
            case Block():
                found[node.name] = {"blocked"}
            case Leave() if roles[node.name] is Role.AFTER_FORCE:
                found[node.name] = {"none", "reused"} | above
            case Leave():
                found[node.name] = {"none"}
    return found


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(stories())
def test_a_run_does_what_its_plan_says(story: Story) -> None:
    VERSIONS.clear()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        # What a crash would lose does not matter here, and waiting for the disk would.
        patch.setattr(os, "fsync", lambda file: None)
        world = World(StoreConfig(url=folder, min_free_bytes=0))
        graph = story.happen(world)
        roles = assign_roles(graph, story.selection)
        try:
            judged = decide(graph, story.selection, Examiner(world.store, RECIPE))
        except PlanError:
            event("refused: a node that is left is out of date")
            return
        run = world.run(graph=graph, selection=story.selection, at_once=story.at_once)
    done = {name: outcomes(run).get(name, "none") for name in graph.nodes}
    expected = allowed(graph, roles, judged)
    assert {name: one for name, one in done.items() if one not in expected[name]} == {}
    for name, one in judged.items():
        event(f"{type(one.decision).__name__}: {done[name]}")
