"""The line over two machines that share a network and a store of objects, and nothing else."""

import json
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.line.cluster import FIRST, SECOND, Cluster, is_possible, machines
from tests.line.runs import ingot

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not is_possible(), reason="needs root and iproute2 to make namespaces"),
]

LONGER = ("posttrain.steps=40", "evaluate.samples_per_problem=256")
"""So that there is a middle in which to lose a machine."""


@pytest.fixture
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    # Ray's sockets have short paths only.
    with machines(tmp_path_factory.mktemp("two")) as made:
        yield made


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The content of each artifact of a local run that nothing disturbed, by stage and target."""
    folder = tmp_path_factory.mktemp("calm")
    settings = [word for one in LONGER for word in ("--set", one)]
    done = ingot(folder, "run", "smoke", *settings, timeout_seconds=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return contents((folder / ".ingot" / "artifacts").glob("*/*/*/manifest.json"))


def contents(manifests: Any) -> dict[str, str]:
    found = [json.loads(path.read_text()) for path in manifests]
    return {f"{one['stage']} {one['facts'].get('target', '')}": one["content"] for one in found}


def begin(two: Cluster, *settings: str, name: str = "driver") -> "subprocess.Popen[str]":
    return two.run(
        f"cluster.address={two.address}", "cluster.placement=spread", *settings, name=name
    )


def finish(two: Cluster, run: "subprocess.Popen[str]", name: str = "driver") -> str:
    """What a run printed that ended well."""
    assert run.wait(600) == 0, two.printed(name)[-6000:]
    return two.printed(name)


def steps(two: Cluster, stage: str) -> int:
    """Lines of a stage's step log so far."""
    logs = two.files(FIRST, f"{stage}/*/g1/*/metrics.jsonl")
    return len(logs[0].read_text().splitlines()) if logs else 0


def is_answering(two: Cluster) -> bool:
    """Whether a sampler of the evaluation works on the second machine."""
    logs = two.files(SECOND, "evaluate/*/g1/*/logs/sampler-*.log")
    return bool(logs) and bool(two.files(SECOND, "posttrain/*/g1/*/files/model.safetensors"))


def test_a_machine_that_is_lost_in_any_stage_costs_no_bit(
    two: Cluster, calm: dict[str, str]
) -> None:
    two.start_ray(FIRST)
    second = two.start_ray(SECOND)
    run = begin(two, *LONGER)
    moments: dict[str, Callable[[], bool]] = {
        "data": lambda: "data begins" in two.printed("driver"),
        "pretrain": lambda: steps(two, "pretrain") >= 12,
        "posttrain": lambda: steps(two, "posttrain") >= 5,
        "evaluate": lambda: is_answering(two),
        "export.cuda": lambda: "export.cuda begins" in two.printed("driver"),
    }
    for stage, has_come in moments.items():
        two.wait_for(has_come, run, stage)
        two.kill(second)
        if stage != "export.cuda":
            second = two.start_ray(SECOND)
    printed = finish(two, run)
    assert contents(two.files(FIRST, "*/*/*/manifest.json")) == calm
    # Each stage that had workers there went on from where it was, and said so.
    assert ("trainer 0 failed (its machine does not answer any more); goes on from the save of step 8") in printed
    assert printed.count("; starting the workers anew") >= 1
    assert "Traceback" not in printed
