"""What `docs/cluster` says is what this version does: its image, its manifest, its commands."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.parallel import ClusterConfig
from configs.reading import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "cluster"


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((PAGES / "kuberay.yaml").read_text())
    return found


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The head's and each worker group's."""
    cluster = manifest["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def settings(command: str) -> list[str]:
    """What a command line sets."""
    return re.findall(r"--set (\S+)", command)


def test_the_manifest_runs_a_recipe_that_can_be_read(manifest: dict[str, Any]) -> None:
    words = manifest["spec"]["entrypoint"].split()
    assert words[:3] == ["ingot", "run", "tiny"]
    recipe = load_recipe("tiny", [], settings(manifest["spec"]["entrypoint"]))
    assert recipe.cluster.address == "auto"
    assert recipe.store.url.startswith("s3://")
    assert recipe.tracking.uri is not None
    # Room for all workers at a time, on what the pods ask for.
    cpus = sum(int(pod["containers"][0]["resources"]["requests"]["cpu"]) for pod in pods(manifest))
    cluster = recipe.cluster
    assert (cluster.trainers + cluster.samplers) * cluster.cpus_per_worker <= cpus
    assert cluster.threads_per_worker <= cluster.cpus_per_worker


def test_all_pods_are_alike_and_keep_copies_at_one_path(manifest: dict[str, Any]) -> None:
    first, *others = [
        {key: one for key, one in pod["containers"][0].items() if key != "name"}
        for pod in pods(manifest)
    ]
    assert others == [first]
    image = (PAGES / "Dockerfile").read_text()
    (cache,) = re.findall(r"XDG_CACHE_HOME=(\S+)", image)
    assert first["volumeMounts"] == [{"name": "cache", "mountPath": cache}]
    assert all(pod["volumes"] == [{"name": "cache", "emptyDir": {}}] for pod in pods(manifest))


def test_the_versions_are_those_that_are_tested(manifest: dict[str, Any]) -> None:
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert manifest["spec"]["rayClusterSpec"]["rayVersion"] == pins["ray"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (image,) = {pod["containers"][0]["image"] for pod in pods(manifest)}
    assert image.endswith(f"/ingot:{project['project']['version']}")


def test_the_image_is_made_from_what_is_there() -> None:
    image = (PAGES / "Dockerfile").read_text()
    copied = [
        word for line in re.findall(r"^COPY (.*)$", image, re.M) for word in line.split()[:-1]
    ]
    assert all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    files = {project["project"]["readme"], *project["project"]["license-files"]}
    assert {*packages, *files, "pyproject.toml", "constraints.txt"} == set(copied)
    (extras,) = re.findall(r"'\.\[(\S+)\]'", image)
    assert set(extras.split(",")) <= project["project"]["optional-dependencies"].keys()
    (python,) = re.findall(r"^FROM python:(\d+\.\d+)", image, re.M)
    assert project["project"]["requires-python"] == f">={python}"


def test_the_page_names_settings_that_there_are() -> None:
    page = (PAGES / "README.md").read_text()
    assert load_recipe("tiny", [], settings(page.replace("\\\n", " ")))
    named = set(re.findall(r"`cluster\.(\w+)`", page))
    assert named and named <= ClusterConfig.model_fields.keys()
