"""The data stage as a command: killed, with workers, and on two machines."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.line.cluster import FIRST, SECOND, Cluster, is_possible, machines
from tests.line.runs import INGOT, environment, ingot
from tests.objects import BUCKET
from tests.stages.prose import prose

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

DOCUMENTS, FILES = 400, 8
OVERLAY = """
name = "mine"
[data]
shard_bytes = 40_000
dedup.paragraphs = true
[data.sources.stdlib]
share = 0
[data.sources.mine]
type = "files"
share = 0.5
glob = "{glob}"
"""
SEND = """
import s3fs, sys
s3fs.S3FileSystem().put(sys.argv[1] + "/*.jsonl", sys.argv[2] + "/")
"""


@pytest.fixture
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    # Ray's sockets have short paths only.
    with machines(tmp_path_factory.mktemp("two")) as made:
        yield made


def write_texts(folder: Path) -> None:
    """Documents of which some repeat others."""
    folder.mkdir()
    for number in range(FILES):
        with (folder / f"{number}.jsonl").open("w") as file:
            for at in range(number, DOCUMENTS, FILES):
                text = prose(at % (DOCUMENTS - 30), 120)
                file.write(json.dumps({"text": text}) + "\n")


def manifest(path: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(path.read_text())
    return {name: found[name] for name in ("content", "fingerprint", "files")}


@pytest.mark.skipif(not is_possible(), reason="needs root and iproute2 to make namespaces")
def test_two_machines_make_of_an_s3_source_what_one_makes_of_files(
    two: Cluster, tmp_path: Path
) -> None:
    texts = two.folder / "texts"
    write_texts(texts)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "mine.toml").write_text(OVERLAY.format(glob=f"{texts}/*.jsonl"))
    one = ["--set", "cluster.data_workers=1"]
    done = ingot(alone, "run", "smoke", "@mine.toml", "--only", "data", *one, timeout_seconds=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (expected,) = (alone / ".ingot" / "artifacts").glob("data/*/g1/manifest.json")

    for machine in (FIRST, SECOND):
        two.start_ray(machine)
    address = f"s3://{BUCKET}/texts"
    put = two.start(FIRST, [sys.executable, "-c", SEND, str(texts), address], name="put")
    assert put.wait(60) == 0, two.printed("put")
    work = two.folder / FIRST / "work"
    (work / "mine.toml").write_text(OVERLAY.format(glob=f"{address}/*.jsonl"))
    words = [str(INGOT), "run", "smoke", "@mine.toml", "--only", "data"]
    for setting in (
        f"store.url={two.url}/store",
        f"cluster.address={two.address}",
        "cluster.data_workers=4",
    ):
        words += ["--set", setting]
    run: subprocess.Popen[str] = two.start(FIRST, words, name="driver", RAY_AUTH_TOKEN=two.token)
    assert run.wait(600) == 0, two.printed("driver")[-6000:]
    (found,) = two.files(FIRST, "data/*/g1/manifest.json")
    assert manifest(found) == manifest(expected)
    # The second machine did part of it: what it read and made is there.
    assert two.files(SECOND, "data/*/g1/*/resume/data/read/*/done.json")


def finished(folder: Path) -> set[Path]:
    """The completed folders of an interrupted build, by their names."""
    found = folder.glob(".ingot/artifacts/data/*/g1/*/resume/data/*/*/done.json")
    return {Path(*path.parts[-3:-1]) for path in found}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_driver_that_is_killed_goes_on_from_what_was_finished(
    tmp_path: Path, workers: int
) -> None:
    write_texts(tmp_path / "texts")
    overlay = OVERLAY.format(glob=f"{tmp_path / 'texts'}/*.jsonl")
    words = ["run", "smoke", "@mine.toml", "--only", "data"]
    words += ["--set", f"cluster.data_workers={workers}"]
    contents = set()
    for kills in ((), (3, 12, 18, 25)):
        folder = tmp_path / f"killed-{len(kills)}"
        folder.mkdir()
        (folder / "mine.toml").write_text(overlay)
        for count in kills:
            before = finished(folder)
            with (folder / "printed.txt").open("a") as output:
                run = subprocess.Popen(
                    [str(INGOT), *words],
                    cwd=folder,
                    env=environment(),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            deadline = time.monotonic() + 240
            while len(finished(folder)) < count and run.poll() is None:
                assert time.monotonic() < deadline, (folder / "printed.txt").read_text()
                time.sleep(0.01)
            os.killpg(run.pid, signal.SIGKILL)
            run.wait(30)
            assert finished(folder) >= before
        done = ingot(folder, *words, timeout_seconds=300)
        assert done.returncode == 0, done.stdout + done.stderr
        (path,) = folder.glob(".ingot/artifacts/data/*/g1/manifest.json")
        contents.add(json.dumps(manifest(path)))
    assert len(contents) == 1
