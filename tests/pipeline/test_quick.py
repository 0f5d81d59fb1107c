"""Verbs that only look load nothing that computes: read in fresh processes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.parallel import StoreConfig
from tests.pipeline.fakes import World

ROOT = Path(__file__).parents[2]
HEAVY = {
    *("torch", "ray", "mlflow", "numpy", "pyarrow", "tokenizers", "transformers"),
    *("matplotlib", "safetensors", "jinja2", "pandas", "rich"),
}
MAX_BYTES = 120_000_000

CODE = """
import json, sys
from pipeline.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
print(json.dumps({
    "code": code,
    "loaded": sorted({name.partition(".")[0] for name in sys.modules}),
    # The most that this program held: what its parent held before it began is not of it.
    "bytes": 1024 * next(
        int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")
    ),
}), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store in which the fake line was built twice, of another recipe's name."""
    made = tmp_path_factory.mktemp("quick")
    world = World(StoreConfig(url=str(made / ".ingot"), min_free_bytes=0))
    world.run()
    world.run()
    return made


def look(folder: Path, *words: str) -> dict[str, Any]:
    told = subprocess.run(
        [sys.executable, "-c", CODE, *words],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found: dict[str, Any] = json.loads(told.stderr.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--help",), 0),
        (("plan", "tiny"), 0),
        (("plan", "deepseek-v3.2"), 0),
        (("run", "tiny", "--dry-run"), 0),
        (("status", "--recipe", "tiny"), None),
        (("why", "pretrain", "--recipe", "tiny"), 0),
        (("runs", "--recipe", "tiny"), 0),
        (("diff", "tiny", "smoke", "--recipe", "tiny"), 3),
    ],
)
def test_a_verb_that_looks_loads_nothing_that_computes(
    folder: Path, words: tuple[str, ...], code: int | None
) -> None:
    found = look(folder, *words)
    assert HEAVY & set(found["loaded"]) == set()
    assert found["bytes"] <= MAX_BYTES
    if code is not None:
        assert found["code"] == code


def test_showing_an_artifact_loads_nothing_that_computes(folder: Path) -> None:
    (one,) = (folder / ".ingot" / "artifacts" / "train").glob("*/g1")
    found = look(folder, "show", str(one), "--recipe", "tiny")
    assert HEAVY & set(found["loaded"]) == set()
    assert found["bytes"] <= MAX_BYTES
    assert found["code"] == 0


def test_the_help_loads_no_schema_either(folder: Path) -> None:
    assert "pydantic" not in look(folder, "--help")["loaded"]
