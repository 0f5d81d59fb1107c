"""What a user's environment says to Ray, and what of it would stop a run. Loads no Ray.

RAY_ADDRESS           a cluster that Ray would join; only `cluster.address` counts here
RAY_TMPDIR, TMPDIR    the folder below which Ray keeps its sockets, whose paths must be short;
                      Python's own sockets, of which Ray has some, lie in the second always
RAY_AUTH_MODE         `token`: a named cluster asks for a token
RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token
                      the token, a file with it, and the file that Ray takes otherwise
"""

import os
from collections.abc import Mapping
from pathlib import Path

from configs.parallel import ClusterConfig

_SOCKET_BYTES = 107
"""Longest path of a Unix socket on Linux."""
_SESSION = "/ray/session_2026-01-31_12-00-00_000000_{pid}/sockets/plasma_store"
"""The longest path that Ray appends to its folder."""
_SHORT = "/tmp"
TOKEN_REMEDY = (
    "put the cluster's token into RAY_AUTH_TOKEN, or into a file that RAY_AUTH_TOKEN_PATH names"
)


def ignored_address(machines: ClusterConfig, environ: Mapping[str, str]) -> str | None:
    """The cluster that RAY_ADDRESS names and that a run will not join; none if there is none."""
    return None if machines.address is not None else environ.get("RAY_ADDRESS") or None


def is_short_enough(folder: str) -> bool:
    """Whether sockets of a Ray in this folder have paths that the system takes."""
    path = folder.rstrip("/") + _SESSION.format(pid=os.getpid())
    return len(os.fsencode(path)) <= _SOCKET_BYTES


def tmpdir_for_ray(environ: Mapping[str, str]) -> str | None:
    """What TMPDIR must be for a Ray of ours; none where it can stay as it is.

    It is not meant for Ray alone, so one that is too long for it is no fault.
    """
    return None if is_short_enough(environ.get("TMPDIR", _SHORT)) else _SHORT


def folder_fault(machines: ClusterConfig, environ: Mapping[str, str]) -> tuple[str, str] | None:
    """What is wrong with RAY_TMPDIR, and the remedy; none if nothing is."""
    asked = environ.get("RAY_TMPDIR")
    if machines.address is not None or asked is None:
        return None
    if not is_short_enough(asked):
        most = _SOCKET_BYTES - len(_SESSION.format(pid=os.getpid()))
        return (
            f"RAY_TMPDIR = {asked} has {len(os.fsencode(asked))} bytes, and paths of Ray's sockets "
            f"leave room for {most}",
            f"set it to a shorter folder, as {_SHORT}",
        )
    return None


def token_fault(machines: ClusterConfig, environ: Mapping[str, str]) -> tuple[str, str] | None:
    """Which token Ray would look for in vain, and the remedy; none if it need not, or finds one.

    A cluster of ours has a token too. Ray makes one where it is not told of any.
    """
    mode = environ.get("RAY_AUTH_MODE")
    asks = (mode is None and machines.address is None) or _is_token(mode)
    if not asks or environ.get("RAY_AUTH_TOKEN"):
        return None
    named = environ.get("RAY_AUTH_TOKEN_PATH")
    if named is not None and not _holds_text(Path(named)):
        return (
            f"RAY_AUTH_TOKEN_PATH = {named} is no file with a token",
            f"{TOKEN_REMEDY}, or unset it",
        )
    if named is None and machines.address is not None and not _has_default_token(environ):
        return (
            f"cluster.address = {machines.address} with RAY_AUTH_MODE = {mode}, and there is no "
            "token in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token",
            f"{TOKEN_REMEDY}; if that cluster asks for none, unset RAY_AUTH_MODE",
        )
    return None


def needs_own_token(environ: Mapping[str, str]) -> bool:
    """Whether Ray could neither find a token for a cluster of ours nor leave one in the home."""
    if "RAY_AUTH_TOKEN" in environ or "RAY_AUTH_TOKEN_PATH" in environ:
        return False
    if not environ.get("HOME"):
        return True
    folder = Path(environ["HOME"], ".ray")
    nearest = folder if folder.is_dir() else folder.parent
    return not _has_default_token(environ) and not os.access(nearest, os.W_OK | os.X_OK)


def why_refused(machines: ClusterConfig, environ: Mapping[str, str]) -> str:
    """What may be the matter with a named cluster that does not answer, as far as one can know."""
    if _is_token(environ.get("RAY_AUTH_MODE")):
        return f"see that it runs; if its token is another than yours, {TOKEN_REMEDY}"
    return "see that it runs; if it asks for a token, set RAY_AUTH_MODE=token and " + TOKEN_REMEDY


def _has_default_token(environ: Mapping[str, str]) -> bool:
    home = environ.get("HOME")
    return bool(home) and _holds_text(Path(home or "", ".ray", "auth_token"))


def _is_token(mode: str | None) -> bool:
    return mode is not None and mode.lower() == "token"


def _holds_text(path: Path) -> bool:
    try:
        return bool(path.read_bytes().strip())
    except OSError:
        return False
