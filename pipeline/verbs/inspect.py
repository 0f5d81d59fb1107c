"""`ingot status`, `why` and `show`: what is there, why it is not fresh, and what it holds."""

import argparse
import json
from collections.abc import Iterator, Mapping

from pipeline.decide import Damaged, Examiner, Fresh, Missing, Stale, State, Unsettled, survey
from pipeline.graph import Graph, Node
from pipeline.provenance import source_digest
from pipeline.verbs.asked import Asked, load_asked, locate
from stages.manifest import read_manifest, verify


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


def show(args: argparse.Namespace) -> int:
    """Print an artifact's facts, inputs and files, and hash every file again."""
    asked = load_asked(args)
    folder = locate(asked.store(print), asked.recipe.name, args.artifact)
    manifest = read_manifest(str(folder))
    print(f"{manifest.kind} {manifest.fingerprint}, content {manifest.content[:16]}")
    print(f"at {folder / manifest.address}")
    made = manifest.provenance
    print(
        f"by stage {manifest.stage_name} revision {manifest.revision}, run {made.get('run')}, "
        f"{made.get('time')}, {made.get('seconds', 0):.1f} s, ingot {made.get('ingot')}"
    )
    print("facts")
    for name, value in manifest.facts.items():
        print(f"  {name} = {json.dumps(value)}")
    print("inputs" if manifest.inputs else "inputs: none")
    for name, entry in manifest.inputs.items():
        print(f"  {name} = {entry.address}, content {entry.content[:16]}")
    print("files")
    for name, file in manifest.files.items():
        print(f"  {file.bytes:>14,}  {file.sha256[:16]}  {name}")
    verify(str(folder))
    print(f"verified: {len(manifest.files)} files have the sizes and hashes of the manifest")
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
