"""Promises of every place where files lie: a local folder, and a store of objects."""

import json
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import s3fs
from botocore.exceptions import ClientError

from cluster import place
from configs.errors import StoreError
from tests.objects import Objects, patched

RACERS, ROUNDS = 8, 40


@pytest.fixture(params=["a local folder", "objects"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder of either kind of place."""
    if request.param == "a local folder":
        return str(tmp_path)
    return f"{request.getfixturevalue('objects').url}/{uuid.uuid4().hex}"


def test_what_is_written_is_read(folder: str) -> None:
    address = place.join(folder, "a", "b?c#d e.json")
    if place.is_local(folder):
        place.local_path(address).parent.mkdir()
    assert not place.exists(address)
    with pytest.raises(FileNotFoundError):
        place.read(address)
    place.replace(address, b"one")
    assert place.read(address) == b"one"
    place.replace(address, b"two, longer")
    assert place.read(address) == b"two, longer"
    assert place.exists(address)
    assert place.exists(place.join(folder, "a"))
    with place.opened(address) as file:
        file.seek(5)
        assert file.read(3) == b"lon"


def test_a_listing_shows_what_was_written_before(folder: str) -> None:
    assert place.names(place.join(folder, "none")) == []
    assert place.sizes(place.join(folder, "none")) == {}
    if place.is_local(folder):
        place.local_path(folder).joinpath("a", "b").mkdir(parents=True)
    for number in range(3):
        place.replace(place.join(folder, "a", "b", f"{number}.txt"), b"x" * number)
        place.replace(place.join(folder, f"{number}.txt"), b"")
        assert len(place.names(place.join(folder, "a", "b"))) == number + 1
    assert place.names(folder) == ["0.txt", "1.txt", "2.txt", "a"]
    assert place.sizes(place.join(folder, "a")) == {"b/0.txt": 0, "b/1.txt": 1, "b/2.txt": 2}


def test_what_is_there_is_left_as_it_is(folder: str) -> None:
    address = place.join(folder, "lease.json")
    assert place.create(address, b"first")
    assert not place.create(address, b"second")
    assert place.read(address) == b"first"
    assert place.names(folder) == ["lease.json"]


def test_of_many_who_create_one_file_exactly_one_does(folder: str) -> None:
    with ThreadPoolExecutor(RACERS) as pool:
        for number in range(ROUNDS):
            address, barrier = place.join(folder, f"{number}"), Barrier(RACERS)

            def race(text: bytes, address: str = address, barrier: Barrier = barrier) -> bool:
                barrier.wait(60)
                return place.create(address, text)

            texts = [f"{racer} ".encode() * 500 for racer in range(RACERS)]
            won = list(pool.map(race, texts))
            assert won.count(True) == 1
            assert place.read(address) == texts[won.index(True)]


def test_who_created_a_file_and_did_not_hear_so_has_created_it(objects: Objects) -> None:
    """The call is sent again, and finds what it wrote the first time."""
    address = f"{objects.url}/{uuid.uuid4().hex}"
    place.replace(address, b"mine")
    assert place.create(address, b"mine")
    assert not place.create(address, b"other")


def test_files_are_sent_and_fetched_whole(folder: str, tmp_path: Path) -> None:
    source, target = tmp_path / "source.bin", tmp_path / "new" / "target.bin"
    data = os.urandom(3_000_000)
    source.write_bytes(data)
    address = place.join(folder, "below", "it.bin")
    place.send(source, address)
    assert place.sizes(place.join(folder, "below")) == {"it.bin": len(data)}
    place.fetch(address, target)
    assert target.read_bytes() == data
    with pytest.raises(FileNotFoundError):
        place.fetch(place.join(folder, "none"), tmp_path / "none")
    assert sorted(tmp_path.rglob("*.draft")) == []
    assert not (tmp_path / "none").exists()


def test_what_is_deleted_is_gone_with_all_below_it_and_no_more(folder: str) -> None:
    for name in ("a/b/1", "a/2", "ab"):
        address = place.join(folder, name)
        if place.is_local(folder):
            place.local_path(address).parent.mkdir(parents=True, exist_ok=True)
        place.replace(address, b"x")
    place.delete(place.join(folder, "a"))
    place.delete(place.join(folder, "none"))
    assert place.names(folder) == ["ab"]
    place.delete(place.join(folder, "ab"))
    assert place.names(folder) == []


def test_a_stamp_changes_with_the_content(folder: str) -> None:
    address = place.join(folder, "file")
    place.replace(address, b"one")
    first = place.stamp(address)
    assert first == place.stamp(address)
    assert json.loads(json.dumps(first)) == first
    place.replace(address, b"two")
    assert place.stamp(address) != first


def test_a_pattern_finds_objects_by_their_names_below_a_folder(objects: Objects) -> None:
    base = f"{objects.url}/{uuid.uuid4().hex}"
    for name in ("a.txt", "b/c.txt", "b/d.md"):
        place.replace(place.join(base, name), b"x")
    found = place.matching(f"{base}/**/*.txt", below=base)
    assert found == {name: (place.join(base, name), False) for name in ("a.txt", "b/c.txt")}
    assert place.matching(f"{base}/*", below=base)["b"] == (place.join(base, "b"), True)


def test_a_path_means_itself_whatever_its_signs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for address, path in {
        "/a::b/*.txt": "/a::b/*.txt",
        "zip::x": f"{tmp_path}/zip::x",
        "file:///a b": "/a b",
    }.items():
        assert str(place.local_path(address)) == path
        assert place.key(address) == f"file://{path}"
        assert place.is_local(address)
    assert not place.is_local("memory://a/b")


@pytest.mark.parametrize(
    ("address", "variables", "message"),
    [
        ("s3://nowhere/x", {}, "no such bucket"),
        ("s3://bucket/x", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "does not answer"),
        ("nothing://bucket/x", {}, "see that the address is right"),
    ],
)
def test_a_place_that_cannot_be_used_is_one_clear_error(
    objects: Objects,
    monkeypatch: pytest.MonkeyPatch,
    address: str,
    variables: dict[str, str],
    message: str,
) -> None:
    monkeypatch.setattr(place, "CONNECT_SECONDS", 1)
    monkeypatch.setattr(place, "TRIES", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    with patched(variables), pytest.raises(StoreError) as caught:
        place.replace(address, b"x")
    assert str(caught.value).startswith(f"{address}: ")
    assert message in str(caught.value)
    assert "anything" not in str(caught.value)


def test_a_bucket_that_is_not_there_is_told_and_not_taken_for_an_empty_one(
    objects: Objects,
) -> None:
    for ask in (place.read, place.names, place.stamp):
        with pytest.raises(StoreError, match=r"^s3://nowhere/x: no such bucket .*; make it, or"):
            ask("s3://nowhere/x")


def test_who_may_not_write_for_want_of_a_bucket_is_told_so_in_whichever_way_a_server_says_it(
    objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise FileNotFoundError("the place is not there")

    address = f"{objects.url}/{uuid.uuid4().hex}"
    monkeypatch.setattr(place._open(address)[0], "pipe_file", refuse)
    for write in (place.replace, place.create):
        with pytest.raises(StoreError, match=r"no such bucket \(the place is not there\); make it"):
            write(address, b"x")


def test_signs_of_patterns_in_an_address_mean_themselves(folder: str) -> None:
    names = ("run[ab]", "runa", "s*r", "star", "q?x", "qax", "a::b", "ä b%20+&")
    for name in names:
        address = place.join(folder, name, "x")
        if place.is_local(folder):
            place.local_path(address).parent.mkdir()
        place.replace(address, name.encode())
    for name in names:
        assert place.read(place.join(folder, name, "x")) == name.encode()
    for name in ("run[ab]", "s*r", "q?x"):
        place.delete(place.join(folder, name))
    left = {"runa", "star", "qax", "a::b", "ä b%20+&"}
    assert set(place.names(folder)) == left


def test_threads_that_fetch_one_file_at_once_each_have_it(folder: str, tmp_path: Path) -> None:
    address, data = place.join(folder, "large.bin"), os.urandom(8_000_000)
    (tmp_path / "source").write_bytes(data)
    place.send(tmp_path / "source", address)
    target, barrier = tmp_path / "here" / "large.bin", Barrier(4)

    def fetch(number: int) -> bool:
        barrier.wait(30)
        place.fetch(address, target)
        return target.read_bytes() == data

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(fetch, range(4)))
    assert [path.name for path in target.parent.iterdir()] == ["large.bin"]


def test_what_a_caller_makes_of_the_bytes_is_its_own_fault(folder: str) -> None:
    address = place.join(folder, "text")
    place.replace(address, b"text")
    with pytest.raises(KeyError, match="mine"), place.opened(address):
        raise KeyError("mine")


def test_a_local_file_that_is_gone_is_no_fault_of_the_bucket(
    objects: Objects, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError):
        place.send(tmp_path / "gone", f"{objects.url}/gone")


@pytest.mark.parametrize("status", [409, 412])
def test_who_loses_is_told_so_in_whichever_way_a_server_says_it(
    objects: Objects, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    address = f"{objects.url}/{uuid.uuid4().hex}"
    place.replace(address, b"theirs")

    def refuse(*args: object, **given: object) -> None:
        answer = {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {"Code": "Conflict"}}
        raise OSError(5, "Conflict") from ClientError(answer, "PutObject")

    monkeypatch.setattr(place._open(address)[0], "pipe_file", refuse)
    assert not place.create(address, b"mine")
    assert place.create(address, b"theirs")
    monkeypatch.setattr(place, "_AGAIN_SECONDS", 0.0)
    with pytest.raises(StoreError, match="make and delete it at each of 3 tries"):
        place.create(f"{address}-none", b"mine")


def test_empty_objects_that_stand_for_folders_are_no_files(objects: Objects) -> None:
    base = f"{objects.url}/{uuid.uuid4().hex}"
    fs = s3fs.S3FileSystem()
    for name in ("folder/", "folder/a.txt"):
        fs.call_s3(
            "put_object", Bucket="bucket", Key=f"{base.partition('bucket/')[2]}/{name}", Body=b""
        )
    assert place.sizes(f"{base}/folder") == {"a.txt": 0}
    assert place.names(f"{base}/folder") == ["a.txt"]
