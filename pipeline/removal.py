"""Deletes from a store what nobody uses, and puts it back if somebody begins to meanwhile.

On a disk a generation is renamed before it is deleted. From then on nobody finds it, so what others
did to it until that moment is all that they will ever have done, and can be looked at. Objects have
no new names: there the lease of whoever deletes keeps others away.
"""

import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from cluster import place
from cluster.mirror import Mirror
from configs.errors import StoreError
from pipeline.lease import HEARTBEAT_SECONDS, is_held, newest, pace, renew, take
from pipeline.slots import is_committed
from stages.manifest import MANIFEST, Lease

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
            raise _held(address)
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


def remove_objects(mirror: Mirror, generation: Path, used_by: Callable[[], str | None]) -> None:
    """The same where nothing can be renamed: the next lease, then the manifest, then the rest.

    A builder that commits between finds itself without its lease and its files, and takes its
    manifest away again (`slots.settle`). The lease goes last: nobody builds here until then.
    """
    address = mirror.address(generation)
    number, was_committed = newest(address)[0], is_committed(mirror, generation)
    lease = None if is_held(address) else take(address, number + 1, uuid.uuid4().hex)
    if lease is None:
        raise _held(address)
    stop = threading.Event()
    beating = threading.Thread(target=_beat, args=(lease, stop), daemon=True)
    beating.start()
    try:
        # A long look: records of all runs, and builders that may be alive elsewhere.
        reason = used_by()
        if not _is_newest(lease) or is_committed(mirror, generation) != was_committed:
            reason = "another process builds it, or has just done so"
        if reason is not None:
            raise StoreError(f"{address}: {reason}; left as it is")
        place.delete(f"{address}/{MANIFEST}")
        for name in place.names(address):
            if place.join(address, name) != lease.uri:
                if not _is_newest(lease):
                    raise StoreError(f"{address}: another process builds it; what is left stays")
                place.delete(place.join(address, name))
        shutil.rmtree(generation, ignore_errors=True)
    finally:
        stop.set()
        beating.join()
        # Whatever happened: nobody is to wait for a lease that its holder has forgotten.
        place.delete(lease.uri)


def _beat(lease: Lease, stop: threading.Event) -> None:
    """Move the heartbeat until told to stop; unlike a builder's also where there is a manifest."""
    while not stop.wait(HEARTBEAT_SECONDS * pace(lease.generation)):
        with suppress(OSError):
            renew(lease)


def _is_newest(lease: Lease) -> bool:
    """Whether nobody has taken a later one, as of a holder that was silent for too long."""
    number, holder = newest(lease.generation)
    return number == lease.number and holder.get("owner") == lease.owner


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


def _held(address: str) -> StoreError:
    pid = newest(address)[1].get("pid")
    return StoreError(f"{address}: process {pid} is building it; wait for it, or end it")


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
