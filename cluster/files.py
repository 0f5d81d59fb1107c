"""Whole files or none: one that must not be there yet, and one that replaces another."""

import contextlib
import errno
import os
import uuid
from pathlib import Path
from typing import IO

COMPLETE = "complete.json"
"""Written last of the files of a folder, it says that they are all there."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS})


def create_exclusively(path: Path, text: str, *, draft: Path | None = None) -> bool:
    """Make `path` hold `text`, on the disk, unless something is there; whether it was made.

    Of several that try at once, one wins, and nobody ever sees half of it. `draft`, if given, is a
    file that is there already, through which the text gets to its place; FileNotFoundError if it is
    not, so that its folder shows whether it is still the one that it was made with.
    """
    draft = _write_draft(path, text) if draft is None else _rewrite(draft, text)
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _create_in_place(path, text)
    finally:
        # Whoever tidies the folder up may have been quicker.
        draft.unlink(missing_ok=True)
    sync_to_disk(path.parent)
    return True


def replace(path: Path, text: str) -> None:
    """Make `path` hold `text`, on the disk, whatever is there."""
    draft = _write_draft(path, text)
    try:
        os.replace(draft, path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
    sync_to_disk(path.parent)


def says_disk_is_full(error: BaseException) -> bool:
    """Whether an error, or one behind it, is that of a disk that takes no more.

    Libraries and other processes hand on the system's words alone.
    """
    words = [os.strerror(number) for number in _FULL]
    behind: BaseException | None = error
    while behind is not None:
        # Not its notes: among what a worker printed, a full disk may be some other one.
        if getattr(behind, "errno", None) in _FULL or any(one in str(behind) for one in words):
            return True
        behind = behind.__cause__ or behind.__context__
    return False


def sync_to_disk(path: Path) -> None:
    """Return once a file's bytes, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _create_in_place(path: Path, text: str) -> bool:
    """Where a file system has no links: one still wins, though a reader may come too early."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        _put(file, text)
    sync_to_disk(path.parent)
    return True


def _write_draft(path: Path, text: str) -> Path:
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.draft")
    try:
        with draft.open("x", encoding="utf-8") as file:
            _put(file, text)
    except OSError:
        # A full disk would otherwise be filled with drafts, one a heartbeat.
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
    return draft


def _rewrite(draft: Path, text: str) -> Path:
    """Have a file that is there hold `text`; it is never created."""
    with draft.open("r+", encoding="utf-8") as file:
        file.truncate()
        _put(file, text)
    return draft


def _put(file: IO[str], text: str) -> None:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
