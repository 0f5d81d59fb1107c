"""What stages exchange: an address and facts, never bytes.

A folder is an artifact once it holds `manifest.json`, which is written last. The manifest lists
every file with its size and SHA-256; the *content hash* is the SHA-256 of those entries and the
facts, so two builds of equal files are equal artifacts. Names in `PRIVATE` lie in the same folder
and are not part of it: resume state, the step log, the lease.
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
from pydantic import ValidationError

from configs.base import Frozen
from configs.errors import ArtifactError, LeaseLost, StoreError
from configs.model import AnyModelConfig

MANIFEST = "manifest.json"
FORMAT = 1
PRIVATE = frozenset({MANIFEST, "metrics.jsonl", "metrics.draft", "lease.json", "resume"})
"""First path components that never belong to an artifact."""


class FileEntry(Frozen):
    """One file of an artifact."""

    bytes: int
    sha256: str


class InputEntry(Frozen):
    """The artifact that an input was, when this one was built."""

    uri: str
    fingerprint: str
    content: str


class Manifest(Frozen):
    """The record that makes a folder an artifact."""

    format: Literal[1] = 1
    kind: str
    stage: str
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


class Artifact(Frozen):
    """Base of the nouns. `uri` is an absolute folder; the other fields are its facts."""

    kind: ClassVar[str]
    uri: str

    @classmethod
    def load(cls, uri: str) -> Self:
        """The artifact committed at `uri`; ArtifactError if unfinished or of another kind."""
        manifest = read_manifest(uri)
        if manifest.kind != cls.kind:
            raise ArtifactError(f"{uri} holds a {manifest.kind}, not a {cls.kind}; name another")
        return cls(uri=uri, **manifest.facts)

    def facts(self) -> dict[str, Any]:
        """The fields that the manifest records, as JSON values."""
        return self.model_dump(mode="json", exclude={"uri"})

    def path(self, *names: str) -> Path:
        """A local path inside the artifact."""
        if "://" in self.uri and not self.uri.startswith("file://"):
            raise StoreError(f"{self.uri}: only local folders hold artifacts so far; use a path")
        return Path(self.uri.removeprefix("file://"), *names)


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

    `config.json`, `model*.safetensors` in float32 under Hugging Face names, `tokenizer.json`.
    """

    kind: ClassVar[str] = "checkpoint"
    step: int
    sequences_seen: int
    """Pretraining rows consumed, in the order of `stages.shards.consumed_rows`."""
    model: AnyModelConfig
    final_loss: float | None
    """That of the last step; none if the weights were imported."""


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


class Bundle(Artifact):
    """A folder per variant, each loadable by servers of the target.

    cuda: `bf16/`, `fp8/` (Hugging Face layout). ascend: `bf16/`, `w8a8/` (ModelSlim description).
    """

    kind: ClassVar[str] = "bundle"
    target: Literal["cuda", "ascend"]
    parity: dict[str, Parity]
    """By variant."""


def read_manifest(uri: str) -> Manifest:
    """The manifest at `uri`; ArtifactError if there is none or it cannot be understood."""
    path = f"{uri}/{MANIFEST}"
    try:
        with fsspec.open(path, "r") as file:
            return Manifest.model_validate(json.load(file))
    except FileNotFoundError:
        raise ArtifactError(
            f"{uri}: no {MANIFEST}, so this is not a finished artifact; `ingot run` finishes it"
        ) from None
    except OSError as error:
        raise ArtifactError(_unreadable(path, error)) from None
    except ValueError as error:
        raise ArtifactError(
            f"{path}: not a manifest of format {FORMAT} ({_first_line(error)}); rebuild the node "
            "with --force"
        ) from None


def list_files(uri: str) -> dict[str, int]:
    """Sizes in bytes of the files that belong to the artifact at `uri`, by relative name."""
    fs, root = fsspec.core.url_to_fs(uri)
    found = {}
    for path, info in fs.find(root, detail=True).items():
        name = os.path.relpath(path, root)
        if name.split(os.sep)[0] not in PRIVATE:
            found[name] = int(info["size"])
    return dict(sorted(found.items()))


def hash_file(uri: str, name: str) -> str:
    """SHA-256 of one file, in hexadecimal; ArtifactError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with fsspec.open(f"{uri}/{name}", "rb") as file:
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


def verify(uri: str, *, hashes: bool = True) -> None:
    """ArtifactError unless the artifact is what its manifest says, no more and no less.

    Every file is there with its size and, with `hashes`, its SHA-256; there is no other file, and
    the content hash is that of the kind, facts and files listed.
    """
    manifest = read_manifest(uri)
    content = content_hash(manifest.kind, manifest.facts, manifest.files)
    if content != manifest.content:
        raise ArtifactError(
            f"{uri}: {MANIFEST} lists kind, facts and files of content {content[:12]}, but says "
            f"{manifest.content[:12]}, so it was changed; rebuild with --force {manifest.stage}"
        )
    present = list_files(uri)
    if unlisted := next((name for name in present if name not in manifest.files), None):
        raise ArtifactError(
            f"{uri}: {unlisted} is not one of the {len(manifest.files)} files that its manifest "
            f"lists; delete it, or rebuild with --force {manifest.stage}"
        )
    for name, entry in manifest.files.items():
        if name not in present:
            raise ArtifactError(f"{uri}: {name} is missing; rebuild with --force {manifest.stage}")
        if present[name] != entry.bytes:
            raise ArtifactError(
                f"{uri}: {name} has {present[name]} bytes, its manifest says {entry.bytes}; "
                f"rebuild with --force {manifest.stage}"
            )
        if hashes and (seen := hash_file(uri, name)) != entry.sha256:
            raise ArtifactError(
                f"{uri}: {name} has sha256 {seen[:12]}, its manifest says {entry.sha256[:12]}; "
                f"rebuild with --force {manifest.stage}"
            )


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write into a slot. Passed to workers, who check it before they write."""

    uri: str
    """The slot's `lease.json`."""
    owner: str

    def check(self) -> None:
        """LeaseLost unless the lease file still names this owner."""
        try:
            with fsspec.open(self.uri, "r") as file:
                holder = json.load(file)["owner"]
        except (FileNotFoundError, json.JSONDecodeError, KeyError):
            holder = "nobody"
        if holder != self.owner:
            raise LeaseLost(
                f"{self.uri}: held by {holder}, not by {self.owner}; this build stops writing, "
                "and the same command later takes what the other builder makes"
            )


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
