"""Where artifacts live: generations that one builder at a time may fill, committed by a manifest.

    store.json                                    the format of what lies here
    artifacts/<stage>/<fingerprint>/g<N>/         see `stages/artifacts.py`
    runs/<id>.json, runs/<id>.html                what each run did; its page
    hashes/                                       of files outside, remembered
    mlflow.db, mlflow-artifacts/                  unless tracking goes elsewhere

A rebuild opens the next generation, so that what was committed stays until something better is.
Each builder writes into a folder of its own, and the manifest that names it is created only if
there is none: so whatever a builder does late, it cannot touch a committed byte. What an
interrupted build left to resume from, the next builder reads. All addresses are relative to the
store.
"""

import json
import math
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster import place
from cluster.files import replace, says_disk_is_full
from cluster.mirror import Mirror, mirror_of
from configs.errors import ArtifactError, LeaseLost, NoAnswer, StoreError
from configs.parallel import StoreConfig
from pipeline.carrier import Carrier
from pipeline.graph import Node
from pipeline.lease import Watch, beat, give_up, newest, pace, take
from pipeline.records import Records
from pipeline.slots import (
    Slot,
    builders,
    has_resume_state,
    hash_durably,
    is_committed,
    open_slot,
    settle,
    sync_folders,
    tidy,
)
from stages.artifacts import Artifact
from stages.hashing import Hashes
from stages.manifest import (
    FORMAT,
    MANIFEST,
    FileEntry,
    InputEntry,
    Manifest,
    content_hash,
    read_manifest,
    verify,
)
from stages.steps import METRICS

STORE = "store.json"
TELL_SECONDS = 30.0
PATIENCE_SECONDS = 300.0
"""How long a place of objects may be silent while a builder waits for another."""
HASHED_BYTES = 1 << 30
"""Artifacts up to this size are hashed again before they are reused; larger ones only measured."""
_POLL_SECONDS = 0.25
_SCHEMES = ("s3", "s3a", "gs", "gcs")
_GENERATION = re.compile(r"g\d+")


@dataclass(frozen=True, slots=True)
class Committed:
    """An artifact in the store with its manifest."""

    artifact: Artifact
    manifest: Manifest
    generation: int
    address: str
    """The generation's folder, relative to the store."""
    path: Path
    """The same folder on this machine; of a store of objects only the manifest need be there."""
    mirror: Mirror

    def check(self, *, hashes: bool) -> None:
        """ArtifactError naming the file if one is missing or damaged.

        Objects are hashed when they are fetched (`bring`), and only measured here.
        """
        hashes = hashes and not self.mirror.is_apart and self.num_bytes <= HASHED_BYTES
        files = self.mirror.address(self.files)
        verify(str(self.path), hashes=hashes, files=files)

    def bring(self) -> None:
        """Have its files on this machine."""
        bring(self.mirror, self.path, self.manifest)

    @property
    def files(self) -> Path:
        """The folder of its files on this machine."""
        return self.path / self.manifest.address

    @property
    def hashes(self) -> dict[str, str]:
        """The SHA-256 of each of its files, by name."""
        return {name: entry.sha256 for name, entry in self.manifest.files.items()}

    @property
    def num_bytes(self) -> int:
        """Of all its files."""
        return self.manifest.num_bytes


class Store:
    """Artifacts and run records in one place, and this machine's folder for them."""

    def __init__(self, config: StoreConfig, *, say: Callable[[str], None]) -> None:
        """The store that `config` names; `say` is told in one line what the store waits for.

        StoreError if it cannot be reached, or holds another format.
        """
        scheme = config.url.partition("://")[0]
        if not place.is_local(config.url) and scheme not in _SCHEMES:
            raise StoreError(
                f"store.url = {config.url}: only folders, s3:// and gs:// can be a store, as "
                "of several builders one alone must be able to create a file"
            )
        if scheme in _SCHEMES and not config.url.partition("://")[2].strip("/"):
            raise StoreError(f"store.url = {config.url}: names no bucket; add it")
        self.mirror = mirror_of(config.url)
        self.root = self.mirror.root
        self.config = config
        self.records = Records(self.mirror, say=say)
        self.hashes = Hashes(self.root / "hashes", store=self.root)
        self._say = say
        self._is_prepared = False
        _check_format(self.mirror)

    def prepare(self) -> None:
        """Make the folder; StoreError if it cannot be written or the disk is nearly full."""
        with _store_errors(self.root):
            for part in (self.root / "artifacts", self.records.folder):
                part.mkdir(parents=True, exist_ok=True)
            if not (self._is_prepared and self.mirror.is_apart):
                self._require_writable()
        free = shutil.disk_usage(self.root).free
        if free < self.config.min_free_bytes:
            raise StoreError(
                f"store.url = {self.root}: {free:,} bytes free, store.min_free_bytes = "
                f"{self.config.min_free_bytes:,}; free some (`ingot clean`) or lower the limit"
            )

    def _require_writable(self) -> None:
        store = self.mirror.address(self.root / STORE)
        place.create(store, json.dumps({"format": FORMAT}).encode() + b"\n")
        probe = self.mirror.address(self.root / f".probe-{uuid.uuid4().hex}")
        alone = place.create(probe, b"1") and not place.create(probe, b"2")
        place.delete(probe)
        if not alone:
            raise StoreError(
                f"store.url = {self.mirror.url}: what serves it lets two create one file "
                "(If-None-Match is not obeyed), so two builders could both commit; use another"
            )
        self._is_prepared = True

    def folder(self, node: Node) -> Path:
        """Where the generations of a node's artifact lie."""
        return self.root / "artifacts" / node.planned.stage.name / node.fingerprint

    def find(self, node: Node) -> Committed | None:
        """The newest committed generation of a node, none if nothing was finished.

        ArtifactError if it cannot be read or understood.
        """
        for generation in reversed(self._generations(self.folder(node))):
            path = self.folder(node) / f"g{generation}"
            if self._has_manifest(path):
                return self._load(node.planned.stage.makes, path, generation)
        return None

    def newest(self, node: Node) -> int:
        """Number of the newest committed generation, readable or not; 0 if there is none."""
        folder = self.folder(node)
        committed = (n for n in self._generations(folder) if self.is_committed(folder / f"g{n}"))
        return max(committed, default=0)

    def manifest(self, generation: Path) -> Manifest:
        """What the store says of a generation; ArtifactError if it is no artifact."""
        return read_manifest(self.mirror.address(generation))

    def fetch(self, generation: Path, *, most_bytes: int | None = None) -> None:
        """Have an artifact on this machine: its manifest, and its files up to this size each.

        Nothing where the store is a folder. ArtifactError or StoreError if it cannot be fetched.
        """
        if self.mirror.is_apart:
            manifest = self.manifest(generation)
            self.mirror.pull(generation / MANIFEST)
            bring(self.mirror, generation, manifest, most_bytes=most_bytes)

    def trim(self, in_use: Iterable[str]) -> None:
        """Delete copies of what was not used for longest, down to `store.cache_bytes`."""
        keep = [self.root / address for address in in_use]
        for path in self.mirror.trim(self.config.cache_bytes, keep):
            self._say(f"deleted the copy {path} (store.cache_bytes = {self.config.cache_bytes:,})")

    def is_committed(self, generation: Path) -> bool:
        """Whether there is an artifact in a generation's folder."""
        return is_committed(self.mirror, generation)

    def _has_manifest(self, generation: Path) -> bool:
        """The same, and then the manifest is on this machine too."""
        if not self.mirror.is_apart:
            return self.is_committed(generation)
        try:
            self.mirror.pull(generation / MANIFEST)
        except FileNotFoundError:
            return False
        return True

    def is_begun(self, node: Node) -> bool:
        """Whether an interrupted build of the node left something to continue from."""
        folder = self.folder(node)
        return any(
            has_resume_state(self.mirror, builder)
            for number in self._generations(folder)
            for builder in builders(self.mirror, folder / f"g{number}")
        )

    def _generations(self, folder: Path) -> list[int]:
        found = place.names(self.mirror.address(folder))
        return sorted(int(name[1:]) for name in found if _GENERATION.fullmatch(name))

    def generations(self) -> list[Path]:
        """Every generation's folder in the store, finished or not."""
        artifacts = self.root / "artifacts"
        if self.mirror.is_apart:
            names = place.sizes(self.mirror.address(artifacts))
            found = {artifacts.joinpath(*name.split("/")[:3]) for name in names}
        else:
            found = {path for path in artifacts.glob("*/*/g*") if path.is_dir()}
        kept = (path for path in found if _GENERATION.fullmatch(path.name))
        return sorted(kept, key=lambda path: (path.parent, int(path.name[1:])))

    def address(self, path: Path) -> str:
        """A folder of the store as records name it, wherever the store may be moved."""
        return path.relative_to(self.root).as_posix()

    @contextmanager
    def slot(
        self, node: Node, inputs: Mapping[str, Committed], *, replacing: int = 0
    ) -> Iterator[Slot | Committed]:
        """The right to build `node` after generation `replacing`, waited for while another has it.

        Yields what the other builder committed meanwhile instead, if it did. On leaving, the lease
        is given up; what an uncommitted build left to resume from stays for the next builder.
        """
        self.prepare()
        folder = self.folder(node)
        addresses = [one.address for one in inputs.values()]
        with _store_errors(folder):
            taken = self._take(node, addresses, replacing)
        if isinstance(taken, Committed):
            yield taken
            return
        stop = threading.Event()
        beating = threading.Thread(target=beat, args=(taken.lease, stop, addresses), daemon=True)
        beating.start()
        carrier = Carrier(self.mirror, taken.path, self._say)
        try:
            yield taken
        finally:
            carrier.stop()
            stop.set()
            beating.join()
            with _store_errors(folder):
                give_up(taken.lease)

    def _take(self, node: Node, inputs: list[str], replacing: int) -> Slot | Committed:
        """Wait until the node is made, or free to be built; hours, where another builds it."""
        told, owner, answered = 0.0, uuid.uuid4().hex, -math.inf
        watch = Watch(self.mirror.address(self.folder(node)))
        while True:
            try:
                found = self._try(node, inputs, replacing, owner, watch)
            except NoAnswer as error:
                # A place that does not answer for a moment ends no wait.
                if time.monotonic() - answered > PATIENCE_SECONDS:
                    raise
                found = f"an answer ({error})"
            else:
                answered = time.monotonic()
            if isinstance(found, Slot | Committed):
                return found
            if time.monotonic() - told >= TELL_SECONDS or not told:
                told = time.monotonic()
                self._say(f"{node.name}: waiting for {found}")
            time.sleep(_POLL_SECONDS * pace(self.mirror.address(self.folder(node))))

    def _try(
        self, node: Node, inputs: list[str], replacing: int, owner: str, watch: Watch
    ) -> Slot | Committed | str:
        """The artifact, or a slot to build it in, or who has that slot now."""
        folder = self.folder(node)
        while True:
            done = self.newest(node)
            if done > replacing:
                committed = self.find(node)
                assert committed is not None
                return committed
            generation = folder / f"g{done + 1}"
            generation.mkdir(parents=True, exist_ok=True)
            address = self.mirror.address(generation)
            number, holder = newest(address)
            if number and not watch.is_dead(holder):
                return (
                    f"process {holder.get('pid')} on {holder.get('host')}, which builds it "
                    f"({generation})"
                )
            with suppress(FileNotFoundError):  # Deleted at this moment: begun anew.
                lease = take(address, number + 1, owner, inputs)
                if lease is not None and not self.is_committed(generation):
                    try:
                        return open_slot(self.mirror, generation, lease, done + 1)
                    except BaseException:
                        # Nobody beats for it: others would wait until it ages.
                        with suppress(OSError):
                            give_up(lease)
                        raise
                if lease is not None:
                    # Committed between the look and the lease.
                    place.delete(lease.uri)

    def commit(
        self,
        slot: Slot,
        node: Node,
        artifact: Artifact,
        inputs: Mapping[str, Committed],
        provenance: Mapping[str, Any],
    ) -> Committed:
        """Hash the slot's files and make them an artifact by creating its manifest, last of all.

        LeaseLost if another builder took over or has committed; then nothing is changed.
        """
        slot.lease.check(anew=True)
        files = {
            name: FileEntry(bytes=size, sha256=hash_durably(slot.files, name))
            for name, size in place.sizes(str(slot.files)).items()
        }
        stage, facts, generation = node.planned.stage, artifact.facts(), slot.path.parent
        manifest = Manifest(
            address=slot.files.relative_to(generation).as_posix(),
            kind=artifact.kind,
            stage=stage.function,
            revision=stage.revision,
            fingerprint=node.fingerprint,
            identity=dict(node.identity.fields),
            inputs={
                role: InputEntry(
                    address=one.address,
                    fingerprint=one.manifest.fingerprint,
                    content=one.manifest.content,
                )
                for role, one in inputs.items()
            },
            facts=facts,
            files=files,
            content=content_hash(artifact.kind, facts, files),
            provenance={**provenance, "computed": artifact.computed()},
        )
        with _store_errors(slot.path):
            sync_folders(slot.path, self.root)
            if not settle(self.mirror, slot, manifest):
                raise LeaseLost(
                    f"{self.mirror.address(generation / MANIFEST)}: another builder has committed, "
                    "or this one's folder was deleted; its files are left out, and the same "
                    "command takes the other's"
                )
            if self.mirror.is_apart:
                replace(generation / MANIFEST, manifest.model_dump_json(indent=1))
            try:
                tidy(self.mirror, generation, slot.path)
            except StoreError as error:
                # What is committed is so, whatever is left lying about.
                left = f"not all that only the building needed is deleted ({error})"
                self._say(f"warning: {node.name}: is committed, but {left}")
            # What was made here is a copy from now on, as what is fetched.
            self.mirror.mark(slot.path)
        return self._load(stage.makes, generation, slot.generation)

    def _load(self, kind: type[Artifact], path: Path, generation: int) -> Committed:
        try:
            artifact, manifest = kind.load(str(path)), read_manifest(str(path))
        except ValidationError as error:
            fields = ", ".join(sorted({".".join(map(str, one["loc"])) for one in error.errors()}))
            raise ArtifactError(
                f"{path}: its manifest has facts that a {kind.__name__} cannot hold ({fields}); "
                "rebuild the node with --force"
            ) from None
        return Committed(artifact, manifest, generation, self.address(path), path, self.mirror)


def bring(
    mirror: Mirror, generation: Path, manifest: Manifest, *, most_bytes: int | None = None
) -> None:
    """Have the files of an artifact on this machine, and its step log if it has one.

    With `most_bytes` only those that are no larger.
    """
    hashes = {
        name: entry.sha256
        for name, entry in manifest.files.items()
        if most_bytes is None or entry.bytes <= most_bytes
    }
    mirror.bring(generation / manifest.address, hashes)
    if most_bytes != 0:
        mirror.pull_folder((generation / manifest.address).parent, [METRICS])


def _check_format(mirror: Mirror) -> None:
    """StoreError if what lies in the store is of another format."""
    root = mirror.root if not mirror.is_apart else mirror.url
    remedy = (
        "name another folder in store.url, or delete this one; what it holds is then built anew"
    )
    try:
        found = json.loads(place.read(mirror.address(mirror.root / STORE)))["format"]
    except FileNotFoundError:
        if place.names(mirror.address(mirror.root / "artifacts")):
            raise StoreError(
                f"store.url = {root}: holds artifacts of format 1, which an earlier version of "
                f"Ingot wrote, and this one reads format {FORMAT}; {remedy}"
            ) from None
        return
    except StoreError:
        raise
    except NotADirectoryError:
        return  # `prepare` says so, and names the file.
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"store.url = {root}: {STORE} cannot be read ({type(error).__name__}: {error}); "
            f"{remedy}"
        ) from None
    if found != FORMAT:
        raise StoreError(
            f"store.url = {root}: {STORE} says format {found!r}, and this version of Ingot reads "
            f"format {FORMAT}; {remedy}"
        )


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
        remedy = "free some of its disk" if says_disk_is_full(error) else "make it writable"
        raise StoreError(
            f"store.url = {path}: cannot be written ({error.strerror}); {remedy} or name another "
            "folder in store.url"
        ) from None
