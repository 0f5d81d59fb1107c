"""The line over two machines that share a network and a store of objects, and nothing else."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
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


def begin(two: Cluster, *settings: str, token: str | None = None) -> "subprocess.Popen[str]":
    """Start a run over both machines, with the cluster's token unless it is given another."""
    return two.run(
        f"cluster.address={two.address}",
        "cluster.placement=spread",
        *settings,
        RAY_AUTH_TOKEN=token or two.token,
    )


def refused(two: Cluster, run: "subprocess.Popen[str]", code: int = 1) -> str:
    """The errors of a run that could not end well, one line each."""
    assert run.wait(300) == code, two.printed("driver")[-6000:]
    printed = two.printed("driver")
    assert "Traceback" not in printed
    return "\n".join(line for line in printed.splitlines() if line.startswith("ingot: error: "))


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
    lost = r"(trainer|sampler) [01] (failed|died)[:]? \(?its machine does not answer any more\)?"
    assert re.search(
        rf"^restart 1: {lost}; goes on from the save of step 8$", printed, re.MULTILINE
    )
    assert len(re.findall(rf"^{lost}; starting the workers anew$", printed, re.MULTILINE)) >= 2
    assert "Traceback" not in printed


def test_what_is_amiss_on_a_machine_is_told_in_one_sentence(two: Cluster) -> None:
    """One cluster after the other, each wrong in its own way; nothing is built by any."""
    two.start_ray(FIRST)
    wrong = begin(two, token="f" * 64)
    assert "cluster.address = " in (said := refused(two, wrong)) and "RAY_AUTH_TOKEN" in said
    assert "data begins" not in two.printed("driver")

    second = two.start_ray(SECOND, PYTHONPATH=str(other_code(two.folder)))
    said = refused(two, begin(two))
    assert re.search(r"10\.77\.2\.2 \(\w{8}\) has other files of ingot; install the same", said)
    assert "data begins" not in two.printed("driver")
    two.kill(second)

    second = two.start_ray(SECOND, AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None)
    said = refused(two, begin(two))
    assert re.search(r"pretrain: on \S+: s3://bucket/store/\S+: no credentials, or wrong", said)
    two.kill(second)

    two.start_ray(SECOND)
    said = refused(two, begin(two, "store.url=.ingot"))
    assert re.search(r"pretrain: \S+ does not see /\S+, as all machines of a cluster must", said)
    printed = finish(two, begin(two, "cluster.trainers=1", "cluster.samplers=1"))
    assert "data built" not in printed  # From the run whose second machine had no credentials.


def other_code(folder: Path) -> Path:
    """A copy of this code that says something else in one file."""
    made = folder / "other"
    for floor in ("configs", "model", "cluster", "stages", "pipeline"):
        shutil.copytree(Path(__file__).parents[2] / floor, made / floor)
    with (made / "stages" / "prompts.py").open("a") as file:
        file.write("# Another version.\n")
    return made


def test_a_machine_without_which_the_rest_is_too_small_is_told_of(two: Cluster) -> None:
    two.start_ray(FIRST)
    second = two.start_ray(SECOND)
    larger = ("cluster.cpus_per_worker=1.0", "cluster.placement_timeout_seconds=5")
    run = begin(two, *LONGER, *larger)
    two.wait_for(lambda: steps(two, "posttrain") >= 3, run, "posttrain")
    two.kill(second)
    said = refused(two, run)
    assert re.search(r"posttrain: .*ask for \d CPUs", said)
    two.start_ray(SECOND)
    printed = finish(two, begin(two, *LONGER, *larger))
    assert "posttrain: continues the interrupted build" in printed


def test_of_two_drivers_on_two_machines_one_builds_and_one_reuses(two: Cluster) -> None:
    settings = ("posttrain=false", "export=false")
    runs = {name: two.run(*settings, name=name, machine=name) for name in (FIRST, SECOND)}
    printed = [finish(two, run, name) for name, run in runs.items()]
    for stage in ("data", "pretrain", "evaluate"):
        assert sum(f"{stage} built in" in one for one in printed) == 1
        assert sum(f"{stage} reused" in one for one in printed) == 1
    assert len(two.files(FIRST, "*/*/g1/manifest.json")) == 3
    assert not two.files(FIRST, "*/*/g2")


def test_a_head_that_is_lost_ends_the_run_in_one_sentence_and_the_next_goes_on(
    two: Cluster,
) -> None:
    head = two.start_ray(FIRST)
    longer = ("pretrain.steps=400", "posttrain=false", "export=false")
    run = begin(two, *longer)
    two.wait_for(lambda: steps(two, "pretrain") >= 20, run, "pretrain")
    two.kill(head)
    said = refused(two, run)
    assert f"the head of the cluster at {two.address} does not answer any more" in said
    # Ray would have ended the process a minute after, and said so.
    assert "Failed to connect" not in two.printed("driver")
    two.start_ray(FIRST)
    printed = finish(two, begin(two, *longer))
    assert "pretrain: continues the interrupted build" in printed
