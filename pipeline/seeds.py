"""One recipe for several seeds: which are asked for, and what the figures of a run came to."""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from statistics import fmean, stdev

from configs.errors import ArtifactError, ConfigError
from pipeline.graph import Graph, Node
from pipeline.records import AcrossSeeds, Built, Reused, Run
from stages.artifacts import RATE, Artifact


def parse_seeds(text: str | None) -> tuple[int, ...]:
    """The seeds of `--seeds 0,1,2` in the order given; empty without one.

    ConfigError if one is no seed or is named twice, or if there is only one.
    """
    if text is None:
        return ()
    example = "list seeds as --seeds 0,1,2"
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not (word.isascii() and word.isdecimal()):
            raise ConfigError(
                f"--seeds {text}: {word!r} is no whole number of 0 or more; {example}"
            )
    seeds = tuple(map(int, words))
    if twice := [seed for place, seed in enumerate(seeds) if seed in seeds[:place]]:
        raise ConfigError(f"--seeds {text}: {twice[0]} is named twice; name each seed once")
    if len(seeds) == 1:
        raise ConfigError(
            f"--seeds {text}: a single seed, of which there is no spread; {example}, or use "
            f"--set seed={seeds[0]} in its place"
        )
    return seeds


def sets_seed(sets: Sequence[str]) -> str | None:
    """The last `--set` that says the recipe's seed."""
    found = [one for one in sets if one.partition("=")[0].strip() == "seed"]
    return found[-1] if found else None


def across_seeds(graph: Graph, run: Run, store_root: Path) -> tuple[AcrossSeeds, ...]:
    """Mean and spread of what the nodes of `run` came to, where they differ between seeds.

    A value that is infinite or not a number is left out; its figure has those of the other seeds.
    """
    found: dict[str, dict[str, dict[int, float]]] = {node.line_name: {} for node in graph}
    for name, outcome in run.outcomes.items():
        node = graph[name]
        if node.seed is not None and isinstance(outcome, Built | Reused):
            for figure, value in _figures(node, outcome, store_root).items():
                if isfinite(value):
                    found[node.line_name].setdefault(figure, {})[node.seed] = value
    return tuple(
        AcrossSeeds(
            node=node,
            figure=figure,
            values=values,
            mean=fmean(values.values()),
            spread=stdev(values.values()) if len(values) > 1 else None,
        )
        for node, figures in found.items()
        for figure, values in figures.items()
    )


def _figures(node: Node, outcome: Built | Reused, store_root: Path) -> Mapping[str, float]:
    """All that is compared of an artifact, of which the record holds only part."""
    recorded = {name: value for name, value in outcome.figures.items() if name != RATE}
    try:
        made: Artifact = node.planned.stage.makes.load(str(store_root / outcome.address))
    except ArtifactError:
        # Deleted by hand since: that must not cost the figures of all other seeds.
        return recorded
    return made.figures() | recorded
