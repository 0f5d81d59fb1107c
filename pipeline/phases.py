"""Which node a phase goes on from, and what the nodes around it are called."""

from collections.abc import Collection, Mapping

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


def rows_before(phases: Mapping[str, PretrainPhase], name: str) -> int:
    """Training rows of its corpus that the phases consumed which `name` goes on from."""
    corpus, rows, seen = phases[name].corpus, 0, {name}
    while (before := _phase_before(phases, name)) is not None and before not in seen:
        phase = phases[before]
        if phase.corpus == corpus:
            rows += phase.steps * phase.batch_sequences
        seen.add(before)
        name = before
    return rows


def said_in(node: str) -> str:
    """The table of a recipe in which a node of the line is described."""
    stage, dot, name = node.partition(".")
    return f"{stage}.phases.{name}" if dot else stage


def _phase_before(phases: Mapping[str, PretrainPhase], name: str) -> str | None:
    """The phase that `name` goes on from; none if it is the first, or begins with another node."""
    if phases[name].after is not None:
        found = begin_of("pretrain", phases[name].after, phases)
        return found if found in phases else None
    names = list(phases)
    place = names.index(name)
    return names[place - 1] if place else None
