"""`ingot clean`: artifacts that newer ones have replaced, and the bytes that they hold."""

import argparse
import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from cluster import place
from configs.errors import ArtifactError, StoreError
from pipeline.lease import held_among, is_held, newest
from pipeline.records import Built, Reused
from pipeline.removal import delete, remove, remove_objects, removed
from pipeline.slots import builders
from pipeline.store import Store
from pipeline.verbs.asked import load_asked
from stages.manifest import MANIFEST, Manifest

_dead: dict[str, object] = {}
"""Of this process: builders that were found to be dead, so that none is waited for twice."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One generation's folder, finished or not, or what somebody left in or beside one."""

    path: Path
    num_bytes: int
    verdict: Literal["keep", "remove"]
    reason: str
    is_generation: bool = True


def clean(args: argparse.Namespace) -> int:
    """Delete what is superseded, and with `--unfinished` what interrupted builds left.

    With `--dry-run` only list. Exit code 1 if anything that was offered could not be deleted.
    """
    store = load_asked(args).store(print)
    entries = list(inventory(store, unfinished=args.unfinished))
    for entry in entries:
        name = entry.path.relative_to(store.root / "artifacts")
        print(f"{entry.num_bytes:>15,}  {entry.verdict:6}  {name}  {entry.reason}")
    offered = [entry for entry in entries if entry.verdict == "remove"]
    freed = offered
    if not args.dry_run:
        # A run may have begun since the first look, and even ended.
        since = time.time()
        again = inventory(store, unfinished=args.unfinished)
        still = {entry.path for entry in again if entry.verdict == "remove"}
        offered = [entry for entry in offered if entry.path in still]
        freed = [entry for entry in offered if _is_deleted(store, entry, since)]
    total = sum(entry.num_bytes for entry in freed)
    done = "would be freed" if args.dry_run else "freed"
    print(
        f"{total:>15,}  bytes in {len(freed)} folders {done}; run records stay, and so do "
        "MLflow's runs with their plots and reports"
    )
    return int(len(freed) < len(offered))


def _is_deleted(store: Store, entry: Entry, since: float) -> bool:
    """Delete what an entry names, and whether it is gone; if not, say why.

    Deleting the others may have taken minutes, so users are looked for once more.
    """
    try:
        if entry.is_generation:
            used_by = partial(_user, store, entry.path, since)
            if store.mirror.is_apart:
                remove_objects(store.mirror, entry.path, used_by)
            else:
                remove(entry.path, used_by)
        else:
            if store.mirror.is_apart:
                place.delete(store.mirror.address(entry.path))
            delete(entry.path)
    except StoreError as error:
        print(f"warning: {error}")
        return False
    return True


def _held(store: Store, paths: Iterable[Path]) -> set[Path]:
    """Those that a builder which may be alive holds."""
    by_address = {store.mirror.address(path): path for path in paths}
    return {by_address[one] for one in held_among(by_address, _dead)}


def _user(store: Store, path: Path, since: float) -> str | None:
    return _used(store, since).get(path)


def inventory(store: Store, *, unfinished: bool) -> Iterator[Entry]:
    """Every folder with its size and what is to become of it.

    Kept: the newest artifact of each node of each recipe, by the runs' records and by the
    manifests (should the records be gone), what a run or a build that goes on uses, whatever is
    being built and, but for `unfinished`, what an interrupted build left, since hours of training
    may lie there.
    """
    every = store.generations()
    held = _held(store, every)
    latest, used = _latest(store), _used(store)
    for path in every:
        num_bytes = _size(store, path)
        if path in held:
            yield Entry(path, num_bytes, "keep", "being built")
        elif path in latest:
            yield Entry(path, num_bytes, "keep", f"latest of {latest[path]}")
            yield from _leftovers(store, path)
        elif path in used:
            yield Entry(path, num_bytes, "keep", used[path])
        elif store.is_committed(path):
            yield Entry(path, num_bytes, "remove", "superseded")
        elif unfinished:
            yield Entry(path, num_bytes, "remove", "unfinished")
        else:
            reason = "unfinished: a run would continue it, --unfinished deletes it"
            yield Entry(path, num_bytes, "keep", reason)
    for path in removed(store.root):
        if not is_held(str(path)):
            reason = "left by a clean that was cut short"
            yield Entry(path, _size(store, path), "remove", reason, is_generation=False)


def _leftovers(store: Store, path: Path) -> Iterator[Entry]:
    """Folders in a committed generation of builders that wrote on after they had lost it."""
    manifest = _manifest(store, path)
    if manifest is None:
        return
    for builder in builders(store.mirror, path):
        if not manifest.address.startswith(f"{builder.name}/"):
            reason = "left by a builder that came too late"
            yield Entry(builder, _size(store, builder), "remove", reason, is_generation=False)


def _used(store: Store, since: float = math.inf) -> dict[Path, str]:
    """Folders that somebody may be reading, each with who that is.

    Also what runs used that began at `since` or later, in seconds since the epoch, and have ended.
    """
    used: dict[Path, str] = {}
    every = store.generations()
    holders = {path: newest(store.mirror.address(path))[1] for path in every}
    readers = [path for path, holder in holders.items() if holder.get("inputs")]
    for path in sorted(_held(store, readers)):
        holder = holders[path]
        if inputs := holder.get("inputs", ()):
            reader = f"in use by process {holder.get('pid')}, which builds {path}"
            used |= {store.root / address: reader for address in inputs}
    store.records.look_again()
    for run in store.records.newest_first():
        if run.live or run.started >= since:
            made = (o.address for o in run.outcomes.values() if isinstance(o, Built | Reused))
            pid, host = run.process.get("pid"), run.process.get("host")
            reader = f"in use by run {run.id}, process {pid} on {host}"
            used |= {store.root / address: reader for address in (*run.in_use, *made)}
    return used


def _latest(store: Store) -> dict[Path, str]:
    """Folders to keep, each with the recipe and node that it is the latest of."""
    kept = {
        path: f"{recipe} {node}"
        for (recipe, node), path in store.records.latest_artifacts().items()
    }
    newest_of: dict[tuple[str, str], Path] = {}
    for path in store.generations():
        manifest = _manifest(store, path)
        if manifest is not None:
            made = manifest.provenance
            key = str(made.get("recipe")), str(made.get("node"))
            if key not in newest_of or _committed(store, path) > _committed(store, newest_of[key]):
                newest_of[key] = path
    for (recipe, node), path in newest_of.items():
        kept.setdefault(path, f"{recipe} {node}")
    return kept


def _size(store: Store, path: Path) -> int:
    """Bytes of the files below `path`; what vanishes while they are counted has none."""
    if store.mirror.is_apart:
        return sum(place.sizes(store.mirror.address(path)).values())
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(folder, name)).st_size
    return total


def _committed(store: Store, path: Path) -> float:
    try:
        return place.modified(store.mirror.address(path / MANIFEST))
    except FileNotFoundError:
        return 0.0


def _manifest(store: Store, path: Path) -> Manifest | None:
    try:
        return store.manifest(path)
    except ArtifactError:
        return None
