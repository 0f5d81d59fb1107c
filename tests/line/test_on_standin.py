"""The whole line on a device: the stages themselves, through Ray, on the stand-in's three NPUs."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import standin
from tests.line.runs import environment, history, step_log

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(standin.MISSING), reason=standin.MISSING),
]

FEW = {
    "cluster.device": "npu",
    "pretrain.steps": 3,
    "pretrain.warmup_steps": 1,
    "pretrain.checkpoint_every_steps": 2,
    "pretrain.evaluate_every_steps": 3,
    "posttrain.steps": 2,
    "posttrain.evaluate_problems": 2,
    "evaluate.problems": 2,
    "evaluate.samples_per_problem": 1,
    "evaluate.max_held_out_tokens": 200,
    "data.max_held_out_tokens": 400,
    # A model of three steps prefers no token much to another.
    "export.min_top1_agreement": 0.5,
}
ROOT = Path(__file__).parents[2]


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    settings = [word for name, value in FEW.items() for word in ("--set", f"{name}={value}")]
    return subprocess.run(
        [sys.executable, "-m", "tests.line.on_standin", "run", *words, *settings],
        cwd=folder,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.mark.parametrize(
    "words",
    [
        ["smoke"],
        ["tiny-v3.2", "@short.toml", "--set", "pretrain.indexer.dense_steps=1"],
        ["tiny-v4", "@short.toml", "--set", "pretrain.indexer.dense_steps=1"],
        ["tiny-engram", "@short.toml", "--set", "pretrain.indexer.dense_steps=1"],
    ],
    ids=lambda words: words[0],
)
def test_every_stage_runs_on_the_device(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "short.toml").write_text((ROOT / "tests/line/short.toml").read_text())
    done = run(tmp_path, *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    # NPUs have no FP8: a recipe that asks for it is told so and trained without.
    assert "high precision, not FP8: npu devices have no FP8 here" in done.stdout + done.stderr
    losses = history(tmp_path, "pretrain")["loss"]
    assert len(losses) == FEW["pretrain.steps"]
    for stage in ("pretrain", "posttrain"):
        tags = [line["tags"] for line in step_log(tmp_path, stage) if "tags" in line][-1]
        assert (tags["device"], tags["compute"]) == ("stand-in", "bfloat16")
