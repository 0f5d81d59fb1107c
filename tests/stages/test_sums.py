"""What is said of a variant's files travels with them, and any change of them is found."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import ArtifactError, ExportError
from stages.export.sums import SUMS, check_sums, write_sums


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files, one of them below a folder, and their record."""
    made = tmp_path / "bf16"
    (made / "additional_chat_templates").mkdir(parents=True)
    (made / "config.json").write_text("{}\n")
    (made / "model.safetensors").write_bytes(bytes(range(256)))
    (made / "additional_chat_templates" / "tool use.jinja").write_text("{{ x }}")
    write_sums(made)
    return made


def test_a_copied_folder_is_what_its_record_says(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "mine"
    shutil.copytree(folder, copy)
    (copy / ".gitattributes").write_text("brought by those who copied it")
    assert check_sums(copy) == 3
    # Writing it again changes nothing: the record is none of its own files.
    before = (folder / SUMS).read_bytes()
    write_sums(folder)
    assert (folder / SUMS).read_bytes() == before


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_any_machine_can_check_the_record(folder: Path) -> None:
    words = ["sha256sum", "--check", "--strict", SUMS]
    assert subprocess.run(words, cwd=folder, capture_output=True).returncode == 0
    (folder / "config.json").write_text("{ }\n")
    assert subprocess.run(words, cwd=folder, capture_output=True).returncode == 1


def _cut(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(range(255)))


def _flip(folder: Path) -> None:
    body = bytearray((folder / "model.safetensors").read_bytes())
    body[17] ^= 1
    (folder / "model.safetensors").write_bytes(body)


def _lose(folder: Path) -> None:
    (folder / "config.json").unlink()


def _add(folder: Path) -> None:
    (folder / "model-2.safetensors").write_bytes(b"")


def _no_record(folder: Path) -> None:
    (folder / SUMS).unlink()


def _scribble(folder: Path) -> None:
    (folder / SUMS).write_text("not a record\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_cut, "model.safetensors has sha256 "),
        (_flip, "model.safetensors has sha256 "),
        (_lose, "config.json is missing, but SHA256SUMS lists it"),
        (_add, "model-2.safetensors is not one of the 3 files"),
        (_no_record, "no SHA256SUMS, so nothing says what its files must be"),
        (_scribble, "line 1: 'not a record' is no hash, two spaces and a path"),
    ],
)
def test_every_change_is_found_and_named(
    folder: Path, change: Callable[[Path], None], message: str
) -> None:
    change(folder)
    with pytest.raises(ArtifactError, match=message):
        check_sums(folder)


def test_a_name_that_the_record_cannot_hold_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a\nb").write_text("")
    with pytest.raises(ExportError, match="holds a line break or a backslash"):
        write_sums(tmp_path)
