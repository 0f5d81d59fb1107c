"""A stage is a function: config, workspace, artifacts in; one artifact out.

Imports neither torch nor ray, so that planning stays quick.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, get_type_hints, runtime_checkable

from configs.base import Frozen
from configs.errors import PlanError
from configs.parallel import ClusterConfig
from stages.artifacts import Artifact, Lease

OutT = TypeVar("OutT", bound=Artifact, covariant=True)


@runtime_checkable
class Tracker(Protocol):
    """Where a stage reports; it never learns what listens."""

    def start(self, *, steps: int, unit: str) -> None:
        """Announce how many steps follow, and what one of them is called."""

    def log(self, metrics: Mapping[str, Any], *, step: int) -> None:
        """Record one step. Scalars are plotted; other JSON values are kept in the record."""

    def note(self, message: str) -> None:
        """Tell the user one thing in one line."""

    def tag(self, name: str, value: str) -> None:
        """Mark the build with a fact about how it was made."""


@dataclass(frozen=True)
class Workspace:
    """Where and with what a stage works. Nothing here bears on what it makes."""

    out: str
    """The slot: an absolute local folder. Resume state goes under `resume/`, and is kept there
    when a build is interrupted; the next build of the same identity finds it."""
    machines: ClusterConfig
    tracker: Tracker
    lease: Lease

    def path(self, *names: str) -> Path:
        """A local path inside the slot."""
        return Path(self.out, *names)


@dataclass(frozen=True)
class Stage(Generic[OutT]):
    """A function with its contract, made by `@stage` from the signature."""

    name: str
    revision: int
    run: Callable[..., OutT]
    config: type[Frozen]
    takes: Mapping[str, type[Artifact]]
    makes: type[OutT]
    takes_more: type[Artifact] | None = None
    """The kind of any number of further inputs, under names of the caller's choice; none if the
    stage takes exactly what `takes` names."""
    reads: Callable[[Any], Mapping[str, Any]] | None = None
    """What the stage reads from outside the line, by content, given its config; JSON values. A
    table of files is `{name: {"bytes": ..., "sha256": ...}}`. It enters identity."""

    def __call__(self, config: Frozen, /, **inputs: "Planned[Artifact]") -> "Planned[OutT]":
        """Plan this stage. Runs nothing; PlanError if the wiring does not fit the signature."""
        if not isinstance(config, self.config):
            raise PlanError(
                f"stage {self.name} takes a {self.config.__name__}, not a {type(config).__name__}"
            )
        self._check_names(config, inputs)
        for name, node in inputs.items():
            kind = self.takes.get(name, self.takes_more)
            assert kind is not None
            if not issubclass(node.stage.makes, kind):
                raise PlanError(
                    f"stage {self.name}: input {name} must be a {kind.kind}, "
                    f"but {node.stage.name} makes a {node.stage.makes.kind}"
                )
        return Planned(stage=self, config=config, inputs=dict(inputs))

    def _check_names(self, config: Frozen, inputs: "Mapping[str, Planned[Artifact]]") -> None:
        """PlanError unless the function could be called with inputs of these names."""
        try:
            # Also finds an input that bears the name of the config's or the workspace's argument.
            inspect.signature(self.run).bind(config, None, **inputs)
        except TypeError as error:
            more = f" and any number of {self.takes_more.kind}s" if self.takes_more else ""
            raise PlanError(
                f"stage {self.name} takes inputs {sorted(self.takes)}{more}, "
                f"not {sorted(inputs)}: {error}"
            ) from None


@dataclass(frozen=True, eq=False)
class Planned(Generic[OutT]):
    """A node of the plan: a stage, its config, and where its inputs come from."""

    stage: Stage[OutT]
    config: Frozen
    inputs: Mapping[str, "Planned[Artifact]"]


def stage(
    *, revision: int, reads: Callable[[Any], Mapping[str, Any]] | None = None
) -> Callable[[Callable[..., OutT]], Stage[OutT]]:
    """Make a stage of `def name(config, work, *, input: Artifact, ...) -> Artifact`.

    A signature that ends in `**others: Artifact` takes any number of inputs of that kind besides.
    """

    def make(function: Callable[..., OutT]) -> Stage[OutT]:
        hints = get_type_hints(function)
        parameters = inspect.signature(function).parameters
        config, work, *inputs = (n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD)
        others = [hints[n] for n, p in parameters.items() if p.kind is p.VAR_KEYWORD]
        if hints[work] is not Workspace or not issubclass(hints[config], Frozen):
            raise PlanError(
                f"stage {function.__name__} must begin (config: Frozen, work: Workspace)"
            )
        return Stage(
            name=function.__name__,
            revision=revision,
            run=function,
            config=hints[config],
            takes={name: hints[name] for name in inputs},
            takes_more=others[0] if others else None,
            makes=hints["return"],
            reads=reads,
        )

    return make
