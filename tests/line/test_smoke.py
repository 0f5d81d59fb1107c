"""The whole line on the smoke recipe: built once, reused afterwards, rebuilt as asked."""

import time
from pathlib import Path

import pytest

from tests.line.runs import artifact, bundles, history, ingot, metrics, step_log

STAGES = ("data", "pretrain", "posttrain", "evaluate", "export")
NODES = ("data", "pretrain", "posttrain", "evaluate", "export.cuda", "export.ascend")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `ingot run smoke` has ended well, with a foreign model.py beside it."""
    folder = tmp_path_factory.mktemp("line")
    (folder / "model.py").write_text("raise SystemExit('the wrong model')\n")
    (folder / "configs").mkdir()
    (folder / "configs" / "__init__.py").write_text("raise SystemExit('the wrong configs')\n")
    done = ingot(folder, "run", "smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    for node in NODES:
        assert f" {node} " in done.stdout
    return folder


def outcomes(output: str) -> dict[str, str]:
    """Outcome by node, read from the closing table."""
    rows = [line.split("│") for line in output.splitlines() if line.startswith("│")]
    # A figure too long for its column goes on in a row without a name.
    return {row[1].strip(): row[2].strip() for row in rows if row[1].strip()}


def test_the_line_makes_every_artifact_and_records_each_step_once(built: Path) -> None:
    for stage in STAGES[:-1]:
        artifact(built, stage)
    # Both are measured before their first step, which is what step 0 says.
    for stage, last in (("pretrain", 24), ("posttrain", 3)):
        assert [line["step"] for line in step_log(built, stage)] == list(range(last + 1))


def test_post_training_has_rewards_to_learn_from(built: Path) -> None:
    steps = metrics(built, "posttrain")
    assert any(0 < line["reward"] < 1 for line in steps)
    assert len({line["reward"] for line in steps}) > 1
    # Only where rewards differ within a group are there advantages, and a gradient.
    useful = [line for line in steps if line["useful_share"] > 0]
    assert useful
    assert all(line["grad_norm"] > 1e-3 for line in useful)


def test_post_training_asks_held_out_problems_before_and_after(built: Path) -> None:
    by_step = {line["step"]: line for line in step_log(built, "posttrain")}
    measured = [step for step, line in by_step.items() if "held_out_pass_at_1" in line]
    assert measured == [0, 3]
    for step in measured:
        line = by_step[step]
        for name in ("held_out_pass_at_1", "held_out_greedy_accuracy"):
            assert 0 <= line[f"{name}_low"] <= line[name] <= line[f"{name}_high"] <= 1
    assert by_step[3]["best_step"] in measured
    kept = history(built, "posttrain")
    assert kept["step"] == [1, 2, 3]
    for name in ("step", "held_out_pass_at_1", "best_step"):
        assert kept["held_out"][name] == [by_step[step][name] for step in measured]


def test_pretraining_lowers_the_loss_over_two_expert_parallel_workers(built: Path) -> None:
    lines = metrics(built, "pretrain")
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    for load in lines[0]["expert_load"]:
        assert len(load) == 8
        assert abs(sum(load) - 1) < 1e-3


def test_pretraining_lowers_the_loss_on_held_out_text_of_each_source(built: Path) -> None:
    measured = history(built, "pretrain")["held_out"]
    assert measured.pop("step") == [0, 8, 16, 24]
    names = {"held_out_loss", "held_out_loss/arithmetic", "held_out_loss/stdlib"}
    assert measured.keys() == names
    assert all(losses[-1] < 0.95 * losses[0] for losses in measured.values())
    assert artifact(built, "pretrain")[1]["facts"]["best_step"] == 24


@pytest.mark.parametrize("stage", ["pretrain", "posttrain"])
def test_what_fp8_does_is_counted_at_the_first_step(built: Path, stage: str) -> None:
    first, *others = metrics(built, stage)
    # The first line that a process writes says how it computes.
    (tags,) = [line["tags"] for line in step_log(built, stage) if "tags" in line]
    assert tags["fp8.products"].startswith("cpu: ")
    # Among the 128 tokens that share a scale some have gradients far below the largest.
    assert 0 < first["fp8_flushed/routed_experts_gradients_along_tokens"] < 1
    assert first["fp8_clipped/attention_weights"] == 0
    assert not any(name.startswith("fp8_flushed") for line in others[:1] for name in line)


def test_both_bundles_are_there_with_their_parity(built: Path) -> None:
    manifests = sorted((built / ".ingot" / "artifacts" / "export").glob("*/*/manifest.json"))
    assert len(manifests) == 2
    found = {
        (target, variant): measured
        for target, (_, facts) in bundles(built).items()
        for variant, measured in facts["parity"].items()
    }
    assert found.keys() == {
        *(("cuda", "bf16"), ("cuda", "fp8"), ("ascend", "bf16"), ("ascend", "w8a8")),
    }
    for files, facts in bundles(built).values():
        assert {path.name for path in files.iterdir()} == {*facts["parity"], "parity.json"}
        assert all(one["problems"] == 8 for one in facts["asked"].values())


def test_a_second_run_builds_nothing(built: Path) -> None:
    begin = time.monotonic()
    again = ingot(built, "run", "smoke")
    seconds = time.monotonic() - begin
    assert again.returncode == 0, again.stderr
    assert outcomes(again.stdout) == dict.fromkeys(NODES, "reused")
    assert seconds < 30, f"{seconds:.1f} s to find that nothing is to be done"


def test_a_changed_setting_rebuilds_its_stage_and_those_after_it_only(built: Path) -> None:
    plan = ingot(built, "plan", "smoke", "--set", "evaluate.problems=5")
    assert plan.returncode == 0, plan.stderr
    lines = {line.split()[0]: line for line in plan.stdout.splitlines() if line.split()}
    assert "build" in lines["evaluate"]
    assert "evaluate.problems: 15 -> 5" in lines["evaluate"]
    for node in ("data", "pretrain", "posttrain", "export.cuda", "export.ascend"):
        assert "reuse" in lines[node]


def test_only_a_stage_refuses_a_stale_upstream_and_names_the_field(built: Path) -> None:
    done = ingot(built, "run", "smoke", "--set", "pretrain.steps=30", "--only", "evaluate")
    assert done.returncode == 2
    assert "pretrain" in done.stderr
    assert "pretrain.steps" in done.stderr
