"""What the environment says to Ray: which of it counts, and what is said of the rest."""

import os
from pathlib import Path

import pytest

from cluster.surroundings import (
    folder_fault,
    ignored_address,
    is_short_enough,
    needs_own_token,
    tmpdir_for_ray,
    token_fault,
    why_refused,
)
from configs.parallel import ClusterConfig

OURS = ClusterConfig()
NAMED = ClusterConfig(address="ray.example:6379")
SECRET = "open-sesame"


def test_only_the_recipe_names_a_cluster() -> None:
    environ = {"RAY_ADDRESS": "127.0.0.1:6379"}
    assert ignored_address(OURS, environ) == "127.0.0.1:6379"
    assert ignored_address(NAMED, environ) is None
    assert ignored_address(OURS, {"RAY_ADDRESS": ""}) is None


def test_a_folder_is_short_enough_if_a_socket_in_it_can_be_bound() -> None:
    """The longest path that Ray makes of it has 107 bytes, the most that Linux takes."""
    session = f"/ray/session_2026-11-29_04-25-03_066268_{os.getpid()}/sockets/plasma_store"
    room = 107 - len(session)
    assert is_short_enough("/" + "x" * (room - 1))
    assert not is_short_enough("/" + "x" * room)
    assert not is_short_enough("/" + "ß" * (room // 2 + 1))
    assert is_short_enough("/" + "x" * (room - 1) + "/")


def test_a_long_tmpdir_is_passed_over_and_a_long_ray_tmpdir_is_a_fault() -> None:
    long = "/scratch/" + "x" * 50
    assert tmpdir_for_ray({}) is tmpdir_for_ray({"TMPDIR": "/scratch"}) is None
    assert tmpdir_for_ray({"TMPDIR": long}) == "/tmp"
    # Python's own sockets lie there all the same.
    assert tmpdir_for_ray({"TMPDIR": long, "RAY_TMPDIR": "/scratch"}) == "/tmp"
    # What is meant for Ray is taken as it is, or refused.
    fault = folder_fault(OURS, {"RAY_TMPDIR": long})
    assert fault is not None
    assert fault[0].startswith(f"RAY_TMPDIR = {long} has 59 bytes")
    assert fault[1] == "set it to a shorter folder, as /tmp"
    assert folder_fault(OURS, {"RAY_TMPDIR": "/scratch", "TMPDIR": long}) is None
    assert folder_fault(NAMED, {"RAY_TMPDIR": long}) is None


def test_a_token_that_is_missing_is_told_of_with_the_variables_that_name_it(
    tmp_path: Path,
) -> None:
    asks = {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
    missing = token_fault(NAMED, asks)
    assert missing is not None
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token", "RAY_AUTH_MODE"):
        assert name in " ".join(missing)
    nowhere = token_fault(NAMED, asks | {"RAY_AUTH_TOKEN_PATH": "/nowhere"})
    assert nowhere is not None
    assert nowhere[0] == "RAY_AUTH_TOKEN_PATH = /nowhere is no file with a token"
    empty = tmp_path / "empty"
    empty.write_text("\n")
    assert token_fault(NAMED, asks | {"RAY_AUTH_TOKEN_PATH": str(empty)}) is not None
    # A cluster of ours has a token as well, and Ray is told where it lies.
    assert token_fault(OURS, {"RAY_AUTH_TOKEN_PATH": "/nowhere"}) is not None


def test_a_token_that_is_there_or_not_asked_for_is_no_fault(tmp_path: Path) -> None:
    asks = {"RAY_AUTH_MODE": "TOKEN", "HOME": str(tmp_path)}
    assert token_fault(NAMED, asks | {"RAY_AUTH_TOKEN": SECRET}) is None
    assert token_fault(NAMED, {}) is token_fault(NAMED, {"RAY_AUTH_MODE": "disabled"}) is None
    assert token_fault(OURS, asks) is None  # Ray makes one.
    disabled = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": "/nowhere"}
    assert token_fault(OURS, disabled) is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(SECRET)
    assert token_fault(NAMED, asks) is None
    named = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / ".ray" / "auth_token")}
    assert token_fault(NAMED, asks | named) is None


@pytest.mark.parametrize("environ", [{}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": SECRET}])
def test_a_cluster_that_does_not_answer_may_want_another_token(environ: dict[str, str]) -> None:
    told = why_refused(NAMED, environ)
    assert "RAY_AUTH_TOKEN_PATH" in told
    assert ("set RAY_AUTH_MODE=token" in told) == (not environ)
    assert SECRET not in told


def test_a_cluster_of_ours_gets_a_token_of_its_own_where_ray_can_leave_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert needs_own_token({})
    assert needs_own_token({"HOME": "/proc/nowhere"})
    assert not needs_own_token({"HOME": str(tmp_path)})
    assert not needs_own_token({"RAY_AUTH_TOKEN": SECRET})
    assert not needs_own_token({"RAY_AUTH_TOKEN_PATH": "/nowhere"})
    # A home that cannot be written may hold one.
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(SECRET)
    monkeypatch.setattr(os, "access", lambda *asked: False)
    assert not needs_own_token({"HOME": str(tmp_path)})
    (tmp_path / ".ray" / "auth_token").unlink()
    assert needs_own_token({"HOME": str(tmp_path)})
