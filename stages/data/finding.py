"""Finds the files that a source's glob names, alike for a plan and for the stage that reads them.

The longest beginning of a path that exists as it is written is taken as it stands, whatever signs
its names hold; the rest is a pattern. In it `*`, `?` and `[...]` stand for signs of one name, and
`**` for folders of any depth. As in a shell, none of them stands for a name that begins with a dot.
Links to folders are followed, each folder once.

A folder stands for the files at any depth below it whose suffixes say that they can be read, be it
the whole glob, `texts/`, or what a pattern without `**` fits, `texts/*`.
"""

import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from cluster import place
from configs.errors import DataError
from stages.data.faults import Globbed, fault
from stages.data.formats import is_readable

_WILDCARD = re.compile(r"[*?\[]")
_ANY_DEPTH = "**"
_BELOW = (_ANY_DEPTH, "*")
"""What follows a pattern in each folder that it fits."""
_RESCUED = "lost+found"
"""Where Linux keeps what it found when it mended a disk: on many disks, and closed to users."""
_FOLDER, _FILE, _LOST = "a folder", "a file", "a link that leads nowhere"
_KINDS = (
    (stat.S_ISREG, _FILE),
    (stat.S_ISDIR, _FOLDER),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
)

Places = frozenset[int]
"""Which parts of a pattern may stand for the next name of a path; one past the last: none need."""
Match = tuple[str, str]
"""Address, and name relative to the fixed part of the glob."""


@dataclass(frozen=True, slots=True)
class _Folder:
    """A folder that a pattern may lead through."""

    path: str
    label: str
    """Relative to where the pattern begins; empty, or with a slash at its end."""
    real: str
    """Its path without links."""
    places: Places


def matches(name: str, source: Globbed, store: Path | None = None) -> list[Match]:
    """What the glob matches, sorted by label; nothing of `store`, unless the glob names a part.

    DataError for an address that cannot be read or matches nothing, and for a match that is no
    file or whose name is not UTF-8.
    """
    try:
        if place.is_local(source.glob):
            found = _find(name, source, str(place.local_path(source.glob)), store)
        else:
            found = _fetch(name, source)
    except DataError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise fault(name, source, f"cannot be read: {error}", "correct the address") from error
    if not found:
        raise fault(name, source, "matches no file", "correct the path or the pattern")
    return [(path, label) for label, path in sorted(found.items())]


def _find(name: str, source: Globbed, pattern: str, store: Path | None) -> dict[str, str]:
    """Paths of local files by label."""
    base, parts = _divide(pattern)
    if parts or (kind := _kind_of(pattern)) == _FOLDER:
        _require_pattern(name, source, base, parts, store)
        found = list(_walk(name, source, base, parts, store))
        if not found and not parts:
            raise fault(
                name,
                source,
                "is a folder without a file whose suffix says that it can be read",
                "name the files in it, as *, or correct the path",
            )
    else:
        found = [(os.path.basename(pattern), pattern, kind)]
    return {_label(name, source, label, path, kind): path for label, path, kind in found}


def _divide(pattern: str) -> tuple[str, list[str]]:
    """How much of an absolute path exists as it is written, and the names that follow."""
    names = pattern.strip("/").split("/")
    fixed = 0
    while fixed < len(names) and os.path.lexists("/" + "/".join(names[: fixed + 1])):
        fixed += 1
    parts = names[fixed:]
    # Of all that is below a folder, files are asked for.
    return "/" + "/".join(names[:fixed]), [*parts, "*"] if parts[-1:] == [_ANY_DEPTH] else parts


def _walk(
    name: str, source: Globbed, base: str, parts: Sequence[str], store: Path | None
) -> Iterator[tuple[str, str, str]]:
    """(label, path, kind) of all below `base` that the pattern fits.

    Folders come before links to folders, so that each keeps its own name; links come in the order
    of their names. Where a folder was come to before, at the same place of the pattern, nothing
    new can follow.
    """
    root = os.path.realpath(base)
    left_out = os.path.realpath(store) if store else ""
    if _is_within(root, left_out):
        left_out = ""
    end = len(parts)
    # Where any depth is asked for, folders are only on the way.
    parts = [*parts, *(() if _ANY_DEPTH in parts else _BELOW)]
    seen: set[tuple[str, Places]] = set()
    waiting = [_Folder(base, "", root, _reached(parts, [0]))]
    while waiting:
        links: list[_Folder] = []
        while waiting:
            folder = waiting.pop()
            # Whether the pattern fits the folder too has no bearing on what is below it.
            at = folder.real, folder.places - {len(parts)}
            if at in seen or _is_within(folder.real, left_out):
                continue
            seen.add(at)
            for entry in _listed(name, source, folder.path):
                places = _step(parts, folder.places, entry.name)
                kind = _kind(entry) if places else _FILE
                label = folder.label + entry.name
                if kind == _FOLDER:
                    is_link = entry.is_symlink()
                    joined = os.path.join(folder.real, entry.name)
                    real = os.path.realpath(entry.path) if is_link else joined
                    below = _Folder(entry.path, f"{label}/", real, places)
                    (links if is_link else waiting).append(below)
                elif end in places and end - 1 in folder.places:
                    if _is_meant(parts[end - 1], entry.name):
                        yield label, entry.path, kind
                elif len(parts) in places and is_readable(entry.name):
                    yield label, entry.path, kind
        waiting = sorted(links, key=lambda link: link.label, reverse=True)


def _step(parts: Sequence[str], places: Places, name: str) -> Places:
    """Where in the pattern one is behind `name`; nowhere if it does not fit."""
    is_hidden = name.startswith(".") or name == _RESCUED
    behind = []
    for at in places - {len(parts)}:
        part = parts[at]
        if part == _ANY_DEPTH:
            behind += [] if is_hidden else [at]
        elif fnmatchcase(name, part) and (not is_hidden or part.startswith(name[0])):
            behind.append(at + 1)
    return _reached(parts, behind)


def _reached(parts: Sequence[str], places: Iterable[int]) -> Places:
    """The places, and those behind them, as `**` may stand for no folder."""
    reached = set(places)
    for at, part in enumerate(parts):
        if at in reached and part == _ANY_DEPTH:
            reached.add(at + 1)
    return frozenset(reached)


def _is_meant(pattern: str, name: str) -> bool:
    """Whether a file whose name fits a pattern is asked for by it."""
    # Spark and others write `_SUCCESS`, `_metadata` and the like beside their files of data.
    return "." in name or not name.startswith("_") or pattern.startswith("_")


def _listed(name: str, source: Globbed, folder: str) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except NotADirectoryError:
        return []
    except OSError as error:
        raise fault(
            name,
            source,
            f"{_shown(folder)} cannot be read: {error.strerror}",
            "allow it, or narrow the glob",
        ) from error


def _kind(entry: "os.DirEntry[str]") -> str:
    """As `_kind_of`, from the listing where that says enough."""
    if not entry.is_symlink():
        if entry.is_dir(follow_symlinks=False):
            return _FOLDER
        if entry.is_file(follow_symlinks=False):
            return _FILE
    return _kind_of(entry.path)


def _kind_of(path: str) -> str:
    """What lies at a path, links followed."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return _LOST
    return next((kind for fits, kind in _KINDS if fits(mode)), "a device")


def _require_pattern(
    name: str, source: Globbed, base: str, parts: Sequence[str], store: Path | None
) -> None:
    """DataError for a pattern that means something else than it seems to."""
    for part in parts:
        if _ANY_DEPTH in part and part != _ANY_DEPTH:
            raise fault(
                name, source, f"has ** in {part!r}", "let it stand between slashes, as **/*.txt"
            )
    if store is not None and os.path.realpath(base) == os.path.realpath(store):
        raise fault(
            name,
            source,
            f"{base} is the store, which grows with each run",
            "keep texts elsewhere, or set store.url",
        )


def _label(name: str, source: Globbed, label: str, path: str, kind: str) -> str:
    """The label as it is in every locale; DataError for what cannot be read as a file."""
    if kind != _FILE:
        raise fault(
            name,
            source,
            f"{_shown(path)} is {kind}, not a file",
            "take it away, or leave it out of the glob",
        )
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        raise fault(
            name,
            source,
            f"matches {_shown(path)}, whose name is not UTF-8",
            "rename it, or leave it out of the glob",
        ) from None
    return os.fsencode(label).decode()


def _shown(path: str) -> str:
    """A path that can be printed, whatever its bytes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _is_within(path: str, folder: str) -> bool:
    """Whether a path is a folder's, or of something below it; both without links."""
    return folder != "" and f"{path}/".startswith(f"{folder}/")


def _fetch(name: str, source: Globbed) -> dict[str, str]:
    """Addresses of remote files by label."""
    pattern = source.glob.rstrip("/")
    base = _WILDCARD.split(pattern, maxsplit=1)[0].rpartition("/")[0]
    if _is_page(pattern) and not set(pattern) & set("*["):
        # A server of pages lists no folders; whether it has the file, reading it tells.
        label = pattern.partition("?")[0].rpartition("/")[2]
        return {_label(name, source, label, pattern, _FILE): source.glob}
    rest = pattern.removeprefix(base)
    kept = {}
    for label, (address, is_folder) in sorted(place.matching(pattern, below=base).items()):
        if not is_folder:
            if _is_meant(rest.rpartition("/")[2], label.rpartition("/")[2]):
                kept[label] = address
        elif _ANY_DEPTH not in rest.split("/"):
            below = place.matching(f"{address}/**", below=address)
            prefix = "" if address.endswith(rest) else f"{label}/"
            kept |= {
                prefix + inner: file
                for inner, (file, is_deeper) in below.items()
                if not is_deeper and is_readable(inner) and "/." not in f"/{inner}"
            }
    if "/." not in rest:
        kept = {label: one for label, one in kept.items() if "/." not in f"/{label}"}
    return {_label(name, source, label, one, _FILE): one for label, one in kept.items()}


def _is_page(address: str) -> bool:
    return address.partition("://")[0] in ("http", "https")
