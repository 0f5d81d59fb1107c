"""Where artifacts live: slots that one builder at a time may fill, committed by their manifest.

`<store>/artifacts/<stage>/<fingerprint>/g<N>/`. A rebuild opens the next generation, so that what
was committed stays until something better is. A slot that was left unfinished is the one that the
next builder continues.
"""

import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from pydantic import ValidationError

from configs.errors import ArtifactError, StoreError
from configs.parallel import StoreConfig
from pipeline.graph import Node
from pipeline.lease import LEASE, Watch, beat, guard, is_held, read_lease, write_lease
from pipeline.records import Records
from stages.artifacts import (
    MANIFEST,
    Artifact,
    FileEntry,
    InputEntry,
    Lease,
    Manifest,
    content_hash,
    hash_file,
    list_files,
    read_manifest,
    verify,
)

RESUME = "resume"
METRICS = "metrics.jsonl"
TELL_SECONDS = 30.0
HASHED_BYTES = 1 << 30
"""Artifacts up to this size are hashed again before they are reused; larger ones only measured."""
_POLL_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Committed:
    """An artifact in the store with its manifest."""

    artifact: Artifact
    manifest: Manifest
    generation: int

    def check(self, *, hashes: bool) -> None:
        """ArtifactError naming the file if one is missing or damaged."""
        size = sum(entry.bytes for entry in self.manifest.files.values())
        verify(self.artifact.uri, hashes=hashes and size <= HASHED_BYTES)


@dataclass(frozen=True, slots=True)
class Slot:
    """A folder that this process alone may fill, as long as the lease is its own."""

    path: Path
    lease: Lease
    generation: int

    @property
    def resumes(self) -> bool:
        """Whether an interrupted build left its state here."""
        return (self.path / RESUME).exists()


class Store:
    """Artifacts and run records under one folder."""

    def __init__(self, config: StoreConfig, *, say: Callable[[str], None]) -> None:
        """The store that `config` names; `say` is told in one line what the store waits for.

        StoreError if the address is not on a local file system.
        """
        fs, path = fsspec.core.url_to_fs(config.url)
        if "file" not in fs.protocol:
            raise StoreError(
                f"store.url = {config.url}: only local folders hold artifacts so far; use a path"
            )
        self.root = Path(path)
        self.config = config
        self.records = Records(self.root / "runs", say=say)
        self._say = say

    def prepare(self) -> None:
        """Make the folder; StoreError if it cannot be written or the disk is nearly full."""
        with _store_errors(self.root):
            for part in (self.root / "artifacts", self.records.folder):
                part.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".probe-{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
        free = shutil.disk_usage(self.root).free
        if free < self.config.min_free_bytes:
            raise StoreError(
                f"store.url = {self.root}: {free:,} bytes free, store.min_free_bytes = "
                f"{self.config.min_free_bytes:,}; free some (`ingot clean`) or lower the limit"
            )

    def folder(self, node: Node) -> Path:
        """Where the generations of a node's artifact lie."""
        return self.root / "artifacts" / node.planned.stage.name / node.fingerprint

    def find(self, node: Node) -> Committed | None:
        """The newest committed generation of a node, none if nothing was finished.

        ArtifactError if it cannot be read or understood.
        """
        for generation in reversed(_generations(self.folder(node))):
            path = self.folder(node) / f"g{generation}"
            if _is_committed(path):
                return _load(node.planned.stage.makes, path, generation)
        return None

    def newest(self, node: Node) -> int:
        """Number of the newest committed generation, readable or not; 0 if there is none."""
        return _newest_committed(self.folder(node))

    @contextmanager
    def slot(self, node: Node, *, replacing: int = 0) -> Iterator[Slot | Committed]:
        """The right to build `node` after generation `replacing`, waited for while another has it.

        Yields what the other builder committed meanwhile instead, if it did. On leaving, the lease
        is given up; what lies in an uncommitted slot stays for the next builder.
        """
        self.prepare()
        folder = self.folder(node)
        owner = uuid.uuid4().hex
        with _store_errors(folder):
            taken = self._take(node, owner, replacing)
        if isinstance(taken, Committed):
            yield taken
            return
        stop = threading.Event()
        beating = threading.Thread(target=beat, args=(taken.lease, stop), daemon=True)
        beating.start()
        try:
            yield taken
        finally:
            stop.set()
            beating.join()
            with guard(folder):
                if read_lease(taken.path).get("owner") == owner:
                    (taken.path / LEASE).unlink()

    def _take(self, node: Node, owner: str, replacing: int) -> Slot | Committed:
        folder, watch, told = self.folder(node), Watch(), 0.0
        while True:
            with guard(folder):
                newest = self.newest(node)
                if newest <= replacing:
                    path = folder / f"g{newest + 1}"
                    path.mkdir(exist_ok=True)
                    holder = read_lease(path)
                    if not holder or watch.is_dead(holder):
                        write_lease(path, owner)
                        _clear(path)
                        return Slot(path, Lease(str(path / LEASE), owner), newest + 1)
            if newest > replacing:
                committed = self.find(node)
                assert committed is not None
                return committed
            if time.monotonic() - told >= TELL_SECONDS or not told:
                told = time.monotonic()
                self._say(
                    f"{node.name}: waiting for process {holder.get('pid')} on "
                    f"{holder.get('host')}, which builds it ({path})"
                )
            time.sleep(_POLL_SECONDS)

    def commit(
        self,
        slot: Slot,
        node: Node,
        artifact: Artifact,
        inputs: Mapping[str, Committed],
        provenance: Mapping[str, Any],
    ) -> Committed:
        """Hash the slot's files and make it an artifact by writing its manifest, last of all.

        LeaseLost if another builder took the slot over; then nothing is written.
        """
        uri = str(slot.path)
        slot.lease.check()
        files = {
            name: FileEntry(bytes=size, sha256=_hash_durably(slot.path, name))
            for name, size in list_files(uri).items()
        }
        stage, facts = node.planned.stage, artifact.facts()
        manifest = Manifest(
            kind=artifact.kind,
            stage=stage.name,
            revision=stage.revision,
            fingerprint=node.fingerprint,
            identity=dict(node.identity.fields),
            inputs={
                role: InputEntry(
                    uri=one.artifact.uri,
                    fingerprint=one.manifest.fingerprint,
                    content=one.manifest.content,
                )
                for role, one in inputs.items()
            },
            facts=facts,
            files=files,
            content=content_hash(artifact.kind, facts, files),
            provenance=dict(provenance),
        )
        with _store_errors(slot.path), guard(self.folder(node)):
            slot.lease.check()
            _write_durably(slot.path / MANIFEST, manifest.model_dump_json(indent=1))
        shutil.rmtree(slot.path / RESUME, ignore_errors=True)
        return _load(stage.makes, slot.path, slot.generation)


def generations(store_root: Path) -> Iterator[Path]:
    """Every generation's folder of a store, finished or not."""
    for folder in sorted((store_root / "artifacts").glob("*/*")):
        yield from (folder / f"g{number}" for number in _generations(folder))


def remove(path: Path) -> None:
    """Delete a generation's folder; StoreError if a builder holds it."""
    with guard(path.parent):
        if is_held(path):
            pid = read_lease(path).get("pid")
            raise StoreError(f"{path}: process {pid} is building it; wait for it, or end it")
        # The manifest goes first, so that a removal cut short leaves no half artifact.
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)


def _clear(path: Path) -> None:
    """Drop what an interrupted build left in a slot, but for the state it can resume from."""
    kept = {LEASE, RESUME, METRICS} if (path / RESUME).exists() else {LEASE}
    for entry in path.iterdir():
        if entry.name not in kept:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _generations(folder: Path) -> list[int]:
    return sorted(int(p.name[1:]) for p in folder.glob("g*") if p.name[1:].isdigit())


def _newest_committed(folder: Path) -> int:
    return max((n for n in _generations(folder) if _is_committed(folder / f"g{n}")), default=0)


def _is_committed(path: Path) -> bool:
    try:
        return (path / MANIFEST).exists()
    except PermissionError:
        # Nobody may look inside: taken for an artifact, so that a rebuild goes beside it.
        return True


def _load(kind: type[Artifact], path: Path, generation: int) -> Committed:
    try:
        return Committed(kind.load(str(path)), read_manifest(str(path)), generation)
    except ValidationError as error:
        fields = ", ".join(sorted({".".join(map(str, one["loc"])) for one in error.errors()}))
        raise ArtifactError(
            f"{path}: its manifest has facts that a {kind.__name__} cannot hold ({fields}); "
            "rebuild the node with --force"
        ) from None


def _hash_durably(folder: Path, name: str) -> str:
    """SHA-256 of a file whose bytes have reached the disk."""
    with (folder / name).open("rb") as file:
        os.fsync(file.fileno())
    return hash_file(str(folder), name)


def _write_durably(path: Path, text: str) -> None:
    draft = path.parent.parent / f".{path.parent.name}.{path.name}.draft"
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def _store_errors(path: Path) -> Iterator[None]:
    """Say which folder could not be used, and what to do, when the system refuses."""
    try:
        yield
    except StoreError:
        raise
    except (NotADirectoryError, FileExistsError):
        file = next((one for one in (path, *path.parents) if one.is_file()), path)
        raise StoreError(f"store.url = {path}: {file} is a file; name a folder") from None
    except OSError as error:
        raise StoreError(
            f"store.url = {path}: cannot be written ({error.strerror}); make it writable or name "
            "another folder in store.url"
        ) from None
