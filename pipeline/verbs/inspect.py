"""`ingot status` and `why`: what is there, and why it is not fresh."""

import argparse
from collections.abc import Iterator, Mapping

from pipeline.decide import Block, Judged, Recheck, Reuse, decide
from pipeline.graph import Graph, Node, Selection
from pipeline.provenance import source_digest
from pipeline.states import Damaged, Examiner, Fresh, Missing, Stale
from pipeline.verbs.asked import Asked, load_asked


def status(args: argparse.Namespace) -> int:
    """Print every node as fresh, stale or missing, with the reason."""
    asked, graph, judged = _judge(args)
    print(f"{asked.title} in {asked.recipe.store.url}")
    width = max(map(len, graph.nodes))
    for node in graph:
        one = judged[node.name]
        reasons = [*_reasons(one), *_code_changes(node, one)]
        print(f"  {node.name:{width}}  {_word(one):8} {'; '.join(reasons)}".rstrip())
    return 0


def why(args: argparse.Namespace) -> int:
    """Print the field, input or file for which a node must be built, and so on up the line."""
    _, graph, judged = _judge(args)
    for name in graph.resolve(args.stage):
        for line in _explain(graph, judged, name, ""):
            print(line)
    return 0


def _judge(args: argparse.Namespace) -> tuple[Asked, Graph, dict[str, Judged]]:
    """The line as a plain run would find it."""
    asked = load_asked(args)
    store = asked.store(print)
    graph = asked.graph(store.hashes)
    return asked, graph, decide(graph, Selection(), Examiner(store, asked.recipe.name))


def _explain(graph: Graph, judged: Mapping[str, Judged], name: str, indent: str) -> Iterator[str]:
    one = judged[name]
    yield f"{indent}{name} is {_word(one)}"
    if isinstance(one.decision, Reuse):
        made = one.decision.committed.manifest.provenance
        yield f"{indent}  built {made.get('time')} by run {made.get('run')}, and nothing changed"
    for reason in [*_reasons(one), *_code_changes(graph[name], one)]:
        yield f"{indent}  {reason}"
    for supplier in dict.fromkeys(graph[name].inputs.values()):
        if not isinstance(judged[supplier].decision, Reuse):
            yield from _explain(graph, judged, supplier, indent + "  ")


def _word(one: Judged) -> str:
    match one.state, one.decision:
        case Fresh(), Reuse():
            return "fresh"
        case ((Fresh() | Stale()), _):
            return "stale"
        case Missing(), _:
            return "missing"
        case Damaged(), _:
            return "damaged"
    raise AssertionError(one)


def _reasons(one: Judged) -> tuple[str, ...]:
    match one.state, one.decision:
        case Fresh(), Recheck(inputs):
            return tuple(f"depends on {name}, which is not up to date" for name in inputs)
        case Fresh(), Block(by):
            return (f"depends on {by}, which is not up to date",)
        case ((Stale(reasons) | Missing(reasons) | Damaged(reasons)), _):
            return reasons
    return ()


def _code_changes(node: Node, one: Judged) -> list[str]:
    """Code is provenance, not identity: a change is told, and rebuilds nothing."""
    if not isinstance(one.decision, Reuse):
        return []
    built_by = one.decision.committed.manifest.provenance.get("source")
    if built_by == source_digest(node.planned.stage):
        return []
    return [f"code changed since; --force {node.name} rebuilds it"]
