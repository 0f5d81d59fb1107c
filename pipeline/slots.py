"""A builder's folder: opened under a lease, made an artifact by a manifest, tidied behind it.

The same steps on a disk and in a store of objects, where builders work in this machine's copy and
what they made is sent; see `docs/adr/0016` and `0023`.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from cluster import place
from cluster.files import create_exclusively, sync_to_disk
from cluster.mirror import Mirror
from configs.errors import StoreError
from pipeline.carrier import RESUME
from pipeline.lease import has_stopped
from stages.manifest import FILES, LEASE_PREFIX, LOGS, MANIFEST, Lease, Manifest, hash_file
from stages.steps import METRICS

_DRAFT = "manifest.draft"
_BUILDER = re.compile(r"\d+-\w+")


@dataclass(frozen=True, slots=True)
class Slot:
    """A folder that this process alone writes, and the right to commit it."""

    path: Path
    """The builder's folder; the artifact is what is put below `files`."""
    lease: Lease
    generation: int
    earlier: tuple[str, ...]
    """Folders of interrupted builds that left something to resume from, the newest first."""

    @property
    def files(self) -> Path:
        """The folder of the artifact to be."""
        return self.path / FILES

    @property
    def draft(self) -> Path:
        """What becomes the manifest. Made with the folder and never again: it is there only while
        nobody has deleted the folder, however often a stage may make that anew."""
        return self.path / _DRAFT


def open_slot(mirror: Mirror, generation: Path, lease: Lease, number: int) -> Slot:
    """A builder's new folder; what earlier ones left is cleared, but for state to resume from.

    A builder that is merely silent may be past its last check, and commit after all: its files
    stay until the commit that decides. One that has stopped can commit no more: so that is
    looked at first, and then whether it has.
    """
    earlier = []
    for path in builders(mirror, generation):
        theirs = int(path.name.partition("-")[0])
        if has_resume_state(mirror, path):
            mirror.pull_folder(path, _to_resume(mirror, path))
            earlier.append(str(path))
        elif has_stopped(lease.generation, theirs) and not is_committed(mirror, generation):
            _drop(mirror, path)
    name = f"{lease.number:06}-{lease.owner[:8]}"
    slot = Slot(generation / name, lease, number, tuple(earlier))
    # Not its parents: where the generation was deleted, this lease went with it.
    slot.path.mkdir()
    slot.files.mkdir()
    slot.draft.touch()
    return slot


def is_committed(mirror: Mirror, generation: Path) -> bool:
    """Whether there is an artifact in a generation's folder."""
    try:
        return place.exists(mirror.address(generation / MANIFEST))
    except PermissionError:
        # Nobody may look inside: taken for an artifact, so that a rebuild goes beside it.
        return True


def settle(mirror: Mirror, slot: Slot, manifest: Manifest) -> bool:
    """Make a slot's files an artifact by creating its manifest; whether this build is the one."""
    text = manifest.model_dump_json(indent=1)
    if mirror.is_apart:
        return _send(mirror, slot, manifest, text)
    slot.lease.check(anew=True)
    try:
        # Through the draft that dies with the slot.
        return create_exclusively(slot.path.parent / MANIFEST, text, draft=slot.draft)
    except FileNotFoundError:
        return False


def _send(mirror: Mirror, slot: Slot, manifest: Manifest, text: str) -> bool:
    """Commit in a store of objects: files, then the manifest; whether this build is the one.

    Who deletes a generation there takes its next lease first, then its manifest, then its
    files. So a build that was deleted between its last look and its manifest finds itself
    without its lease, and takes the manifest away again unless all files are there.
    """
    generation = slot.path.parent
    for name in manifest.files:
        mirror.push(slot.files / name)
    for path in (slot.path / METRICS, *sorted((slot.path / LOGS).glob("*"))):
        if path.is_file():
            mirror.push(path)
    slot.lease.check(anew=True)
    address = mirror.address(generation / MANIFEST)
    if not place.create(address, text.encode()):
        place.delete(mirror.address(slot.path))
        return False
    sizes = {name: entry.bytes for name, entry in manifest.files.items()}
    try:
        found = place.sizes(mirror.address(slot.files))
    except StoreError:
        # It is committed; whoever reads it looks again.
        found = sizes
    if found != sizes:
        place.delete(address)
        return False
    return True


def tidy(mirror: Mirror, generation: Path, builder: Path) -> None:
    """Drop what only the building needed: leases, resume state, folders of other builders, and
    files that those who were killed left half written."""
    for path in builders(mirror, generation):
        if path != builder:
            _drop(mirror, path)
    for path in builder.iterdir():
        if path.name not in (FILES, METRICS, LOGS):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    if mirror.is_apart:
        place.delete(mirror.address(builder / RESUME))
    address = mirror.address(generation)
    for name in place.names(address):
        if name.startswith(LEASE_PREFIX) or (name.startswith(".") and name.endswith(".draft")):
            place.delete(place.join(address, name))


def _drop(mirror: Mirror, builder: Path) -> None:
    """Delete what a builder left, here and in the store."""
    shutil.rmtree(builder, ignore_errors=True)
    if mirror.is_apart:
        place.delete(mirror.address(builder))


def has_resume_state(mirror: Mirror, builder: Path) -> bool:
    """Whether a builder's folder holds anything to resume from."""
    # Its builder may be alive and deleting old saves, which `os.walk` passes over.
    is_here = any(files for _, _, files in os.walk(builder / RESUME))
    return is_here or (mirror.is_apart and bool(place.names(mirror.address(builder / RESUME))))


def builders(mirror: Mirror, generation: Path) -> list[Path]:
    """The folders that builders made in a generation, the newest first."""
    found = {path for path in generation.glob("[0-9]*-*") if path.is_dir()}
    if mirror.is_apart:
        # What did not reach the store can be continued here all the same.
        names = place.names(mirror.address(generation))
        found |= {generation / name for name in names if _BUILDER.fullmatch(name)}
    return sorted(found, reverse=True)


def _to_resume(mirror: Mirror, builder: Path) -> list[str]:
    """What another machine needs of an interrupted build: its saves and its step log."""
    if not mirror.is_apart:
        return []
    saves = place.sizes(mirror.address(builder / RESUME))
    return [METRICS, *(f"{RESUME}/{name}" for name in saves)]


def hash_durably(folder: Path, name: str) -> str:
    """SHA-256 of a file whose bytes have reached the disk."""
    with (folder / name).open("rb") as file:
        os.fsync(file.fileno())
    return hash_file(str(folder), name)


def sync_folders(builder: Path, root: Path) -> None:
    """Return once the names of all that a builder wrote, and of the way to it, are on the disk."""
    below = [path for path in builder.rglob("*") if path.is_dir()]
    above = [path for path in builder.parents if path.is_relative_to(root)]
    for folder in (*below, builder, *above):
        sync_to_disk(folder)
