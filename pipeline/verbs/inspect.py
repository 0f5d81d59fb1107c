"""`ingot status` and `why`: what is there, and why it is not fresh."""

import argparse
from collections.abc import Iterator, Mapping

from pipeline.decide import Damaged, Examiner, Fresh, Missing, Stale, State, Unsettled, survey
from pipeline.graph import Graph, Node
from pipeline.provenance import source_digest
from pipeline.verbs.asked import Asked, load_asked


def status(args: argparse.Namespace) -> int:
    """Print every node as fresh, stale or missing, with the reason."""
    asked, graph, states = _survey(args)
    print(f"{asked.title} in {asked.recipe.store.url}")
    width = max(map(len, graph.nodes))
    for node in graph:
        state = states[node.name]
        reasons = [*_reasons(state), *_code_changes(node, state)]
        print(f"  {node.name:{width}}  {_word(state):8} {'; '.join(reasons)}".rstrip())
    return 0


def why(args: argparse.Namespace) -> int:
    """Print the field, input or file for which a node must be built, and so on up the line."""
    _, graph, states = _survey(args)
    for name in graph.resolve(args.stage):
        for line in _explain(graph, states, name, ""):
            print(line)
    return 0


def _survey(args: argparse.Namespace) -> tuple[Asked, Graph, dict[str, State]]:
    asked = load_asked(args)
    store = asked.store(print)
    graph = asked.graph(store.hashes)
    return asked, graph, survey(graph, Examiner(store, asked.recipe.name))


def _explain(graph: Graph, states: Mapping[str, State], name: str, indent: str) -> Iterator[str]:
    state = states[name]
    yield f"{indent}{name} is {_word(state)}"
    if isinstance(state, Fresh):
        made = state.committed.manifest.provenance
        yield f"{indent}  built {made.get('time')} by run {made.get('run')}, and nothing changed"
    for reason in [*_reasons(state), *_code_changes(graph[name], state)]:
        yield f"{indent}  {reason}"
    for supplier in dict.fromkeys(graph[name].inputs.values()):
        if not isinstance(states[supplier], Fresh):
            yield from _explain(graph, states, supplier, indent + "  ")


def _word(state: State) -> str:
    match state:
        case Fresh():
            return "fresh"
        case Stale() | Unsettled():
            return "stale"
        case Missing():
            return "missing"
        case Damaged():
            return "damaged"


def _reasons(state: State) -> tuple[str, ...]:
    return () if isinstance(state, Fresh) else state.reasons


def _code_changes(node: Node, state: State) -> list[str]:
    """Code is provenance, not identity: a change is told, and rebuilds nothing."""
    if not isinstance(state, Fresh):
        return []
    built_by = state.committed.manifest.provenance.get("source")
    if built_by == source_digest(node.planned.stage):
        return []
    return [f"code changed since; --force {node.name} rebuilds it"]
