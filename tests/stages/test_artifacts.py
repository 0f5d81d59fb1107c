"""An artifact is what its manifest says, no more and no less."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import place
from configs.errors import ArtifactError
from stages.artifacts import Report
from stages.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    content_hash,
    hash_file,
    read_manifest,
    verify,
)

BUILDER = "000001-3f9a61c2"


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """The generation of a committed report of one file in a folder below."""
    files_folder = tmp_path / BUILDER / "files"
    (files_folder / "plots").mkdir(parents=True)
    (files_folder / "plots" / "loss.txt").write_text("1 2 3")
    uri, facts = str(files_folder), {"headline": {"pass_at_1": 0.1, "tiny": 1e-300}}
    files = {
        name: FileEntry(bytes=size, sha256=hash_file(uri, name))
        for name, size in place.sizes(uri).items()
    }
    manifest = Manifest(
        address=f"{BUILDER}/files",
        kind=Report.kind,
        stage="stages.evaluate.loop:evaluate",
        revision=1,
        fingerprint="f" * 16,
        identity={},
        inputs={},
        facts=facts,
        files=files,
        content=content_hash(Report.kind, facts, files),
        provenance={},
    )
    (tmp_path / MANIFEST).write_text(manifest.model_dump_json())
    return tmp_path


def edit(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Change the manifest by hand."""
    path = folder / MANIFEST
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


def test_an_untouched_artifact_is_verified(artifact: Path) -> None:
    verify(str(artifact))
    for beside in (
        "metrics.jsonl",
        "resume/step",
        "../lease-000001.json",
        "../000002-other/files/x",
    ):
        path = artifact / BUILDER / beside
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    verify(str(artifact))


@pytest.mark.parametrize("hashes", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["facts"]["headline"].update(pass_at_1=0.9),
        lambda body: body.update(kind="checkpoint"),
        lambda body: body["files"].clear(),
        lambda body: body.update(content="0" * 64),
    ],
)
def test_a_manifest_that_was_edited_is_refused(
    artifact: Path, change: Callable[[dict[str, object]], object], hashes: bool
) -> None:
    edit(artifact, change)
    with pytest.raises(ArtifactError, match=r"so it was changed; rebuild with --force evaluate"):
        verify(str(artifact), hashes=hashes)


@pytest.mark.parametrize("name", ["extra.safetensors", "plots/more.txt"])
def test_a_file_that_the_manifest_does_not_list_is_refused_by_name(
    artifact: Path, name: str
) -> None:
    (artifact / BUILDER / "files" / name).write_text("x")
    with pytest.raises(ArtifactError, match=rf"{name} is not one of the 1 files"):
        verify(str(artifact), hashes=False)


@pytest.mark.parametrize(
    "names",
    [
        ("..", "metrics.jsonl"),
        ("plots", "..", "..", "metrics.jsonl"),
        ("../metrics.jsonl",),
        ("/etc/hostname",),
        ("plots", "/etc/hostname"),
    ],
)
def test_what_lies_beside_an_artifact_cannot_be_read_as_its_file(
    artifact: Path, names: tuple[str, ...]
) -> None:
    report = Report.load(str(artifact))
    (artifact / BUILDER / "metrics.jsonl").write_text("x")
    with pytest.raises(ArtifactError, match=r"lies outside the report, where no manifest covers"):
        report.path(*names)


def test_an_artifact_is_its_files_and_knows_its_manifest_and_its_step_log(artifact: Path) -> None:
    report = Report.load(str(artifact))
    assert report.uri == str(artifact / BUILDER / "files")
    assert report.path("plots", "loss.txt").read_text() == "1 2 3"
    assert report.path("plots/loss.txt") == report.path("plots", "loss.txt")
    assert report.path() == artifact / BUILDER / "files"
    assert report.manifest() == read_manifest(str(artifact))
    assert report.manifest().stage_name == "evaluate"
    assert report.beside("metrics.jsonl") == artifact / BUILDER / "metrics.jsonl"


@pytest.mark.parametrize(
    ("text", "told"),
    [("{", "Expecting property name"), ('{"format": 1}', "format: Input should be 2")],
)
def test_a_manifest_that_cannot_be_understood_is_one_line_with_a_remedy(
    artifact: Path, text: str, told: str
) -> None:
    (artifact / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match=told) as raised:
        read_manifest(str(artifact))
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith("rebuild the node with --force")
