"""Which node a phase goes on from, and what the nodes around it are called."""

from collections.abc import Collection, Mapping

from configs.recipe import Recipe
from configs.train import PretrainPhase


def last(nodes: Collection[str], *, but: Collection[str] = ()) -> str | None:
    """The name of the last of some nodes, without those of `but`; none if there is none."""
    found = [name for name in nodes if name not in but]
    return found[-1] if found else None


def given(**inputs: str | None) -> dict[str, str]:
    """The inputs that there are."""
    return {role: node for role, node in inputs.items() if node is not None}


def corpus_node(name: str | None) -> str:
    """The node of a corpus of `data.corpora`, or of the one without a name."""
    return "data" if name is None else f"data.{name}"


def begin_of(stage: str, after: str | None, phases: Collection[str]) -> str | None:
    """The node that `after` means: a phase of the same stage, or any node."""
    named = f"{stage}.{after}"
    return named if named in phases else after


def name_models(made: str | None, better: str | None) -> dict[str, str]:
    """What models are called if a recipe does not say: before and after post-training."""
    if better is None:
        return given(model=made)
    return given(before=made, after=better)


def rows_before(recipe: Recipe, phase: str) -> int:
    """Training rows of its corpus that the phases consumed which the node `phase` goes on from.

    A recipe's own node between two phases consumes none; of several that it is made of, the one
    that went farthest counts.
    """
    phases, corpus = recipe.pretraining, recipe.pretraining[phase].corpus

    def consumed(node: str | None, above: frozenset[str]) -> int:
        if node is None or node in above:
            return 0  # A circle is told of when the line is wired.
        above |= {node}
        if node in phases:
            own = phases[node].steps * phases[node].batch_sequences
            before = consumed(_begin_of_phase(phases, node), above)
            return before + (own if phases[node].corpus == corpus else 0)
        added = recipe.nodes.get(node)
        suppliers = () if added is None else added.inputs.values()
        return max((consumed(one, above) for one in suppliers), default=0)

    return consumed(_begin_of_phase(phases, phase), frozenset({phase}))


def said_in(node: str) -> str:
    """The table of a recipe in which a node of the line is described."""
    stage, dot, name = node.partition(".")
    return f"{stage}.phases.{name}" if dot else stage


def _begin_of_phase(phases: Mapping[str, PretrainPhase], name: str) -> str | None:
    """The node that a phase goes on from; none if it is the first."""
    names = list(phases)
    place = names.index(name)
    return begin_of("pretrain", phases[name].after, phases) or (names[place - 1] if place else None)
