"""Where files lie: local folders, and stores of objects. The one door to fsspec.

An *address* is a path, or a URL that fsspec knows, as `s3://bucket/folder`. Both kinds of places
promise what the store needs: a file is there whole or not at all, of several who create one file
one wins, and a listing shows what was written before it began. Beyond that they differ: on a disk
a folder exists by itself and can be renamed; objects have neither folders nor new names.

Who may read a place is the environment's business (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`,
`GOOGLE_APPLICATION_CREDENTIALS` and the like): an address holds no password. Every call to S3 and
GCS has a deadline. Loads neither torch nor ray.
"""

import io
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from cluster import files
from configs.errors import NoAnswer, StoreError

Stamp = Mapping[str, Any]
"""What changes with a file's content, in all likelihood: JSON values."""

CONNECT_SECONDS, ANSWER_SECONDS, TRIES = 10, 60, 3
"""How long a place of objects may take to take a call, and to answer it, and how often it is asked
again."""
_CHUNK_BYTES = 1 << 20
_AGAIN_SECONDS = 0.5
_CONFLICTS = (409, 412)
_BUSY = 500
_LOCAL = ("file", "local")
_S3, _GCS = ("s3", "s3a"), ("gs", "gcs")
_EXTRAS = dict.fromkeys(_S3, "s3") | dict.fromkeys(_GCS, "gcs")
"""The extra of this package that brings what reads such addresses."""
_PACKAGES = {"hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp"}
"""The package of others that does."""
_LOGIN_FAULTS = ("NoCredentialsError", "PartialCredentialsError", "InvalidAccessKeyId")


def is_local(address: str) -> bool:
    """Whether it is a path of this machine, in which no sign but a slash has a meaning."""
    return "://" not in address or address.partition("://")[0] in _LOCAL


def local_path(address: str) -> Path:
    """The path of a local address, absolute."""
    assert is_local(address), address
    rest = address.partition("://")[2] if "://" in address else address
    return Path(os.path.abspath(os.path.expanduser(rest)))


def join(address: str, *names: str) -> str:
    """The address of what has these names below `address`."""
    return "/".join([address.rstrip("/"), *names]) if names else address


def key(address: str) -> str:
    """The address as a name that is the same however it was written."""
    with _told(address):
        fs, path = _open(address)
        return str(fs.unstrip_protocol(path))


@contextmanager
def opened(address: str) -> Iterator[IO[bytes]]:
    """A file, to be read in parts from any point. OSError if it cannot be."""
    with _told(address):
        fs, path = _open(address)
        file = fs.open(path, "rb")
    try:
        # What the caller makes of the bytes is no fault of the place.
        yield file if is_local(address) else io.BufferedReader(_Remote(file, address), _CHUNK_BYTES)
    finally:
        file.close()


class _Remote(io.RawIOBase):
    """A file in a place of objects, whose faults are told as those of every call are."""

    def __init__(self, file: Any, address: str) -> None:
        self._file, self._address = file, address

    def readinto(self, buffer: Any) -> int:
        with _told(self._address):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _told(self._address):
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def read(address: str) -> bytes:
    """The bytes of a file as it is now. FileNotFoundError if there is none."""
    if is_local(address):
        return local_path(address).read_bytes()
    with _told(address):
        fs, path = _open(address)
        return bytes(fs.cat_file(path))


def exists(address: str) -> bool:
    """Whether a file, or anything below that address, is there now."""
    if is_local(address):
        return local_path(address).exists()
    with _told(address):
        fs, path = _open(address)
        fs.invalidate_cache()
        return bool(fs.exists(path))


def names(folder: str) -> list[str]:
    """Names of the files and folders right below a folder, sorted; none if it is not there."""
    if is_local(folder):
        try:
            return sorted(os.listdir(local_path(folder)))
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            # What nobody may look into holds nothing that could be used.
            return []
    with _told(folder):
        fs, path = _open(folder)
        fs.invalidate_cache()
        try:
            found = fs.ls(path, detail=False)
        except FileNotFoundError as error:
            if _says_no_bucket(error):
                raise
            return []
    own = path.rstrip("/").rpartition("/")[2]
    below = {one.rstrip("/").rpartition("/")[2] for one in found}
    # Some tools leave an empty object where they think of a folder.
    return sorted(below - {own, ""} if f"{path.rstrip('/')}/" in found else below - {""})


def sizes(folder: str) -> dict[str, int]:
    """Bytes of every file below a folder, by its relative name; none if it is not there."""
    with _told(folder):
        fs, path = _open(folder)
        fs.invalidate_cache()
        found = fs.find(path, detail=True)
    # Some tools leave an empty object where they think of a folder.
    kept = {name: one for name, one in found.items() if name.rstrip("/") != path.rstrip("/")}
    return dict(
        sorted(
            (os.path.relpath(name, path), int(one["size"]))
            for name, one in kept.items()
            if not name.endswith("/")
        )
    )


def stamp(address: str) -> Stamp | None:
    """What tells this version of a file from others; none where nothing does."""
    if is_local(address):
        found = os.stat(local_path(address))
        return {
            "bytes": found.st_size,
            "inode": found.st_ino,
            "device": found.st_dev,
            "modified_ns": found.st_mtime_ns,
            # A copy may bring an old time of change along; this one cannot be set.
            "changed_ns": found.st_ctime_ns,
        }
    with _told(address):
        fs, path = _open(address)
        fs.invalidate_cache()
        info = fs.info(path)
    tag = info.get("ETag") or info.get("etag")
    return None if tag is None else {"bytes": int(info["size"]), "etag": str(tag)}


def modified(address: str) -> float:
    """When a file came to be as it is, by the clock of its place, in seconds since the epoch."""
    if is_local(address):
        return os.stat(local_path(address)).st_mtime
    with _told(address):
        fs, path = _open(address)
        fs.invalidate_cache()
        return float(fs.modified(path).timestamp())


def matching(pattern: str, *, below: str) -> dict[str, tuple[str, bool]]:
    """What a pattern fits in a place of objects: by its name relative to `below`, the address of
    each, and whether it is a folder."""
    with _told(pattern):
        fs, path = _open(pattern)
        fs.invalidate_cache()
        found = fs.glob(path, detail=True)
        base = str(fs._strip_protocol(below)).rstrip("/")
    return {
        name.removeprefix(base).lstrip("/"): (
            str(fs.unstrip_protocol(name)),
            one.get("type") == "directory",
        )
        for name, one in found.items()
    }


def create(address: str, data: bytes) -> bool:
    """Make `address` hold `data`, unless something is there; whether it was made.

    Of several that try at once one wins, and nobody ever sees half of it. The data must be one
    that nobody else writes: that is how a winner knows itself whose answer was lost on the way.
    """
    if is_local(address):
        return files.create_exclusively(local_path(address), data.decode())
    with _told(address, writes=True):
        fs, path = _open(address)
        for _ in range(TRIES):
            try:
                fs.pipe_file(path, data, mode="create")
                return True
            except FileNotFoundError:
                raise
            except OSError as error:
                if not _says_something_is_there(error):
                    raise
            try:
                # A call that was sent again, as its first answer was lost, meets its own file.
                return bool(fs.cat_file(path) == data)
            except FileNotFoundError:
                # Deleted since, or still being made by another.
                time.sleep(_AGAIN_SECONDS)
    raise StoreError(f"{address}: others make and delete it at each of {TRIES} tries; run again")


def replace(address: str, data: bytes) -> None:
    """Make `address` hold `data`, whatever is there: readers see the old or the new."""
    if is_local(address):
        files.replace(local_path(address), data.decode())
        return
    with _told(address, writes=True):
        fs, path = _open(address)
        fs.pipe_file(path, data)


def send(path: Path, address: str) -> None:
    """Copy a local file to an address, whatever is there."""
    if is_local(address):
        target = local_path(address)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.draft")
        shutil.copyfile(path, draft)
        os.replace(draft, target)
        return
    path.stat()
    try:
        with _told(address, writes=True):
            fs, there = _open(address)
            fs.put_file(str(path), there)
    except StoreError:
        # Deleted meanwhile, which is for the caller to judge.
        path.stat()
        raise


def fetch(address: str, path: Path) -> None:
    """Copy a file to a local path, whose folder is made; it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.draft")
    try:
        with _told(address):
            fs, there = _open(address)
            fs.get_file(there, str(draft))
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def delete(address: str) -> None:
    """Delete a file, or a folder with all below it; nothing if there is neither."""
    if is_local(address):
        here = local_path(address)
        if here.is_dir() and not here.is_symlink():
            shutil.rmtree(here)
        else:
            here.unlink(missing_ok=True)
        return
    with _told(address):
        fs, path = _open(address)
        fs.invalidate_cache()
        # One by one: deleting many at once takes names for patterns, and keeps refusals to itself.
        for name in fs.find(path):
            fs.rm_file(name)


def _open(address: str) -> tuple[AbstractFileSystem, str]:
    """The file system of an address, and the path in it.

    fsspec itself would take a path with `::` in it for a chain of file systems.
    """
    if is_local(address):
        return LocalFileSystem(), str(local_path(address))
    protocol = address.partition("://")[0]
    fs = fsspec.filesystem(protocol, **_settings(protocol))
    if protocol in _S3:
        for library in ("aiobotocore", "botocore"):
            # They tell where each credential was found, in every worker's file.
            logging.getLogger(library).setLevel(logging.WARNING)
        # Its own tries, of which each would be as many of the library below.
        fs.retries = 1
    return fs, str(fs._strip_protocol(address))


def _settings(protocol: str) -> dict[str, Any]:
    """Deadlines, and no memory of listings, which others change."""
    if protocol in _GCS:
        return {"use_listings_cache": False, "requests_timeout": ANSWER_SECONDS}
    if protocol not in _S3:
        return {}
    return {
        "use_listings_cache": False,
        "config_kwargs": {
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": ANSWER_SECONDS,
            "retries": {"mode": "standard", "max_attempts": TRIES},
        },
    }


@contextmanager
def _told(address: str, *, writes: bool = False) -> Iterator[None]:
    """Say what stands in the way of a place of objects; what a disk says is told as it is."""
    try:
        yield
    except (FileExistsError, IsADirectoryError, StoreError):
        raise
    except FileNotFoundError as error:
        if not is_local(address) and (writes or _says_no_bucket(error)):
            # Where there are no folders, only the bucket can be missing.
            raise StoreError(
                f"{address}: no such bucket ({error}); make it, or name another"
            ) from None
        raise
    except ImportError:
        protocol = address.partition("://")[0]
        extra = _EXTRAS.get(protocol)
        package = f"'ingot[{extra}]'" if extra else _PACKAGES.get(protocol)
        fix = f"pip install {package}" if package else "install what fsspec names for it"
        raise StoreError(f"{address}: what reads {protocol}:// is not installed; {fix}") from None
    except Exception as error:
        if is_local(address):
            raise
        kind = NoAnswer if _is_silence(error) else StoreError
        raise kind(f"{address}: {_reason(error)}") from error


def _says_something_is_there(error: OSError) -> bool:
    """Whether a create was refused because of another file, in whichever way a server says so."""
    if isinstance(error, FileExistsError):
        return True
    return any(_status(one) in _CONFLICTS for one in _chain(error))


def _reason(error: Exception) -> str:
    """Why a place of objects did not do what it was asked, and the remedy, in one line."""
    kinds = {type(one).__name__ for one in _chain(error)}
    text = " ".join(str(error).split())[:300]
    if kinds & set(_LOGIN_FAULTS) or any(one in text for one in _LOGIN_FAULTS):
        return f"no credentials, or wrong ones ({text}); set them in the environment"
    if isinstance(error, PermissionError):
        return f"is not allowed ({text}); allow it, or set other credentials in the environment"
    if _is_silence(error):
        return f"does not answer ({text}); see that it runs, and that its endpoint is the right one"
    return f"{type(error).__name__}: {text}; see that the address is right"


def _says_no_bucket(error: Exception) -> bool:
    """Whether it is not a file that is missing, but all that could hold one."""
    answers = (getattr(one, "response", None) for one in _chain(error))
    codes = (one.get("Error", {}).get("Code") for one in answers if isinstance(one, dict))
    return "NoSuchBucket" in codes


def _is_silence(error: Exception) -> bool:
    """Whether the same call may be answered later."""
    chain = list(_chain(error))
    kinds = {type(one).__name__ for one in chain}
    if any("Timeout" in kind or "Connect" in kind or "Endpoint" in kind for kind in kinds):
        return True
    return any(_status(one) >= _BUSY for one in chain)


def _status(error: BaseException) -> int:
    """The status of HTTP that an error of S3's library bears; 0 if it bears none."""
    answer = getattr(error, "response", None)
    found = answer.get("ResponseMetadata", {}) if isinstance(answer, dict) else {}
    return int(found.get("HTTPStatusCode", 0))


def _chain(error: BaseException) -> Iterator[BaseException]:
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__
