"""`ingot clean`: artifacts that newer ones have replaced, and the bytes that they hold."""

import argparse
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.errors import ArtifactError
from pipeline.lease import is_held, newest
from pipeline.records import Built, Reused
from pipeline.store import Store, builders, generations, remove
from pipeline.verbs.asked import load_asked
from stages.artifacts import MANIFEST, Manifest, read_manifest


@dataclass(frozen=True, slots=True)
class Entry:
    """One generation's folder, finished or not, or what another builder left in a finished one."""

    path: Path
    num_bytes: int
    verdict: Literal["keep", "remove"]
    reason: str
    is_generation: bool = True


def clean(args: argparse.Namespace) -> int:
    """Delete what is superseded, and with `--unfinished` what interrupted builds left.

    With `--dry-run` only list.
    """
    store = load_asked(args).store(print)
    entries = list(inventory(store, unfinished=args.unfinished))
    for entry in entries:
        name = entry.path.relative_to(store.root / "artifacts")
        print(f"{entry.num_bytes:>15,}  {entry.verdict:6}  {name}  {entry.reason}")
    offered = [entry for entry in entries if entry.verdict == "remove"]
    if not args.dry_run:
        # A run may have begun since the first look, and even ended.
        again = inventory(store, unfinished=args.unfinished)
        still = {entry.path for entry in again if entry.verdict == "remove"}
        offered = [entry for entry in offered if entry.path in still]
        for entry in offered:
            remove(entry.path) if entry.is_generation else shutil.rmtree(entry.path)
    total = sum(entry.num_bytes for entry in offered)
    done = "would be freed" if args.dry_run else "freed"
    print(
        f"{total:>15,}  bytes in {len(offered)} folders {done}; run records stay, and so do "
        "MLflow's runs with their plots and reports"
    )
    return 0


def inventory(store: Store, *, unfinished: bool) -> Iterator[Entry]:
    """Every folder with its size and what is to become of it.

    Kept: the newest artifact of each node of each recipe, by the runs' records and by the
    manifests (should the records be gone), what a run or a build that goes on uses, whatever is
    being built and, but for `unfinished`, what an interrupted build left, since hours of training
    may lie there.
    """
    held = _held(store)
    latest, used = _latest(store), _used(store, held)
    for path in generations(store.root):
        num_bytes = _size(path)
        if path in held:
            yield Entry(path, num_bytes, "keep", "being built")
        elif path in latest:
            yield Entry(path, num_bytes, "keep", f"latest of {latest[path]}")
            yield from _leftovers(path)
        elif path in used:
            yield Entry(path, num_bytes, "keep", f"in use by {used[path]}")
        elif (path / MANIFEST).exists():
            yield Entry(path, num_bytes, "remove", "superseded")
        elif unfinished:
            yield Entry(path, num_bytes, "remove", "unfinished")
        else:
            reason = "unfinished: a run would continue it, --unfinished deletes it"
            yield Entry(path, num_bytes, "keep", reason)


def _leftovers(path: Path) -> Iterator[Entry]:
    """Folders in a committed generation of builders that wrote on after they had lost it."""
    manifest = _manifest(path)
    if manifest is None:
        return
    for builder in builders(path):
        if not manifest.address.startswith(f"{builder.name}/"):
            reason = "left by a builder that came too late"
            yield Entry(builder, _size(builder), "remove", reason, is_generation=False)


def _held(store: Store) -> set[Path]:
    return {path for path in generations(store.root) if is_held(path)}


def _used(store: Store, held: set[Path]) -> dict[Path, str]:
    """Folders that somebody may be reading, each with who."""
    used: dict[Path, str] = {}
    for path in held:
        holder = newest(path)[1]
        for address in holder.get("inputs", ()):
            used[store.root / address] = f"process {holder.get('pid')}, which builds {path}"
    for run in store.records.newest_first():
        if run.live:
            made = (o.address for o in run.outcomes.values() if isinstance(o, Built | Reused))
            for address in (*run.in_use, *made):
                used[store.root / address] = (
                    f"run {run.id}, process {run.process.get('pid')} on {run.process.get('host')}"
                )
    return used


def _latest(store: Store) -> dict[Path, str]:
    """Folders to keep, each with the recipe and node that it is the latest of."""
    kept = {
        path: f"{recipe} {node}"
        for (recipe, node), path in store.records.latest_artifacts().items()
    }
    newest_of: dict[tuple[str, str], Path] = {}
    for path in generations(store.root):
        manifest = _manifest(path)
        if manifest is not None:
            made = manifest.provenance
            key = str(made.get("recipe")), str(made.get("node"))
            if key not in newest_of or _committed(path) > _committed(newest_of[key]):
                newest_of[key] = path
    for (recipe, node), path in newest_of.items():
        kept.setdefault(path, f"{recipe} {node}")
    return kept


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _committed(path: Path) -> int:
    return (path / MANIFEST).stat().st_mtime_ns


def _manifest(path: Path) -> Manifest | None:
    try:
        return read_manifest(str(path))
    except ArtifactError:
        return None
