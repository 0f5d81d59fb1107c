"""A stage is a function: config, workspace, artifacts in; one artifact out.

Imports neither torch nor ray, so that planning stays quick.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, get_type_hints, runtime_checkable

from configs.base import Frozen
from configs.errors import PlanError
from configs.parallel import ClusterConfig
from stages.artifacts import Artifact, Lease
from stages.hashing import Hashes

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
"""What a stage may be called: its name is a folder of the store and a selector."""

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
    """An absolute local folder: whatever is in it when the stage returns is the artifact."""
    machines: ClusterConfig
    tracker: Tracker
    lease: Lease
    hashes: Hashes
    """Sizes and hashes of files outside the line, as they were when the stage was planned."""
    earlier: tuple[str, ...] = ()
    """Folders that interrupted builds of the same identity left, the newest first. What they hold
    beside their files may be read, to resume from it; it belongs to them. A stage changes nothing
    there, and deletes their saves only once it has a complete one of its own."""

    def path(self, *names: str) -> Path:
        """A local path inside the artifact to be."""
        return Path(self.out, *names)

    def beside(self, *names: str) -> Path:
        """A local path in the builder's folder, for what is not part of the artifact.

        The step log lies there, and resume state under `resume/`, where the next build of the same
        identity finds it as one of its `earlier`.
        """
        return Path(self.out).parent.joinpath(*names)

    def resumable(self, *names: str) -> list[Path]:
        """Where resume state of these names may lie: in this build's own folder, then in earlier
        ones."""
        folders = [self.beside(), *map(Path, self.earlier)]
        return [folder.joinpath("resume", *names) for folder in folders]


@dataclass(frozen=True)
class Stage(Generic[OutT]):
    """A function with its contract, made by `@stage` from the signature."""

    name: str
    """The function's own."""
    function: str
    """`package.module:name`, which no other stage has; it enters identity."""
    revision: int
    run: Callable[..., OutT]
    config: type[Frozen]
    takes: Mapping[str, type[Artifact]]
    makes: type[OutT]
    takes_more: type[Artifact] | None = None
    """The kind of any number of further inputs, under names of the caller's choice; none if the
    stage takes exactly what `takes` names."""
    reads: Callable[[Any, Hashes], Mapping[str, Any]] | None = None
    """What the stage reads from outside the line, by content, given its config; JSON values. A
    table of files is `{name: {"bytes": ..., "sha256": ...}}`, as `Hashes.of` says of each. It
    enters identity."""

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
    *, revision: int, reads: Callable[[Any, Hashes], Mapping[str, Any]] | None = None
) -> Callable[[Callable[..., OutT]], Stage[OutT]]:
    """Make a stage of `def name(config, work, *, input: Artifact, ...) -> Artifact`.

    A signature that ends in `**others: Artifact` takes any number of inputs of that kind besides.
    PlanError for a signature or a name that no stage can have.
    """

    def make(function: Callable[..., OutT]) -> Stage[OutT]:
        if not _NAME.fullmatch(function.__name__):
            raise PlanError(
                f"stage {function.__name__!r}: a stage's name holds at most 64 of A-Z, a-z, 0-9 "
                "and _; rename the function"
            )
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
            function=f"{function.__module__}:{function.__qualname__}",
            revision=revision,
            run=function,
            config=hints[config],
            takes={name: hints[name] for name in inputs},
            takes_more=others[0] if others else None,
            makes=hints["return"],
            reads=reads,
        )

    return make
