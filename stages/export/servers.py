"""Who loads a bundle and who does not, and why: by rules read in sources, and by trials.

Loads no torch, so that planning can tell what a bundle's card will say. A verdict claims no more
than is known: a program that was not tried on a bundle of its family and variant is said to break
no known rule, not to work.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from configs.delivery import Target
from configs.model import ModelConfig
from configs.shape import Family
from stages.export import gpu_rules, npu_rules
from stages.export.rules import Effect, Program, Rule

TRIALS = "docs/clients.md"
HOMES: Mapping[str, Target] = {"fp8": "cuda", "fp4": "cuda", "w8a8": "ascend", "w4a8": "ascend"}
"""Variants that one target alone has."""
Basis = Literal["source", "documents"]


@dataclass(frozen=True, slots=True)
class Server:
    """A program that loads bundles, and what is known of it."""

    title: str
    """Name, version and machines, as texts say them."""
    targets: tuple[Target, ...]
    """Whose bundles it may be given, first the one that is made for it."""
    rules: tuple[Rule, ...]
    tried: Mapping[Family, frozenset[str]]
    """Variants of which bundles were loaded and answered, by family."""
    loader_tried: Mapping[Family, frozenset[str]]
    """Variants that its loader alone was tried on, with no machine to compute on."""
    basis: Basis = "source"
    """Where what is not tried is known from."""
    families: tuple[Family, ...] = ("v3", "v32", "v4")
    """Of which anything is known."""


def _variants(*names: str) -> frozenset[str]:
    return frozenset(names)


_BOTH = _variants("bf16", "fp8")
_INTEGERS = _variants("w8a8", "w4a8")
_LOADED: Mapping[Family, frozenset[str]] = {
    "v3": _variants("fp8"),
    "v32": _variants("fp8"),
    "v4": _variants("fp8", "fp4"),
}
SERVERS: Mapping[Program, Server] = {
    "transformers": Server(
        "transformers 5.23.0",
        ("cuda", "ascend"),
        gpu_rules.TRANSFORMERS,
        {"v3": _BOTH, "v32": _BOTH, "v4": _BOTH},
        {},
    ),
    "vllm": Server(
        "vLLM 0.32.0 on GPUs",
        ("cuda",),
        gpu_rules.VLLM,
        {},
        _LOADED,
    ),
    "vllm-cpu": Server(
        "vLLM 0.32.0 on CPUs", ("cuda",), gpu_rules.VLLM_CPU, {"v3": _variants("bf16")}, {}
    ),
    "sglang": Server("SGLang 0.5.23", ("cuda",), gpu_rules.SGLANG, {}, {}),
    "llama.cpp": Server(
        "llama.cpp, release 11434, by its converter", ("cuda",), gpu_rules.LLAMA, {"v3": _BOTH}, {}
    ),
    "vllm-ascend": Server(
        "vllm-ascend 0.23.0",
        ("ascend", "cuda"),
        npu_rules.VLLM_ASCEND,
        {},
        {"v3": _INTEGERS, "v32": _INTEGERS, "v4": _INTEGERS},
    ),
    "mindie": Server(
        "MindIE", ("ascend",), npu_rules.MINDIE, {}, {}, basis="documents", families=("v3",)
    ),
}


@dataclass(frozen=True, slots=True)
class Breach:
    """A rule that a bundle breaks, and what it has in its place."""

    rule: Rule
    found: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one program makes of one bundle."""

    program: Program
    family: Family
    variant: str
    breaches: tuple[Breach, ...]

    @property
    def server(self) -> Server:
        """The program, and what is known of it."""
        return SERVERS[self.program]

    def of(self, *effects: Effect) -> tuple[Breach, ...]:
        """The broken rules that come to one of these."""
        return tuple(breach for breach in self.breaches if breach.rule.effect in effects)

    @property
    def serves(self) -> bool:
        """Whether no known rule keeps the program from answering as the model does."""
        return not self.of("refuses", "misreads", "changes")

    @property
    def was_tried(self) -> bool:
        """Whether bundles of this family and variant were loaded by it and answered."""
        return self.variant in self.server.tried.get(self.family, ())

    @property
    def evidence(self) -> str:
        """Whether the program was tried on such bundles; where what is said is known from."""
        if not self.serves:
            against = self.of("refuses", "misreads", "changes")
            return "; ".join(dict.fromkeys(breach.rule.source for breach in against))
        if self.was_tried:
            return f"tried on bundles of this family and variant: {TRIALS}"
        known = f"by its {self.server.basis}, not tried"
        if self.variant in self.server.loader_tried.get(self.family, ()):
            return f"its loader alone was tried ({TRIALS}); else {known}"
        return known


def verdicts(model: ModelConfig, target: Target, variant: str) -> tuple[Verdict, ...]:
    """What each program for this target makes of a bundle of the model, by name in `SERVERS`."""
    return tuple(
        Verdict(program, model.family, variant, tuple(_breaches(server, model, variant)))
        for program, server in SERVERS.items()
        if target in server.targets and model.family in server.families
    )


def bundles(targets: Iterable[Target], variants: Iterable[str]) -> Iterator[tuple[Target, str]]:
    """Which variants each target has of those asked for."""
    for target, variant in itertools.product(targets, variants):
        if HOMES.get(variant, target) == target:
            yield target, variant


def _breaches(server: Server, model: ModelConfig, variant: str) -> Iterator[Breach]:
    for rule in server.rules:
        for found in rule.breaches(model, variant):
            yield Breach(rule, found)
