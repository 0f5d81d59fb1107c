"""`ingot clean`: artifacts that newer ones have replaced, and the bytes that they hold."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.errors import ArtifactError
from pipeline.lease import is_held
from pipeline.store import Store, generations, remove
from pipeline.verbs.asked import load_asked
from stages.artifacts import MANIFEST, Manifest, read_manifest


@dataclass(frozen=True, slots=True)
class Entry:
    """One generation's folder, finished or not."""

    path: Path
    num_bytes: int
    verdict: Literal["keep", "remove"]
    reason: str


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
    total = sum(entry.num_bytes for entry in offered)
    if args.dry_run:
        print(f"{total:>15,}  bytes in {len(offered)} folders would be freed; run records stay")
        return 0
    for entry in offered:
        remove(entry.path)
    print(f"{total:>15,}  bytes in {len(offered)} folders freed; run records stay")
    return 0


def inventory(store: Store, *, unfinished: bool) -> Iterator[Entry]:
    """Every folder with its size and what is to become of it.

    Kept: the newest artifact of each node of each recipe, by the runs' records and by the
    manifests (should the records be gone), whatever is being built and, but for `unfinished`,
    what an interrupted build left, since hours of training may lie there.
    """
    latest = _latest(store)
    for path in generations(store.root):
        num_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        if is_held(path):
            yield Entry(path, num_bytes, "keep", "being built")
        elif str(path) in latest:
            yield Entry(path, num_bytes, "keep", f"latest of {latest[str(path)]}")
        elif (path / MANIFEST).exists():
            yield Entry(path, num_bytes, "remove", "superseded")
        elif unfinished:
            yield Entry(path, num_bytes, "remove", "unfinished")
        else:
            reason = "unfinished: a run would continue it, --unfinished deletes it"
            yield Entry(path, num_bytes, "keep", reason)


def _latest(store: Store) -> dict[str, str]:
    """Folders to keep, each with the recipe and node that it is the latest of."""
    kept = {
        uri: f"{recipe} {node}" for (recipe, node), uri in store.records.latest_artifacts().items()
    }
    newest: dict[tuple[str, str], Path] = {}
    for path in generations(store.root):
        manifest = _manifest(path)
        if manifest is not None:
            made = manifest.provenance
            key = str(made.get("recipe")), str(made.get("node"))
            if key not in newest or _committed(path) > _committed(newest[key]):
                newest[key] = path
    for (recipe, node), path in newest.items():
        kept.setdefault(str(path), f"{recipe} {node}")
    return kept


def _committed(path: Path) -> int:
    return (path / MANIFEST).stat().st_mtime_ns


def _manifest(path: Path) -> Manifest | None:
    try:
        return read_manifest(str(path))
    except ArtifactError:
        return None
