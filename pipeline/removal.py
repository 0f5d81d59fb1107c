"""Deletes from a store what nobody uses, and puts it back if somebody begins to meanwhile.

A generation is renamed before it is deleted. From then on nobody finds it, so what others did to it
until that moment is all that they will ever have done, and can be looked at.
"""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from configs.errors import StoreError
from pipeline.lease import is_held, newest, take
from stages.manifest import MANIFEST

_SUFFIX = ".removed"


def remove(generation: Path, used_by: Callable[[], str | None] = lambda: None) -> None:
    """Delete a generation's folder, or what is left of it while others delete it too.

    StoreError, with the folder as it was, if a builder holds it or has committed it meanwhile, or
    if `used_by`, which is asked last, says who uses it.
    """
    try:
        number, was_committed = newest(str(generation))[0], _has_manifest(generation)
        # With the next lease in hand, nobody begins to build in it for the next few seconds.
        address = str(generation)
        lease = None if is_held(address) else take(address, number + 1, uuid.uuid4().hex)
        if lease is None:
            pid = newest(address)[1].get("pid")
            raise StoreError(f"{generation}: process {pid} is building it; wait for it, or end it")
        away = generation.with_name(f".{generation.name}-{lease.owner[:8]}{_SUFFIX}")
        generation.rename(away)
    except StoreError:
        raise
    except FileNotFoundError:
        return
    except OSError as error:
        raise _undeletable(generation, error) from None
    if newest(str(away))[0] != lease.number or _has_manifest(away) != was_committed:
        reason: str | None = "another process builds it, or has just done so"
    else:
        reason = used_by()
    if reason is not None:
        _put_back(away, generation, Path(lease.uri).name)
        raise StoreError(f"{generation}: {reason}; left as it is")
    delete(away)


def removed(store_root: Path) -> Iterator[Path]:
    """Folders of generations whose removal was cut short."""
    yield from sorted((store_root / "artifacts").glob(f"*/*/.g*{_SUFFIX}"))


def delete(folder: Path) -> None:
    """Delete a folder, or what is left of it while others delete it too; StoreError if refused."""
    while os.path.lexists(folder):
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            continue  # Part of it went by another hand: the rest is still to go.
        except OSError as error:
            raise _undeletable(folder, error) from None


def _put_back(away: Path, generation: Path, lease: str) -> None:
    """Give a folder its name back, without the lease that was taken to delete it."""
    try:
        (away / lease).unlink(missing_ok=True)
        away.rename(generation)
    except OSError as error:
        raise StoreError(
            f"{generation}: somebody began to use it while it was being deleted, and it cannot be "
            f"given this name again ({error.strerror}); it lies in {away}: rename that to "
            f"{generation.name}, or delete it"
        ) from None


def _has_manifest(generation: Path) -> bool:
    return (generation / MANIFEST).exists()


def _undeletable(folder: Path, error: OSError) -> StoreError:
    return StoreError(f"{folder}: cannot be deleted ({error.strerror}); make it writable")
