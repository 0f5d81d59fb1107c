"""The command line: quick help, one clear line for each mistake, and what each verb prints."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from cluster import backend
from cluster.mirror import mirror_of
from configs.reading import load_recipe
from pipeline import cli
from pipeline.graph import Selection
from pipeline.progress import Display
from pipeline.records import Invocation, Records, Run
from pipeline.verbs import asked, clean, inspect, run
from pipeline.verbs import plan as plan_module
from stages.artifacts import Corpus, Report
from stages.contract import Workspace, stage
from tests.pipeline.fakes import FakeConfig, make_line

ROOT = Path(__file__).parents[2]

# MLflow's own use of SQLAlchemy is behind its deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def line(fake_line: Path) -> Path:
    """A user's folder with the fake line, which nobody tracks."""
    # Tracking has its own tests; here nothing listens, which a run must survive.
    (fake_line / "over.toml").write_text('[tracking]\nuri = "http://127.0.0.1:9"\n')
    return fake_line


def ingot(*words: str) -> int:
    return cli.main(words)


def test_help_answers_at_once_and_loads_neither_torch_nor_ray_nor_mlflow() -> None:
    code = (
        "import sys\n"
        "from pipeline.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'ray', 'mlflow', 'pydantic'} & sys.modules.keys(), file=sys.stderr)"
    )
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        told = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True, text=True
        )
        seconds.append(time.monotonic() - started)
        assert told.stderr == "set()\n"
        assert all(verb in told.stdout for verb in cli._VERBS)
    assert min(seconds) <= 0.5


def test_every_verb_has_a_module_with_its_function() -> None:
    for verb, module in cli._VERBS.items():
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        name = f"{verb}_" if verb in cli._TAKEN else verb
        assert f"\ndef {name}(args: argparse.Namespace) -> int:" in path.read_text()


def test_overlays_may_stand_anywhere_but_in_a_prompt() -> None:
    args = cli.parse(["run", "@a.toml", "tiny", "--set", "x=1", "@b.toml", "--only", "data"])
    assert (args.recipe, args.overlays, args.sets, args.only) == (
        "tiny",
        ["a.toml", "b.toml"],
        ["x=1"],
        ["data"],
    )
    assert cli.parse(["sample", "posttrain", "--prompt", "@home"]).prompt == ["@home"]


def test_plan_then_run_then_plan_again(line: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ingot("plan", "smoke", "@over.toml") == 0
    told = capsys.readouterr().out
    assert re.search(r"train +build +never built", told)
    model = load_recipe("smoke").model
    sizes = f"{model.parameters():,} parameters, {model.parameters(active=True):,} of them a token"
    assert f"  v3 of {sizes}\n" in told
    assert not (line / ".ingot").exists()

    assert ingot("run", "smoke", "@over.toml") == 0
    told = capsys.readouterr().out
    assert told.count("warning: tracking.uri = http://127.0.0.1:9") == 1
    for node in ("data", "train", "judge", "pack.cuda", "pack.ascend"):
        assert re.search(rf"│ {re.escape(node)} +│ built ", told)

    assert ingot("plan", "smoke", "@over.toml", "--set", "pretrain.steps=25", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    decisions = {node["node"]: (node["decision"], node["reasons"]) for node in plan["nodes"]}
    assert decisions["data"] == ("reuse", [])
    assert decisions["train"] == ("build", ["steps: 24 -> 25"])
    assert decisions["judge"] == ("build", ["input checkpoint changed"])

    assert ingot("run", "smoke", "--dry-run", "--from", "judge") == 0
    assert re.search(r"judge +build +asked for by --from", capsys.readouterr().out)
    assert ingot("run", "smoke", "@over.toml") == 0
    assert "│ train       │ reused" in capsys.readouterr().out


def test_a_failed_node_is_one_line_on_stderr_and_exit_1(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ingot("run", "smoke", "@over.toml", "--set", "pretrain.steps=13") == 1
    captured = capsys.readouterr()
    assert captured.err == "ingot: error: train: train was told to fail\n"
    assert re.search(r"judge +│ blocked", captured.out)


def test_a_report_that_falls_short_is_one_line_on_stderr_and_exit_1_also_when_reused(
    line: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @stage(revision=1)
    def judging(config: FakeConfig, work: Workspace) -> Report:
        work.path("report.json").write_text('{"headline": {}}')
        return Report(uri=work.out, headline={"gap": 1}, shortfall="the gap is too large")

    monkeypatch.setattr(asked, "production", lambda recipe: {"judge": judging(FakeConfig())})
    for outcome in ("built", "reused"):
        assert ingot("run", "smoke", "@over.toml") == 1
        captured = capsys.readouterr()
        assert captured.err == "ingot: error: judge: the gap is too large\n"
        assert re.search(rf"judge +│ {outcome}", captured.out)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["run", "tny"], 2, "did you mean 'tiny'"),
        (["run", "smoke", "--set", "pretrain.stps=3"], 2, "did you mean 'steps'"),
        (["plan", "smoke", "--only", "jugde"], 2, "did you mean 'judge'"),
        (
            ["run", "smoke", "--only", "judge"],
            2,
            "data, which is missing (never built)",
        ),
        (["run", "smoke", "--set", "store.url=over.toml/x"], 1, "over.toml is a file"),
        (["why", "nothing", "--recipe", "smoke"], 2, "neither a node nor a stage"),
        (["show", "data", "--recipe", "smoke"], 2, "build it first: ingot run smoke"),
        (["plan", "absent.toml"], 2, "there is no such file in "),
    ],
)
def test_a_mistake_is_one_line_that_names_it(
    line: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    assert ingot(*words) == code
    error = capsys.readouterr().err
    assert error.startswith("ingot: error: ")
    assert message in error
    assert "Traceback" not in error


def test_a_fault_of_ours_is_one_line_too(
    line: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan_module, "load_asked", lambda args: 1 / 0)
    assert ingot("plan", "smoke") == 1
    assert "internal error: ZeroDivisionError" in capsys.readouterr().err
    monkeypatch.setenv("INGOT_DEBUG", "1")
    assert ingot("plan", "smoke") == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_exit_130(line: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "load_asked", stop)
    assert ingot("run", "smoke") == 130


def test_a_run_stopped_by_the_user_says_how_to_go_on(
    line: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @stage(revision=1)
    def stopped(config: FakeConfig, work: Workspace) -> Corpus:
        raise KeyboardInterrupt

    monkeypatch.setattr(asked, "production", lambda recipe: {"stopped": stopped(FakeConfig())})
    assert ingot("run", "smoke", "@over.toml") == 130
    told = capsys.readouterr().out
    assert f"ingot run smoke @{line}/over.toml goes on from it" in told.replace("\n", "")


def test_damage_that_a_selection_relies_on_is_refused_before_the_run(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ingot("run", "smoke", "@over.toml") == 0
    (file,) = (line / ".ingot" / "artifacts" / "train").rglob("weights.bin")
    file.write_text(file.read_text().replace("train", "Train"))
    for verb in ("plan", "run"):
        capsys.readouterr()
        assert ingot(verb, "smoke", "@over.toml", "--only", "judge") == 2
        error = capsys.readouterr().err
        assert "made of train, which is damaged" in error
        assert "run --force train first" in error


def test_a_node_asked_for_and_not_built_is_an_error_with_its_reason(
    line: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(asked, "production", lambda recipe: make_line(data={"differs": True}))
    assert ingot("run", "smoke", "@over.toml") == 0
    capsys.readouterr()
    assert ingot("run", "smoke", "@over.toml", "--force", "data", "--from", "judge") == 1
    error = capsys.readouterr().err
    assert error.startswith("ingot: error: judge: made of train, which is ")
    assert "input corpus rebuilt" in error


def test_one_record_that_cannot_be_read_stops_no_command(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ingot("run", "smoke", "@over.toml") == 0
    bad = line / ".ingot" / "runs" / "99999999-000000.json"
    bad.write_text("{}")
    for words in (["status"], ["show", "train"], ["clean", "--dry-run"], ["plan", "smoke"]):
        capsys.readouterr()
        assert ingot(*words) == 0
        captured = capsys.readouterr()
        assert (captured.out + captured.err).count(f"{bad}: not a readable run record") == 1


def test_a_command_that_assumes_a_recipe_says_which_and_its_store(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ingot("status") == 3
    (told,) = capsys.readouterr().err.splitlines()
    assert told == (
        f"no run is recorded in {line}/.ingot: assuming the recipe tiny and its store "
        f"{line}/.ingot; --recipe names another"
    )
    assert ingot("run", "smoke", "@over.toml", "--only", "data") == 0
    capsys.readouterr()
    assert ingot("status") == 3
    assert ingot("status", "--recipe", "smoke") == 3
    assert capsys.readouterr().err == ""


def test_status_why_and_show_speak_of_the_latest_run(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ingot("run", "smoke", "@over.toml", "--set", "pretrain.steps=25") == 0
    capsys.readouterr()
    assert ingot("status") == 0
    told = capsys.readouterr().out
    assert re.findall(r"^  \S+ +(\S+)", told, re.M) == ["fresh"] * 5
    assert re.search(
        r"^  train +fresh +20\d\d-\d\d-\d\d \d\d:\d\d +\S+ s +\d+ B  loss 0.04$", told, re.M
    )
    assert ingot("status", "--json") == 0
    (_, train, *_) = json.loads(capsys.readouterr().out)["nodes"]
    assert (train["state"], train["figures"], train["reasons"]) == ("fresh", {"loss": 0.04}, [])
    assert train["bytes"] > 0
    assert ingot("status", "--recipe", "smoke") == 3
    told = capsys.readouterr().out
    assert told.startswith(f"smoke in {line}/.ingot\n")
    assert re.search(r"^  train +stale +steps: 25 -> 24$", told, re.M)
    assert ingot("why", "judge", "--recipe", "smoke") == 0
    assert "  train is stale\n    steps: 25 -> 24\n" in capsys.readouterr().out
    assert ingot("show", "train") == 0
    told = capsys.readouterr().out
    assert re.search(r"^  step +25$", told, re.M)
    assert "\ncomputed with device cpu, compute float32, products cpu\n" in told
    assert re.search(r"^  weights\.bin +\d+ bytes$", told, re.M)
    assert "loss by step\n" in told
    assert "verified" not in told
    assert ingot("show", "train", "--verify") == 0
    assert "verified: 1 files" in capsys.readouterr().out


@pytest.mark.parametrize("setting", ["device=cuda", "device=npu", "compute=bfloat16"])
def test_a_device_that_is_not_there_ends_a_run_before_anything_is_built(
    setting: str, line: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backend, "cpu_flags", frozenset)
    assert ingot("run", "smoke", "@over.toml", "--set", f"cluster.{setting}") != 0
    name, _, value = setting.partition("=")
    assert f"cluster.{name} = '{value}': " in capsys.readouterr().err
    assert not list((line / ".ingot").rglob("manifest.json"))
    # What no device is needed for is made all the same.
    made = ingot("run", "smoke", "@over.toml", "--only", "data", "--set", f"cluster.{setting}")
    assert made == 0


def test_pipeline_stages_end_a_run_before_anything_is_built_and_are_noted_by_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    stages = ("--set", "cluster.trainers=4", "--set", "cluster.pp=2")
    assert ingot("plan", "smoke", *stages) == 0
    told = "cluster.pp = 2: pretraining over several pipeline stages is not built yet; set"
    (note,) = [one for one in capsys.readouterr().out.splitlines() if "cluster.pp" in one]
    assert note.startswith(f"  note: a run would end at once: {told}")
    assert ingot("run", "smoke", *stages) == 2
    assert f"error: {told}" in capsys.readouterr().err
    assert not list((tmp_path / ".ingot").rglob("manifest.json"))
    assert ingot("plan", "smoke", "--only", "data", *stages) == 0
    assert "cluster.pp" not in capsys.readouterr().out


def test_status_and_why_tell_what_waits_for_another_node(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ingot("run", "smoke", "@over.toml") == 0
    (lost,) = (line / ".ingot" / "artifacts" / "train").glob("*/g1")
    shutil.rmtree(lost)
    capsys.readouterr()
    assert ingot("status") == 3
    told = capsys.readouterr().out
    assert re.findall(r"^  \S+ +(\S+)", told, re.M) == ["fresh", "missing", *["stale"] * 3]
    assert re.search(r"^  judge +stale +depends on train, which is not up to date$", told, re.M)
    assert ingot("plan", "smoke", "@over.toml") == 0
    assert re.search(r"judge +recheck +reused if train come out as before", capsys.readouterr().out)
    assert ingot("run", "smoke", "@over.toml") == 0
    (file,) = (line / ".ingot" / "artifacts" / "train").rglob("weights.bin")
    file.write_text("x")
    capsys.readouterr()
    assert ingot("why", "judge") == 0
    told = capsys.readouterr().out
    assert told.startswith("judge is stale\n  depends on train, which is not up to date\n")
    assert "  train is damaged\n" in told
    assert ingot("plan", "smoke", "@over.toml") == 1
    told = capsys.readouterr().out
    assert re.search(r"train +refuse +.*weights.bin has 1 bytes", told)
    assert re.search(r"judge +block +made of train, which is not there", told)


def test_what_another_recipe_has_is_pointed_to(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ingot("run", "smoke", "@over.toml") == 0
    assert ingot("run", "tiny", "@over.toml", "--only", "data") == 0
    assert ingot("show", "judge") == 2
    assert "nor a node of tiny that was built" in (told := capsys.readouterr().err)
    assert "; --recipe smoke has one" in told


def test_of_several_values_for_a_field_the_last_is_repeated(line: Path) -> None:
    sets = [word for steps in (25, 26) for word in ("--set", f"pretrain.steps={steps}")]
    assert ingot("run", "smoke", "@over.toml", *sets, "--only", "data") == 0
    args = cli.parse(["import", "elsewhere", "--set", "pretrain.steps=27"])
    args.recipe = None
    invocation = asked.load_asked(args).invocation
    assert invocation.sets == ("pretrain.steps=27",)
    # A table between the two would be overruled by the second alone, and must stay so.
    table = 'pretrain={"steps" = 1}'
    assert asked._last_of_each(("pretrain.steps=25", table, "pretrain.steps=26")) == (
        table,
        "pretrain.steps=26",
    )


def test_status_warns_of_code_that_changed_since(
    line: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ingot("run", "smoke", "@over.toml") == 0
    monkeypatch.setattr(inspect, "source_digest", lambda stage: "another")
    capsys.readouterr()
    assert ingot("status") == 0
    told = capsys.readouterr().out
    assert re.search(
        r"^  train +fresh .*\n +code changed since; --force train rebuilds it$", told, re.M
    )


def test_show_names_a_damaged_file(line: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ingot("run", "smoke", "@over.toml", "--only", "data") == 0
    (file,) = (line / ".ingot").rglob("weights.bin")
    file.write_text("x")
    capsys.readouterr()
    assert ingot("show", str(file.parents[2])) == 0
    assert ingot("show", str(file.parents[2]), "--verify") == 1
    assert "weights.bin has 1 bytes" in capsys.readouterr().err


def test_clean_offers_what_was_superseded_and_never_the_latest_of_a_node(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for steps in (5, 6):
        assert ingot("run", "smoke", "@over.toml", "--set", f"pretrain.steps={steps}") == 0
    failed = ("run", "smoke", "@over.toml", "--set", "pretrain.steps=13", "--only", "train")
    assert ingot(*failed) == 1
    capsys.readouterr()
    assert ingot("clean", "--dry-run") == 0
    told = capsys.readouterr().out
    offered = re.findall(r"remove +(\w+)/\w+/g1 +(.*)$", told, re.M)
    superseded = [(name, "superseded") for name in ("judge", "pack", "pack", "train")]
    assert sorted(offered) == superseded
    reason = "unfinished: a run would continue it, --unfinished deletes it"
    assert re.search(rf"keep +train/\w+/g1 +{reason}$", told, re.M)
    assert ingot("clean") == 0
    assert len(list((line / ".ingot").rglob("resume"))) == 1
    assert ingot("plan", "smoke", "--set", "pretrain.steps=6") == 0
    assert capsys.readouterr().out.count("reuse") == 5
    assert ingot("clean", "--unfinished") == 0
    assert not list((line / ".ingot").rglob("resume"))


def test_clean_keeps_the_latest_even_when_the_records_are_gone(line: Path) -> None:
    assert ingot("run", "smoke", "@over.toml") == 0
    for record in (line / ".ingot" / "runs").iterdir():
        record.unlink()
    args = cli.parse(["clean", "--recipe", "smoke"])
    entries = list(clean.inventory(asked.load_asked(args).store(print), unfinished=True))
    assert {entry.verdict for entry in entries} == {"keep"}


def test_a_port_that_is_taken_is_named_with_the_remedy(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert ingot("ui", "--recipe", "smoke", "--port", str(port)) == 1
    error = capsys.readouterr().err
    assert f"127.0.0.1:{port} is taken" in error
    assert f"--port {port + 1}" in error


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_server_ends_with_the_command_that_started_it(
    tmp_path: Path, ending: signal.Signals
) -> None:
    server = tmp_path / "server"
    server.write_text(
        f"#!/bin/sh\necho $$ > {tmp_path}/pid.draft\nmv {tmp_path}/pid.draft "
        f"{tmp_path}/pid\nexec sleep 60\n"
    )
    server.chmod(0o755)
    code = (
        "import sys, pathlib\n"
        "from pipeline.embedded import serve\n"
        f"sys.executable = {str(server)!r}\n"
        f"sys.exit(serve('sqlite:///x', pathlib.Path({str(tmp_path)!r}), 5999, ready='up'))"
    )
    command = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    pid = tmp_path / "pid"
    deadline = time.monotonic() + 60
    while not pid.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    number = int(pid.read_text())
    command.send_signal(ending)
    assert command.wait(20) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


RUN = """
import sys
from pipeline import cli
from pipeline.verbs import asked
from tests.pipeline.fakes import make_line
asked.production = lambda recipe: make_line(train={"seconds": 60})
sys.exit(cli.main(["run", "smoke", "@over.toml"]))
"""


def test_an_overlay_without_its_sign_is_told_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "smoke", "a.toml"])
    assert ended.value.code == 2
    assert "did you mean @a.toml, which merges a file over the recipe?" in capsys.readouterr().err


def test_a_run_that_a_scheduler_ends_is_one_that_the_user_stopped(line: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", RUN],
        cwd=line,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        deadline = time.monotonic() + 120
        while not list(line.rglob("resume/step.json")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        told = process.communicate(timeout=120)[0]
    assert process.returncode == 130
    assert "goes on from it" in told
    (record,) = Records(mirror_of(str(line / ".ingot")), say=pytest.fail).newest_first()
    assert record.interrupted
    assert {name: one.outcome for name, one in record.outcomes.items()} == {
        "data": "built",
        "train": "failed",
    }


def test_a_run_is_repeated_by_the_command_it_prints() -> None:
    invocation = Invocation("tiny", ("/a/b.toml",), ("pretrain.steps=5",))
    words = asked.command("run", invocation).split()[1:]
    args = cli.parse(words)
    assert Invocation(args.recipe, tuple(args.overlays), tuple(args.sets)) == invocation


@pytest.mark.parametrize(
    ("sets", "served"),
    [
        ((), "ingot ui"),
        (("store.url=s3://bucket/a b",), "ingot ui --set 'store.url=s3://bucket/a b'"),
    ],
)
def test_a_run_ends_with_the_command_that_serves_its_pages(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    sets: tuple[str, ...],
    served: str,
) -> None:
    """Of the store that the run used; a server of MLflow's own serves them without."""
    monkeypatch.chdir(tmp_path)
    words = [word for one in sets for word in ("--set", one)]
    meant = asked.load_asked(cli.parse(["run", "smoke", *words]))
    made = Run("id", "smoke", meant.invocation, {}, 0.0, "/store", {}, tracking_id="1")
    display = Display(Console(width=300))
    for is_embedded in (True, False):
        tracking = SimpleNamespace(
            is_embedded=is_embedded, link=str, landing=lambda: "", registered=()
        )
        run._conclude(made, meant, cast(Any, tracking), display, None)
        out = capsys.readouterr().out
        assert (f"this run: 1 (`{served}` serves these pages)" in out) is is_embedded
    assert tuple(cli.parse(shlex.split(served)[1:]).sets) == sets


def test_selectors_may_be_given_several_times() -> None:
    args = cli.parse(["run", "tiny", "--only", "a", "--only", "b", "--force", "a", "--from", "b"])
    assert asked.selection(args) == Selection(only=("a", "b"), force=("a",), start=("b",))


def test_the_shipped_recipes_name_themselves() -> None:
    assert load_recipe("tiny").name == "tiny"
