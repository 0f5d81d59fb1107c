"""What stages exchange: an address and facts, never bytes.

    g1/                          one generation of one identity
        manifest.json            makes it an artifact; created last, and only if it is not there
        lease-000001.json        who may commit it: the holder of the highest number
        000001-3f9a61c2/         what one builder wrote, and nobody else
            files/               the artifact itself, all of it listed in the manifest
            metrics.jsonl        the step log
            resume/              what an interrupted build continues from

The manifest names the builder's folder that counts, and every file with its size and SHA-256; the
*content hash* is the SHA-256 of those entries and the facts, so two builds of equal files are equal
artifacts. Addresses in manifests are relative, so that a store may be moved or copied.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from pydantic import Field, ValidationError

from configs.base import Frozen
from configs.errors import ArtifactError, LeaseLost, StoreError
from configs.model import AnyModelConfig

MANIFEST = "manifest.json"
FORMAT = 2
FILES = "files"
"""The part of a builder's folder that becomes the artifact."""
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
    def stage_name(self) -> str:
        """The function's own name, by which selectors know the stage."""
        return self.stage.rpartition(":")[2]


class Artifact(Frozen):
    """Base of the nouns. `uri` is the absolute folder of its files; the other fields are facts."""

    kind: ClassVar[str]
    uri: str

    @classmethod
    def load(cls, generation: str) -> Self:
        """The artifact committed at `generation`; ArtifactError if unfinished or another kind."""
        manifest = read_manifest(generation)
        if manifest.kind != cls.kind:
            raise ArtifactError(
                f"{generation} holds a {manifest.kind}, not a {cls.kind}; name another"
            )
        return cls(uri=f"{generation}/{manifest.address}", **manifest.facts)

    def facts(self) -> dict[str, Any]:
        """The fields that the manifest records, as JSON values."""
        return self.model_dump(mode="json", exclude={"uri"})

    def path(self, *names: str) -> Path:
        """A local path inside the artifact, which its manifest covers.

        ArtifactError for a name that leads out of it: what no hash covers may not be read.
        """
        if "://" in self.uri and not self.uri.startswith("file://"):
            raise StoreError(f"{self.uri}: only local folders hold artifacts so far; use a path")
        inner = Path(*names)
        if inner.is_absolute() or ".." in inner.parts:
            raise ArtifactError(
                f"{self.uri}: {inner} lies outside the {self.kind}, where no manifest covers it; "
                "name a file of the artifact"
            )
        return Path(self.uri.removeprefix("file://"), inner)

    def beside(self, *names: str) -> Path:
        """A local path in the builder's folder, which the manifest does not cover.

        For showing what happened, as the step log does; never for a stage's input.
        """
        return self.path().parent.joinpath(*names)

    def manifest(self) -> Manifest:
        """The manifest that makes this an artifact; ArtifactError as of `read_manifest`."""
        return read_manifest(generation_of(self.uri))


class Corpus(Artifact):
    """Packed shards, problems and a tokenizer.

    `train/*.arrow` and `held_out/<source>/*.arrow`: see `stages/shards.py`.
    `problems/train.parquet`, `problems/held_out.parquet`: see `stages/verifiers.py`.
    `tokenizer.json` (vocabulary of `vocab_size`), `statistics.json`, `dropped.jsonl`.
    """

    kind: ClassVar[str] = "corpus"
    train_rows: int
    held_out_rows: dict[str, int]
    """Packed held-out rows of each source."""
    sequence_tokens: int
    vocab_size: int
    train_problems: int
    held_out_problems: int


class Checkpoint(Artifact):
    """A model that any later stage can start from.

    `config.json`, `model*.safetensors` in float32 under Hugging Face names, `tokenizer.json`;
    if it was trained here, `history.json` (see `stages/telemetry.py`).
    """

    kind: ClassVar[str] = "checkpoint"
    step: int
    sequences_seen: int
    """Pretraining rows consumed, in the order of `stages.shards.consumed_rows`."""
    model: AnyModelConfig
    final_loss: float | None
    """That of the last step; none if the weights were imported."""
    best_step: int | None = None
    """The step after which what was measured on held-out data was best, the first of equals: the
    loss on text in pretraining, pass@1 in post-training; none if nothing was. The weights are those
    of the last step all the same."""


class Report(Artifact):
    """`report.json` and `report.md`: measurements of one or more checkpoints."""

    kind: ClassVar[str] = "report"
    headline: dict[str, float]
    """Key figures, by metric name."""
    shortfall: str | None = None
    """Why what was measured is not what was asked for; none if it is. The report is there to be
    read all the same."""


class Parity(Frozen):
    """How closely one variant of a bundle reproduces its source on fixed prompts."""

    positions: int
    max_abs_logit_error: float
    top1_agreement: float
    mean_kl_nats: float


class Asked(Frozen):
    """How a variant answers held-out problems through its own tokenizer, template and settings."""

    problems: int
    source_greedy_accuracy: float
    """Of the checkpoint that the variant was made of, asked as the line asks."""
    greedy_accuracy: float
    greedy_verdicts_apart: int
    """Problems of which one of the two is right and the other wrong."""
    chat_greedy_accuracy: float
    """The same, asked through the chat template."""
    pass_at_1: float
    """Sampled as its generation config says."""
    chat_pass_at_1: float


class Bundle(Artifact):
    """A folder per variant, each loadable by servers of the target.

    cuda: `bf16/`, `fp8/` (Hugging Face layout). ascend: `bf16/`, `w8a8/` (ModelSlim description).
    """

    kind: ClassVar[str] = "bundle"
    target: Literal["cuda", "ascend"]
    parity: dict[str, Parity]
    """By variant."""
    asked: dict[str, Asked] = Field(default_factory=dict)
    """By variant; empty if the corpus holds no problems, or none were to be asked."""


def generation_of(uri: str) -> str:
    """The folder of the manifest that covers the files in `uri`."""
    return uri.rsplit("/", 2)[0]


def filesystem(address: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, and the path in it; what holds no `://` is a local path.

    fsspec itself would take a path with `::` in it for a chain of file systems.
    """
    if "://" not in address:
        return LocalFileSystem(), os.path.abspath(os.path.expanduser(address))
    fs, path = fsspec.core.url_to_fs(address)
    return fs, path


def read_manifest(generation: str) -> Manifest:
    """The manifest of a generation; ArtifactError if it has none or it cannot be understood."""
    path = f"{generation}/{MANIFEST}"
    try:
        fs, local = filesystem(path)
        with fs.open(local, "rb") as file:
            return Manifest.model_validate(json.load(file))
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


def list_files(uri: str) -> dict[str, int]:
    """Sizes in bytes of all files below `uri`, by relative name."""
    fs, root = filesystem(uri)
    found = fs.find(root, detail=True)
    return dict(sorted((os.path.relpath(path, root), int(i["size"])) for path, i in found.items()))


def hash_file(uri: str, name: str) -> str:
    """SHA-256 of one file, in hexadecimal; ArtifactError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        fs, path = filesystem(f"{uri}/{name}")
        with fs.open(path, "rb") as file:
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


def verify(generation: str, *, hashes: bool = True) -> None:
    """ArtifactError unless the artifact is what its manifest says, no more and no less.

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
    uri = f"{generation}/{manifest.address}"
    present = list_files(uri)
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

    def check(self) -> None:
        """LeaseLost unless this is the newest lease and nothing was committed meanwhile."""
        fs, folder = filesystem(self.generation)
        fs.invalidate_cache()
        own = self.uri.rpartition("/")[2]
        try:
            names = [path.rpartition("/")[2] for path in fs.ls(folder, detail=False)]
            newest = max((n for n in names if n.startswith(LEASE_PREFIX)), default="no lease")
            # Where a generation was deleted and begun anew, its numbers begin anew too.
            if newest == own and _owner(fs.cat_file(f"{folder}/{own}")) != self.owner:
                newest = "another builder's lease of that number"
        except FileNotFoundError:
            names, newest = [], "no lease"
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
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        return f"{where}: {first['msg']}"
    return (str(error).splitlines() or [type(error).__name__])[0]


def now() -> str:
    """UTC time for records, ISO 8601 to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
