"""`ingot status` and `why`: what is there, and why it is not fresh."""

import argparse
import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from itertools import islice

from pipeline.decide import Block, Judged, Recheck, Reuse, decide
from pipeline.figures import shortened, show_bytes, show_figures, show_seconds
from pipeline.graph import Graph, Node, Selection
from pipeline.provenance import source_digest
from pipeline.records import Blocked, Failed, Records
from pipeline.states import Damaged, Examiner, Fresh, Missing, Stale
from pipeline.store import Store
from pipeline.verbs.asked import Asked, load_asked

STALE = 3
"""The exit code of `status` if something is not fresh."""
_FIGURES = 2
"""Of a node, before and after among them."""
_RUNS = 50
"""So many runs of a recipe are looked through for what failed last."""


def status(args: argparse.Namespace) -> int:
    """Print every node: fresh or why it is not, when it was built, how long that took, its key
    figures and its size. Exit 3 if one is not fresh."""
    asked, store, graph, judged = _judge(args)
    failed = _last_failures(store.records, asked.recipe.name)
    if args.json:
        nodes = [_record(node, judged[node.name], failed) for node in graph]
        record = {"recipe": asked.recipe.name, "store": asked.recipe.store.url, "nodes": nodes}
        print(json.dumps(record, indent=1))
    else:
        print(f"{asked.title} in {asked.recipe.store.url}")
        width = max(map(len, graph.nodes))
        for node in graph:
            for line in _lines(node, judged[node.name], failed, width):
                print(line.rstrip())
    return 0 if all(isinstance(one.decision, Reuse) for one in judged.values()) else STALE


def _last_failures(records: Records, recipe: str) -> dict[str, str]:
    """By node whose last try failed: the run, and the error."""
    tried: dict[str, str] = {}
    for run in islice((run for run in records.newest_first() if run.recipe == recipe), _RUNS):
        for node, one in run.outcomes.items():
            if not isinstance(one, Blocked):
                word = (
                    f"failed in run {run.id}: {one.error}"
                    if isinstance(one, Failed) and not one.was_stopped
                    else ""
                )
                tried.setdefault(node, word)
    return {node: word for node, word in tried.items() if word}


def _lines(node: Node, one: Judged, failed: Mapping[str, str], width: int) -> Iterator[str]:
    """What is there of a node, or why it is not fresh, and how its last try ended; then that its
    code changed, if it did."""
    begin = f"  {node.name:{width}}  {_word(one):8}"
    if isinstance(one.decision, Reuse):
        committed = one.decision.committed
        made = committed.manifest.provenance
        figures = dict(list(committed.artifact.key_figures().items())[:_FIGURES])
        size, seconds = show_bytes(committed.num_bytes), show_seconds(made.get("seconds", 0.0))
        when = _local(made.get("time"))
        yield f"{begin} {when}  {seconds:>8}  {size:>8}  {show_figures(figures)}"
    else:
        yield f"{begin} {'; '.join(_reasons(one))}"
        if node.name in failed:
            yield f"  {'':{width}}  {'':8} {shortened(failed[node.name], 160)}"
    yield from (f"  {'':{width}}  {'':8} {told}" for told in _code_changes(node, one))


def _record(node: Node, one: Judged, failed: Mapping[str, str]) -> dict[str, object]:
    """The same as JSON values."""
    record: dict[str, object] = {"node": node.name, "state": _word(one)}
    if isinstance(one.decision, Reuse):
        committed = one.decision.committed
        made = committed.manifest.provenance
        record |= {
            "built": made.get("time"),
            "seconds": made.get("seconds"),
            "bytes": committed.num_bytes,
            "figures": committed.artifact.key_figures(),
            "uri": str(committed.path),
        }
    elif node.name in failed:
        record["last_try"] = failed[node.name]
    return record | {"reasons": [*_reasons(one), *_code_changes(node, one)]}


def _local(stamp: object) -> str:
    """A record's time as clocks here show it, to the minute."""
    try:
        moment = datetime.fromisoformat(str(stamp))
    except ValueError:
        return f"{'?':16}"
    return moment.astimezone().strftime("%Y-%m-%d %H:%M")


def why(args: argparse.Namespace) -> int:
    """Print the field, input or file for which a node must be built, and so on up the line."""
    _, _, graph, judged = _judge(args)
    for name in graph.resolve(args.stage):
        for line in _explain(graph, judged, name, ""):
            print(line)
    return 0


def _judge(args: argparse.Namespace) -> tuple[Asked, Store, Graph, dict[str, Judged]]:
    """The line as a plain run would find it."""
    asked = load_asked(args)
    store = asked.store(print)
    graph = asked.graph(store.hashes)
    return asked, store, graph, decide(graph, Selection(), Examiner(store, asked.recipe.name))


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
