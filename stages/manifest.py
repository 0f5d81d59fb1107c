"""An artifact on disk: its manifest, the files that it covers, and who may commit it.

    g1/                          one generation of one identity
        manifest.json            makes it an artifact; created last, and only if it is not there
        lease-000001.json        who may commit it: the holder of the highest number
        000001-3f9a61c2/         what one builder wrote, and nobody else
            files/               the artifact itself, all of it listed in the manifest
            metrics.jsonl        the step log
            logs/                what each worker printed
            resume/              what an interrupted build continues from

The manifest names the builder's folder that counts, and every file with its size and SHA-256; the
*content hash* is the SHA-256 of those entries and the facts, so two builds of equal files are equal
artifacts. Addresses in manifests are relative, so that a store may be moved or copied.
"""

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from cluster import place
from configs.base import Frozen
from configs.errors import ArtifactError, LeaseLost, StoreError
from configs.explain import first_fault

MANIFEST = "manifest.json"
FORMAT = 2
FILES = "files"
"""The part of a builder's folder that becomes the artifact."""
LOGS = "logs"
"""The part of a builder's folder where workers' output lies, which is no part of the artifact."""
LEASE_PREFIX = "lease-"
"""Begins the names of leases, whose numbers have six digits and so sort as text."""


class FileEntry(Frozen):
    """One file of an artifact."""

    bytes: int
    sha256: str


class InputEntry(Frozen):
    """The artifact that an input was, when this one was built."""

    address: str
    """Its generation, relative to the store."""
    fingerprint: str
    content: str


class Manifest(Frozen):
    """The record that makes a folder an artifact."""

    format: Literal[2] = 2
    address: str
    """The folder of the files, relative to the manifest's own."""
    kind: str
    stage: str
    """The stage's function, as `package.module:name`."""
    revision: int
    fingerprint: str
    identity: dict[str, Any]
    """What the fingerprint was computed from: stage, revision, config, inputs' fingerprints."""
    inputs: dict[str, InputEntry]
    facts: dict[str, Any]
    files: dict[str, FileEntry]
    content: str
    provenance: dict[str, Any]
    """When, where and by which code; never part of identity or content."""

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(entry.bytes for entry in self.files.values())

    @property
    def stage_name(self) -> str:
        """The function's own name, by which selectors know the stage."""
        return self.stage.rpartition(":")[2]


def generation_of(uri: str) -> str:
    """The folder of the manifest that covers the files in `uri`."""
    return uri.rsplit("/", 2)[0]


def read_manifest(generation: str) -> Manifest:
    """The manifest of a generation; ArtifactError if it has none or it cannot be understood."""
    path = f"{generation}/{MANIFEST}"
    try:
        return Manifest.model_validate(json.loads(place.read(path)))
    except FileNotFoundError:
        raise ArtifactError(
            f"{generation}: no {MANIFEST}, so this is not a finished artifact; `ingot run` "
            "finishes it"
        ) from None
    except OSError as error:
        raise ArtifactError(_unreadable(path, error)) from None
    except ValueError as error:
        raise ArtifactError(
            f"{path}: not a manifest of format {FORMAT} ({_first_line(error)}); rebuild the node "
            "with --force"
        ) from None


def hash_file(uri: str, name: str) -> str:
    """SHA-256 of one file, in hexadecimal; ArtifactError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with place.opened(f"{uri}/{name}") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise ArtifactError(_unreadable(f"{uri}/{name}", error)) from None
    return digest.hexdigest()


def content_hash(kind: str, facts: Mapping[str, Any], files: Mapping[str, FileEntry]) -> str:
    """SHA-256 over the kind, the facts and each file's (name, bytes, sha256)."""
    body = {
        "kind": kind,
        "facts": facts,
        "files": {name: [entry.bytes, entry.sha256] for name, entry in sorted(files.items())},
    }
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def verify(generation: str, *, hashes: bool = True, files: str | None = None) -> None:
    """ArtifactError unless the artifact is what its manifest says, no more and no less.

    `files` is where its files lie, if that is elsewhere than the manifest says.

    Every file is there with its size and, with `hashes`, its SHA-256; there is no other file, and
    the content hash is that of the kind, facts and files listed.
    """
    manifest = read_manifest(generation)
    remedy = f"rebuild with --force {manifest.stage_name}"
    content = content_hash(manifest.kind, manifest.facts, manifest.files)
    if content != manifest.content:
        raise ArtifactError(
            f"{generation}: {MANIFEST} lists kind, facts and files of content {content[:12]}, but "
            f"says {manifest.content[:12]}, so it was changed; {remedy}"
        )
    uri = files or f"{generation}/{manifest.address}"
    present = place.sizes(uri)
    if unlisted := next((name for name in present if name not in manifest.files), None):
        raise ArtifactError(
            f"{uri}: {unlisted} is not one of the {len(manifest.files)} files that its manifest "
            f"lists; delete it, or {remedy}"
        )
    for name, entry in manifest.files.items():
        if name not in present:
            raise ArtifactError(f"{uri}: {name} is missing; {remedy}")
        if present[name] != entry.bytes:
            raise ArtifactError(
                f"{uri}: {name} has {present[name]} bytes, its manifest says {entry.bytes}; "
                f"{remedy}"
            )
        if hashes and (seen := hash_file(uri, name)) != entry.sha256:
            raise ArtifactError(
                f"{uri}: {name} has sha256 {seen[:12]}, its manifest says {entry.sha256[:12]}; "
                f"{remedy}"
            )


SEEN_SECONDS = 5.0
"""How long a look at a lease counts in a place of objects: less than a holder has to beat."""
_seen: dict[str, float] = {}
"""By address: when this process last saw that a lease holds."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to commit a generation. Passed to workers, who check it before they write.

    Leases are numbered; the highest number holds. A file is created by one builder, if it is not
    there yet, and renewed by that builder alone.
    """

    generation: str
    """The generation's folder."""
    number: int
    owner: str

    @property
    def uri(self) -> str:
        """This lease's file."""
        return f"{self.generation}/{LEASE_PREFIX}{self.number:06}.json"

    def check(self, *, anew: bool = False) -> None:
        """LeaseLost unless this is the newest lease and nothing was committed meanwhile.

        In a place of objects, where each look is a call, what was seen a moment ago counts, but for
        one `anew`: what a builder writes before its manifest harms nobody.
        """
        if not place.is_local(self.generation):
            if not anew and time.monotonic() - _seen.get(self.uri, -math.inf) < SEEN_SECONDS:
                return
            try:
                self._look()
            except LeaseLost:
                raise
            except StoreError:
                if anew:
                    raise
                # A place that does not answer now says nothing of who holds the lease.
                return
            _seen[self.uri] = time.monotonic()
        else:
            self._look()

    def _look(self) -> None:
        own = self.uri.rpartition("/")[2]
        names = place.names(self.generation)
        try:
            newest = max((n for n in names if n.startswith(LEASE_PREFIX)), default="no lease")
            # Where a generation was deleted and begun anew, its numbers begin anew too.
            if newest == own and _owner(place.read(self.uri)) != self.owner:
                newest = "another builder's lease of that number"
        except FileNotFoundError:
            newest = "no lease"
        if MANIFEST in names:
            newest = f"the builder that committed {MANIFEST}"
        if newest != own:
            raise LeaseLost(
                f"{self.uri}: lost to {newest}; this build stops writing, and the same command "
                "later takes what the other builder makes"
            )


def _owner(lease: bytes) -> object:
    """Whose a lease is, by its file; none while it cannot be read."""
    try:
        holder = json.loads(lease)
    except ValueError:
        return None
    return holder.get("owner") if isinstance(holder, dict) else None


def _unreadable(path: str, error: OSError) -> str:
    return (
        f"{path}: cannot be read ({error.strerror or _first_line(error)}); make it readable, or "
        "rebuild the node with --force"
    )


def _first_line(error: Exception) -> str:
    """What an error says, without the lines that pydantic adds."""
    if isinstance(error, ValidationError):
        return first_fault(error)
    return (str(error).splitlines() or [type(error).__name__])[0]


def now() -> str:
    """UTC time for records, ISO 8601 to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
