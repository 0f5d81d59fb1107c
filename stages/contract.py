"""A stage is a function: config, workspace, artifacts in; one artifact out.

Its *face* says what it takes and makes, and is all that planning needs; its *body*, the function,
is loaded when a node is built. A face stands in a module of its own that loads neither torch nor
ray, and the body is marked with `@fills(face)`, which compares the two signatures. A function
marked with `@stage` is both at once.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import (
    Any,
    Generic,
    ParamSpec,
    Protocol,
    TypeVar,
    get_args,
    get_type_hints,
    runtime_checkable,
)

from cluster.supply import Supply
from configs.base import Frozen
from configs.errors import PlanError
from configs.parallel import ClusterConfig
from configs.profile import Profile
from stages.artifacts import Artifact
from stages.hashing import Hashes
from stages.manifest import LOGS, Lease

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
"""What a stage may be called: its name is a folder of the store and a selector."""

P = ParamSpec("P")
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
    supply: Supply
    """How the stage's workers come by files where they do not see the driver's."""
    profile: Profile | None = None
    """Which steps of training are to be traced."""
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

    @property
    def logs(self) -> Path:
        """The builder's folder of what workers print, for whoever opens a pool of them."""
        return self.beside(LOGS)

    def resumable(self, *names: str) -> list[Path]:
        """Where resume state of these names may lie: in this build's own folder, then in earlier
        ones."""
        folders = [self.beside(), *map(Path, self.earlier)]
        return [folder.joinpath("resume", *names) for folder in folders]


@dataclass(frozen=True)
class Face(Generic[OutT]):
    """All that is known of a stage before it runs: enough to plan it, without loading its body."""

    name: str
    """A folder of the store, and a selector."""
    revision: int
    config: type[Frozen]
    makes: type[OutT]
    body: str
    """The function that does the work, `package.module:name`; loaded when a node is built."""
    takes: Mapping[str, type[Artifact]] = field(default_factory=dict)
    """Inputs by name."""
    may_take: Mapping[str, type[Artifact]] = field(default_factory=dict)
    """Inputs that may be left out."""
    takes_more: type[Artifact] | None = None
    """The kind of any number of further inputs, under names of the caller's choice; none if the
    stage takes no others."""
    reads: Callable[[Any, Hashes], Mapping[str, Any]] | None = None
    """What the stage reads from outside the line, by content, given its config; JSON values. A
    table of files is `{name: {"bytes": ..., "sha256": ...}}`, as `Hashes.of` says of each. It
    enters identity."""
    known_as: str = ""
    """What identity calls the stage, if its body has moved since; otherwise that is `body`."""
    reserved: tuple[str, str] = ("config", "work")
    """The body's first two arguments, whose names no input can have."""

    def __post_init__(self) -> None:
        """PlanError for a name that no stage can have."""
        if not _NAME.fullmatch(self.name):
            raise PlanError(
                f"stage {self.name!r}: a stage's name holds at most 64 of A-Z, a-z, 0-9 and _; "
                "rename the function"
            )

    @property
    def function(self) -> str:
        """`package.module:name`, which no other stage has; it enters identity."""
        return self.known_as or self.body

    def __call__(self, config: Frozen, /, **inputs: "Planned[Artifact]") -> "Planned[OutT]":
        """Plan this stage. Runs nothing; PlanError if the wiring does not fit."""
        if not isinstance(config, self.config):
            raise PlanError(
                f"stage {self.name} takes a {self.config.__name__}, not a {type(config).__name__}"
            )
        self._check_names(inputs)
        for name, node in inputs.items():
            kind = self._kind_of(name)
            assert kind is not None
            if not issubclass(node.stage.makes, kind):
                raise PlanError(
                    f"stage {self.name}: input {name} must be a {kind.kind}, "
                    f"but {node.stage.name} makes a {node.stage.makes.kind}"
                )
        return Planned(stage=self, config=config, inputs=dict(inputs))

    def _kind_of(self, name: str) -> type[Artifact] | None:
        return self.takes.get(name) or self.may_take.get(name) or self.takes_more

    def _check_names(self, inputs: "Mapping[str, Planned[Artifact]]") -> None:
        """PlanError unless the body could be called with inputs of these names."""
        if taken := [name for name in inputs if name in self.reserved]:
            raise PlanError(
                f"stage {self.name}: an input cannot be called {taken[0]!r}, as an argument of its "
                "own is; choose another name"
            )
        strange = [name for name in inputs if self._kind_of(name) is None]
        if strange or not self.takes.keys() <= inputs.keys():
            may = f", may take {sorted(self.may_take)}" if self.may_take else ""
            more = f" and any number of {self.takes_more.kind}s" if self.takes_more else ""
            raise PlanError(
                f"stage {self.name} takes inputs {sorted(self.takes)}{may}{more}, "
                f"not {sorted(inputs)}"
            )


@dataclass(frozen=True)
class Stage(Face[OutT]):
    """A face that has its body with it, made by `@stage` of a function."""

    run: Callable[..., OutT] = field(kw_only=True)


@dataclass(frozen=True, eq=False)
class Planned(Generic[OutT]):
    """A node of the plan: a stage, its config, and where its inputs come from."""

    stage: Face[OutT]
    config: Frozen
    inputs: Mapping[str, "Planned[Artifact]"]


def stage(
    *, revision: int, reads: Callable[[Any, Hashes], Mapping[str, Any]] | None = None
) -> Callable[[Callable[..., OutT]], Stage[OutT]]:
    """Make a stage of `def name(config, work, *, input: Artifact, ...) -> Artifact`.

    An input whose default is None may be left out, and a signature that ends in
    `**others: Artifact` takes any number of inputs of that kind besides. PlanError for a signature
    or a name that no stage can have. Its module is loaded to plan it: a body that needs heavy
    libraries is better kept apart, with a `Face` that it fills.
    """

    def make(function: Callable[..., OutT]) -> Stage[OutT]:
        return Stage(
            name=function.__name__,
            revision=revision,
            body=_address(function),
            reads=reads,
            run=function,
            **vars(_read_signature(function)),
        )

    return make


def fills(face: Face[OutT]) -> Callable[[Callable[P, OutT]], Callable[P, OutT]]:
    """Mark the function that is the body of `face`; PlanError if the two differ."""

    def check(function: Callable[P, OutT]) -> Callable[P, OutT]:
        if _address(function) != face.body:
            raise PlanError(
                f"stage {face.name}: its body is {face.body}, and {_address(function)} is said to "
                "fill it; correct one of the two"
            )
        check_body(face, function)
        return function

    return check


def check_body(face: Face[Any], function: Callable[..., Any]) -> None:
    """PlanError naming what differs unless `function` takes and makes what `face` says."""
    for name, found in vars(_read_signature(function)).items():
        said = getattr(face, name)
        if found != said:
            raise PlanError(
                f"stage {face.name}: its face says {name} = {_show(said)}, its body {face.body} "
                f"has {_show(found)}; correct one of the two"
            )


@dataclass(frozen=True)
class _Signature:
    """What a function's signature says of its stage; fields as of `Face`."""

    config: type[Frozen]
    makes: type[Any]
    takes: Mapping[str, type[Artifact]]
    may_take: Mapping[str, type[Artifact]]
    takes_more: type[Artifact] | None
    reserved: tuple[str, str]


def _read_signature(function: Callable[..., Any]) -> _Signature:
    """PlanError if no stage can have this signature."""
    hints = get_type_hints(function)
    parameters = list(inspect.signature(function).parameters.values())
    named = [one for one in parameters if one.kind is not one.VAR_KEYWORD]
    others = [hints[one.name] for one in parameters if one.kind is one.VAR_KEYWORD]
    if len(named) < 2 or not _are_config_and_workspace(*(hints.get(p.name) for p in named[:2])):
        raise PlanError(
            f"stage {function.__name__} must begin (config: Frozen, work: Workspace); change its "
            "signature"
        )
    config, work, *inputs = named
    return _Signature(
        config=hints[config.name],
        makes=hints["return"],
        takes={one.name: hints[one.name] for one in inputs if one.default is one.empty},
        may_take={
            one.name: _without_none(hints[one.name])
            for one in inputs
            if one.default is not one.empty
        },
        takes_more=others[0] if others else None,
        reserved=(config.name, work.name),
    )


def _are_config_and_workspace(config: Any, work: Any) -> bool:
    return isinstance(config, type) and issubclass(config, Frozen) and work is Workspace


def _without_none(hint: Any) -> type[Artifact]:
    """The kind in `Artifact | None`."""
    found: type[Artifact] = next((one for one in get_args(hint) if one is not NoneType), hint)
    return found


def _address(function: Callable[..., Any]) -> str:
    return f"{function.__module__}:{function.__qualname__}"


def _show(value: object) -> str:
    """Types by their names."""
    match value:
        case Mapping():
            return "{" + ", ".join(f"{key}: {_show(one)}" for key, one in value.items()) + "}"
        case type():
            return value.__name__
        case _:
            return str(value)
