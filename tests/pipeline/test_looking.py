"""Looking at what is there: runs, and how two of a kind differ."""

import argparse
import json
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.recipe import Recipe
from pipeline import cli, page
from pipeline.tracking.listener import Tracking
from pipeline.verbs import asked, diff, import_
from stages.artifacts import Corpus
from stages.contract import Face, Planned
from tests.pipeline.fakes import FakeConfig, gather, make_line

ROOT = Path(__file__).parents[2]

# MLflow's own use of SQLAlchemy is behind its deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def ingot(*words: str) -> int:
    return cli.main(words)


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder in which the fake line ran twice, the second time with other settings."""

    def fake(recipe: Recipe) -> dict[str, Planned[Any]]:
        steps = recipe.pretraining["pretrain"].steps
        return make_line(train={"steps": steps, "fails": steps == 13}, judge={"seed": recipe.seed})

    monkeypatch.setattr(asked, "production", fake)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    (tmp_path / "over.toml").write_text('[tracking]\nuri = "http://127.0.0.1:9"\n')
    assert ingot("run", "smoke", "@over.toml") == 0
    assert ingot("run", "smoke", "@over.toml", "--set", "pretrain.steps=25", "--set", "seed=4") == 0
    return tmp_path


@pytest.fixture
def ids(line: Path) -> list[str]:
    """The two runs, the first first."""
    return sorted(path.stem for path in (line / ".ingot" / "runs").glob("*.json"))


def test_runs_are_listed_the_newest_first(
    ids: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ingot("run", "smoke", "@over.toml", "--set", "pretrain.steps=13") == 1
    capsys.readouterr()
    assert ingot("runs") == 0
    told = capsys.readouterr().out.splitlines()
    assert [one.split()[0] for one in told][1:] == ids[::-1]
    assert [re.findall("succeeded|failed ", one)[0].strip() for one in told] == [
        "failed",
        "succeeded",
        "succeeded",
    ]
    assert re.search(r"1 reused, 1 failed, 3 blocked  train: \S+", told[0])
    assert ingot("runs", "--limit", "1", "--json") == 0
    (newest,) = json.loads(capsys.readouterr().out)
    assert (newest["state"], newest["nodes"]["train"]["outcome"]) == ("failed", "failed")


def test_status_tells_how_the_last_try_of_a_node_ended(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--recipe", "smoke", "@over.toml", "--set", "pretrain.steps=13")
    assert ingot("run", *words[1:]) == 1
    capsys.readouterr()
    assert ingot("status", *words) == 3
    told = capsys.readouterr().out
    assert told.count("failed in run ") == 1
    assert re.search(r"^  train +stale +.*steps: 25 -> 13.*\n +failed in run \S+: \S+", told, re.M)
    assert ingot("status", *words, "--json") == 3
    nodes = {one["node"]: one for one in json.loads(capsys.readouterr().out)["nodes"]}
    assert "failed in run" in nodes["train"]["last_try"]
    assert "last_try" not in nodes["judge"]
    # A node that was built since is not told of.
    assert ingot("run", "smoke", "@over.toml", "--set", "pretrain.steps=14") == 0
    capsys.readouterr()
    assert ingot("status", *words) == 3
    assert "failed in run" not in capsys.readouterr().out


def test_a_plan_names_the_run_that_built_an_input_again(
    ids: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("smoke", "@over.toml", "--set", "pretrain.steps=26")
    assert ingot("run", *words, "--only", "train") == 0
    capsys.readouterr()
    assert ingot("plan", *words) == 0
    told = capsys.readouterr().out
    assert re.search(r"^  train +reuse ", told, re.M)
    assert re.search(
        r"^  judge +build +.*input checkpoint changed \(train was built by run \S+\)", told, re.M
    )


def test_figures_of_two_stages_are_not_compared(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = sorted(line.glob(".ingot/artifacts/train/*/g1"))
    manifest = second / "manifest.json"
    record = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(record | {"stage": "another"}))
    capsys.readouterr()
    assert ingot("diff", str(first), str(second)) == 3
    told = capsys.readouterr().out
    assert "-> another" in told
    assert "loss" not in told


def test_where_nothing_ran_no_run_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ingot("runs") == 0
    assert "no run is recorded in" in capsys.readouterr().out


def test_two_runs_differ_by_settings_inputs_and_figures_node_by_node(
    ids: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert ingot("diff", *ids) == 3
    told = capsys.readouterr().out
    assert "data:" not in told
    assert re.search(r"^train:\n  steps: 24 -> 25\n  loss: 0.04167 -> 0.04$", told, re.M)
    assert re.search(r"^  seed: default -> 4$", told, re.M)
    assert "after pass at 1: 0.75 -> 0.8125" in told
    assert "before pass at 1: " not in told
    assert re.search(r"^  input checkpoint: artifacts/train/\S+ \(\w{8}\) -> ", told, re.M)
    assert ingot("diff", ids[0], ids[0]) == 0
    assert capsys.readouterr().out == "no difference\n"


def test_two_artifacts_differ_as_two_runs_do(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = sorted(line.glob(".ingot/artifacts/train/*/g1"))
    capsys.readouterr()
    assert ingot("diff", *map(str, folders)) == 3
    told = capsys.readouterr().out
    assert re.search(r"^steps: 2[45] -> 2[45]$", told, re.M)
    assert "files that differ: weights.bin" in told
    assert ingot("diff", "train", "train") == 0


def test_two_recipes_differ_by_their_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert ingot("diff", "tiny", "smoke") == 3
    told = capsys.readouterr().out.splitlines()
    assert "pretrain.steps: 640 -> 24" in told
    assert not [one for one in told if one.startswith("cluster.")]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("tiny", "is a run and tiny is a recipe; name two runs, two recipes or two artifacts"),
        ("train", "is a run and train is an artifact"),
        ("2", "begins 2 ids of runs"),
        ("trian", "nor is it a run (`ingot runs`) or a recipe"),
    ],
)
def test_unlike_things_are_one_clear_error(
    ids: list[str], second: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ingot("diff", ids[0], second) == 2
    assert message in capsys.readouterr().err


def test_artifacts_of_two_kinds_are_not_compared(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ingot("diff", "train", "data") == 2
    assert "name two artifacts of one kind" in capsys.readouterr().err


def test_a_plan_says_down_to_the_last_node_what_changed_and_what_it_took_last_time(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    words = ("plan", "smoke", "@over.toml", "--set", "pretrain.steps=26", "--set", "seed=4")
    assert ingot(*words) == 0
    told = capsys.readouterr().out
    assert re.search(r"^  data +reuse ", told, re.M)
    assert re.search(r"^  train +build +steps: 25 -> 26; took \d+\.\d s last time$", told, re.M)
    cause = r"input checkpoint changed \(train: steps: 25 -> 26\); took"
    for node in ("judge", "pack.cuda", "pack.ascend"):
        assert re.search(rf"^  {re.escape(node)} +build +{cause}", told, re.M)
    assert re.search(r"^  last time these took \S+ s and \d+ B; \S+ GB are free in ", told, re.M)
    assert ingot(*words, "--json") == 0
    nodes = {one["node"]: one for one in json.loads(capsys.readouterr().out)["nodes"]}
    assert nodes["train"]["last_bytes"] > 0
    assert nodes["train"]["last_seconds"] >= 0


def test_a_body_that_is_not_there_is_told_before_anything_starts(
    line: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    face = Face(
        name="gone",
        revision=1,
        config=FakeConfig,
        takes={"corpus": Corpus},
        makes=Corpus,
        body="tests.pipeline.fakes:nothing",
    )

    def fake(recipe: Recipe) -> dict[str, Planned[Any]]:
        corpus = gather(FakeConfig(steps=99))
        return {"data": corpus, "gone": face(FakeConfig(), corpus=corpus)}

    monkeypatch.setattr(asked, "production", fake)
    runs = len(list(line.glob(".ingot/runs/*.json")))
    capsys.readouterr()
    assert ingot("plan", "smoke", "@over.toml") == 0
    assert ingot("run", "smoke", "@over.toml") == 2
    assert "has no function 'nothing'" in capsys.readouterr().err
    assert len(list(line.glob(".ingot/runs/*.json"))) == runs
    assert not list(line.glob(".ingot/artifacts/gather/*/g1/manifest.json"))[1:]


def test_a_run_tells_machines_what_became_of_each_node_and_nothing_else_on_stdout(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert ingot("run", "smoke", "@over.toml", "--json") == 0
    told = capsys.readouterr()
    record = json.loads(told.out)
    assert record["succeeded"]
    assert {name: one["outcome"] for name, one in record["outcomes"].items()} == dict.fromkeys(
        ("data", "train", "judge", "pack.cuda", "pack.ascend"), "reused"
    )
    assert "│ train" in told.err
    assert ingot("run", "smoke", "@over.toml", "--set", "pretrain.steps=13", "--json") == 1
    told = capsys.readouterr()
    assert json.loads(told.out)["outcomes"]["train"]["error"] == "train was told to fail"
    assert "ingot: error: train: train was told to fail" in told.err


def test_history_is_there_though_a_recipes_file_is_gone(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (line / "over.toml").unlink()
    capsys.readouterr()
    assert ingot("runs") == 0
    assert capsys.readouterr().out.count("succeeded") == 2
    assert ingot("show", "train") == 0
    assert ingot("diff", "train", "train") == 0
    assert ingot("status") == 2
    assert "over.toml" in capsys.readouterr().err


@pytest.mark.parametrize("limit", ["0", "-1"])
def test_a_limit_of_no_runs_is_refused(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ingot("runs", "--limit", limit) == 2
    assert "must be 1 or more" in capsys.readouterr().err


def test_recipes_are_compared_without_a_store_and_what_is_absent_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ingot("diff", "tiny", "parity") == 3
    told = capsys.readouterr()
    assert "data.sources.arithmetic.digits: 2 -> none\n" in told.out
    assert told.err == ""


OWN = """
from typing import ClassVar
from configs.base import Frozen
from stages.artifacts import Artifact
from stages.contract import Workspace, stage

class Config(Frozen):
    pass

class Own(Artifact):
    kind: ClassVar[str] = "own_thing"
    value: float

    def key_figures(self) -> dict[str, float]:
        return {"value": self.value}

@stage(revision=1)
def own(config: Config, work: Workspace) -> Own:
    work.path("own.txt").write_text("own")
    return Own(uri=work.out, value=7.0)
"""


def test_a_plugins_own_kind_of_artifact_is_shown_as_the_lines_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    (tmp_path / "own_plugin.py").write_text(OWN)
    (tmp_path / "over.toml").write_text(
        '[tracking]\nuri = "http://127.0.0.1:9"\n[nodes.own]\nuse = "own_plugin:own"\n'
    )
    assert ingot("run", "smoke", "@over.toml", "--only", "own") == 0
    # In a process that has not run it, and so has not loaded it.
    told = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "show", "own"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert re.search(r"^  value  7$", told.stdout, re.M)
    capsys.readouterr()
    assert ingot("sample", "own", "--prompt", "x") == 1
    assert "holds a own_thing without plain weights" in capsys.readouterr().err


def test_a_page_that_cannot_be_drawn_costs_a_run_nothing(
    line: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: object, **given: object) -> Path:
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr(page, "write_page", broken)
    assert ingot("run", "smoke", "@over.toml", "--set", "pretrain.steps=27") == 0
    assert "the page of this run is not written (error: unpack" in capsys.readouterr().out
    newest = max((line / ".ingot" / "runs").glob("*.json"))
    record = json.loads(newest.read_text())
    assert record["finished"]


def test_a_run_that_is_stopped_while_it_is_recorded_elsewhere_is_finished_here(
    line: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Tracking, "finish", stopped)
    assert ingot("run", "smoke", "@over.toml") == 130
    newest = max((line / ".ingot" / "runs").glob("*.json"))
    assert json.loads(newest.read_text())["finished"]


def test_an_import_is_asked_of_run_with_all_that_run_reads(
    line: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def run(args: argparse.Namespace) -> int:
        given.update(vars(args))
        return 1

    monkeypatch.setattr(import_, "run", run)
    monkeypatch.setattr(import_, "load_asked", lambda args: None)
    assert ingot("import", "folder") == 1
    assert vars(cli.parse(["run", "tiny"])).keys() <= given.keys()
    assert (given["only"], given["json"]) == (["import"], False)


def test_an_import_of_no_folder_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ingot("import", "nowhere") == 2
    told = capsys.readouterr().err
    assert "nowhere" in told
    assert "internal error" not in told


def test_a_run_that_failed_differs_from_another_by_how_it_was_asked_for(
    ids: list[str], line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ingot("run", "smoke", "@over.toml", "--set", "pretrain.steps=13") == 1
    failed = max(path.stem for path in (line / ".ingot" / "runs").glob("*.json"))
    capsys.readouterr()
    assert ingot("diff", ids[0], failed) == 3
    told = capsys.readouterr().out
    assert re.search(r"^command: ingot run smoke @\S+ -> .*--set pretrain.steps=13$", told, re.M)
    assert "train: built -> failed" in told


def test_a_difference_that_does_not_show_is_shown_in_full() -> None:
    told = list(diff._figures({"loss": 4.36712}, {"loss": 4.36714}))
    assert told == ["loss: 4.36712 -> 4.36714"]


def test_what_differs_from_the_recipe_is_what_was_said(line: Path) -> None:
    (line / "told.toml").write_text('[notify]\ncommand = ["true"]\n')
    words = ["run", "smoke", "@told.toml", "--set", "posttrain=false", "--set", "seed=4"]
    changed = asked.changed_settings(asked.load_asked(cli.parse(words)))
    assert changed == {
        "posttrain": ("as in its file", "left out"),
        "notify.command": ("none", '["true"]'),
        "seed": ("0", "4"),
    }
