"""`SHA256SUMS`: what every file of a variant must hash to, wherever its folder is copied.

The form is that of `sha256sum -c`: the hash in hexadecimal, two spaces, the path below the folder.
A manifest says the same of a whole artifact, but stays behind when a variant's folder is taken out
of the store.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from configs.errors import ArtifactError, ExportError
from stages.manifest import hash_file

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def write_sums(folder: Path) -> Path:
    """Hash every file below `folder` into its `SHA256SUMS`, which is to be written last.

    ExportError for a name that the form cannot hold.
    """
    lines = []
    for name in _files(folder):
        if "\n" in name or "\\" in name:
            raise ExportError(
                f"{folder}: the file name {name!r} holds a line break or a backslash, which "
                f"{SUMS} cannot hold; rename the file"
            )
        lines.append(f"{hash_file(str(folder), name)}  {name}\n")
    path = folder / SUMS
    path.write_text("".join(lines), encoding="utf-8")
    return path


def check_sums(folder: Path) -> int:
    """The number of files that were checked: all below `folder`, but for hidden ones.

    ArtifactError if there is no record, or a file is missing, unlisted or other than recorded.
    """
    expected, present = _read(folder / SUMS), dict.fromkeys(_files(folder))
    remedy = "copy the folder again, or export again"
    for name in expected:
        if name not in present:
            raise ArtifactError(f"{folder}: {name} is missing, but {SUMS} lists it; {remedy}")
    for name in present:
        if name not in expected and not any(part.startswith(".") for part in Path(name).parts):
            raise ArtifactError(
                f"{folder}: {name} is not one of the {len(expected)} files that {SUMS} lists; "
                f"delete it, or {remedy}"
            )
    for name, digest in expected.items():
        if (found := hash_file(str(folder), name)) != digest:
            raise ArtifactError(
                f"{folder}: {name} has sha256 {found[:12]}, {SUMS} says {digest[:12]}; {remedy}"
            )
    return len(expected)


def _files(folder: Path) -> Iterator[str]:
    """Paths below the folder, without the record itself, in order."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != SUMS:
            yield name


def _read(path: Path) -> dict[str, str]:
    """File names -> hashes."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ArtifactError(
            f"{path.parent}: no {SUMS}, so nothing says what its files must be; export again, or "
            "name the artifact's own folder, whose manifest does"
        ) from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}); export again") from None
    found = {}
    for number, line in enumerate(lines, start=1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise ArtifactError(
                f"{path}, line {number}: {line[:80]!r} is no hash, two spaces and a path; export "
                "again"
            )
        found[match[2]] = match[1]
    return found
