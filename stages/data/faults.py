"""What is said of a source that cannot be used as it is, and of its parts that are set aside.

An error ends the stage: a source that is not there, that the system refuses, or that changes while
it is read. What is `Broken` is counted instead: a row, an encoding or a file that says nothing
sensible. Of that each source may have a share; see `require_whole`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from configs.data import FilesSource
from configs.errors import DataError

EVALUATIONS = "evaluations/"
"""Begins the names of evaluation sets, which could be those of sources otherwise."""
_SHOWN_BROKEN = 3


BROKEN = ("broken_row", "broken_encoding", "broken_file")
"""The rules by which what cannot be read is set aside."""


@dataclass(frozen=True, slots=True)
class Broken:
    """A part of a source that cannot be read; what follows it is read on."""

    source: str
    """The source's name in the recipe."""
    place: str
    """Where: `file.jsonl line 7`, or a whole file's label."""
    rule: Literal["broken_row", "broken_encoding", "broken_file"]
    reason: str
    """What is wrong, and the remedy, in one line."""
    bytes: int
    """How many bytes of the file, as it lies on disk, are lost by it; of what was packed, about."""


class Globbed(Protocol):
    """Whatever names files by a glob: a source, an evaluation set, or a part of one."""

    @property
    def glob(self) -> str:
        """Pattern, path or URL."""


@dataclass(frozen=True, slots=True)
class HeldOutFiles:
    """The files of a source's problems that training never sees."""

    glob: str


def fault(name: str, source: Globbed, what: str, remedy: str) -> DataError:
    """The error that `what` is wrong with the source `name`, or the evaluation set."""
    return DataError(f"{_setting(name, source)} = {source.glob!r}: {what}; {remedy}")


@contextmanager
def reading(name: str, source: Globbed, path: str) -> Iterator[None]:
    """Say which file the system refuses, and what to do."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise fault(
            name, source, f"{path} cannot be read: it is not there", "correct the address"
        ) from error
    except OSError as error:
        raise fault(
            name, source, f"{path} cannot be read: {error}", "allow it, or narrow the glob"
        ) from error


def require_unchanged(
    name: str, source: Globbed, before: Mapping[str, Any], after: Mapping[str, Any]
) -> None:
    """DataError if a file differs from what it was: no hash would say what was read."""
    for label in sorted(before.keys() | after.keys()):
        if before.get(label) != after.get(label):
            raise fault(
                name,
                source,
                f"{label} changed while the source was read: {_describe(before.get(label))} "
                f"before, {_describe(after.get(label))} after",
                "run again when nothing writes to it",
            )


def require_whole(
    name: str,
    source: FilesSource,
    broken_bytes: int,
    read_bytes: int,
    firsts: Sequence[Broken],
    *,
    count: int = 0,
) -> None:
    """DataError if more of a source is broken than `max_broken_share` allows.

    `read_bytes` is the size on disk of all files that were read, with what is broken in them;
    `firsts` is what to show of it, and `count` how much there is, if `firsts` is not all.
    """
    if broken_bytes <= source.max_broken_share * read_bytes:
        return
    shown = ". ".join(one.reason for one in firsts[:_SHOWN_BROKEN])
    count = max(count, len(firsts))
    more = f". And {count - _SHOWN_BROKEN:,} more" if count > _SHOWN_BROKEN else ""
    share = broken_bytes / read_bytes if read_bytes else 1.0
    places = "place" if count == 1 else "places"
    raise DataError(
        f"data.sources.{name}.max_broken_share = {source.max_broken_share:g}: {share:.2%} of what "
        f"data.sources.{name}.glob = {source.glob!r} names is broken, in {count:,} {places}: "
        f"{broken_bytes:,} of {read_bytes:,} bytes. {shown}{more}; or raise the limit"
    )


def _setting(name: str, source: Globbed) -> str:
    if name.startswith(EVALUATIONS):
        return f"data.evaluations.{name.removeprefix(EVALUATIONS)}.glob"
    field = "held_out_glob" if isinstance(source, HeldOutFiles) else "glob"
    return f"data.sources.{name}.{field}"


def _describe(facts: Mapping[str, Any] | None) -> str:
    return f"{facts['bytes']:,} bytes of sha256 {facts['sha256'][:12]}" if facts else "no file"
