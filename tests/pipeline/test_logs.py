"""What workers print is kept, shown, and told of where a node fails."""

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.output import Output
from configs.errors import MachineError
from configs.recipe import Recipe
from pipeline import cli
from pipeline.verbs import asked
from stages.artifacts import Corpus
from stages.contract import Planned, Workspace, stage
from tests.pipeline.fakes import FakeConfig, gather

# MLflow's own use of SQLAlchemy is behind its deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

WAIT_SECONDS = 30.0


@stage(revision=1)
def speak(config: FakeConfig, work: Workspace) -> Corpus:
    """Two workers say a line; one says another once `diary` is there; then one may die."""
    output = Output(str(work.logs), "trainer")
    work.logs.mkdir()
    for rank in (0, 1):
        output.path(rank).write_text(f"hello from {rank}\n")
    deadline = time.monotonic() + WAIT_SECONDS
    while config.diary and not Path(config.diary).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    with output.path(1).open("a") as file:
        file.write("the last words")
    if config.fails:
        died = MachineError("trainer 1 died: killed")
        died.add_note(output.tail(1))
        raise MachineError("trainers died too often") from died
    return gather.run(FakeConfig(), work)


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder whose recipe is `speak`, which fails for seed 1 and waits for seed 2."""

    def fake(recipe: Recipe) -> dict[str, Planned[Any]]:
        wait = str(tmp_path / "go") if recipe.seed == 2 else ""
        config = FakeConfig(seed=recipe.seed, fails=recipe.seed == 1, diary=wait)
        return {"speak": speak(config), "data": gather(FakeConfig())}

    monkeypatch.setattr(asked, "production", fake)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "over.toml").write_text('[tracking]\nuri = "http://127.0.0.1:9"\n')
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    return tmp_path


def ingot(*words: str) -> int:
    return cli.main(words)


ALL = "trainer-0 | hello from 0\ntrainer-1 | hello from 1\ntrainer-1 | the last words\n"


def test_the_output_of_a_committed_node_is_shown_and_no_part_of_it(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ingot("run", "smoke", "@over.toml") == 0
    capsys.readouterr()
    assert ingot("logs", "speak") == 0
    assert capsys.readouterr().out == ALL
    assert ingot("logs", "speak", "--rank", "1") == 0
    assert capsys.readouterr().out == "hello from 1\nthe last words\n"
    assert ingot("logs", "speak", "-f") == 0
    assert capsys.readouterr().out == ALL
    (manifest,) = line.glob(".ingot/artifacts/speak/*/g1/manifest.json")
    assert list(json.loads(manifest.read_text())["files"]) == ["weights.bin"]
    assert ingot("logs", str(manifest.parent), "--rank", "0") == 0
    assert capsys.readouterr().out == "hello from 0\n"
    assert ingot("show", "speak", "--verify") == 0
    # The recipe's file is gone, the record is not.
    (line / "over.toml").unlink()
    capsys.readouterr()
    assert ingot("logs", "speak") == 0
    assert capsys.readouterr().out == ALL


def test_a_failed_node_tells_the_last_words_of_its_worker(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ingot("run", "smoke", "@over.toml", "--set", "seed=1") == 1
    told = capsys.readouterr().err
    assert "ingot: error: speak: trainers died too often\nthe last lines of " in told
    assert "trainer-1.log:\n  hello from 1\n  the last words\n" in told
    (record,) = line.glob(".ingot/runs/*.json")
    outcome = json.loads(record.read_text())["outcomes"]["speak"]
    assert outcome["error"] == "trainers died too often"
    assert outcome["output"].endswith("  hello from 1\n  the last words")
    assert ingot("logs", "speak") == 0
    assert capsys.readouterr().out == ALL
    # The recipe as it is now is meant: this one's node was never begun.
    assert ingot("logs", "speak", "--set", "seed=3") == 2
    assert "'speak' is neither a finished artifact's folder nor a node" in capsys.readouterr().err


def test_a_running_node_is_followed_to_its_end(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    words = ("run", "smoke", "@over.toml", "--set", "seed=2", "--only", "speak")
    running = threading.Thread(target=lambda: codes.append(ingot(*words)))
    running.start()
    said = threading.Thread(target=lambda: codes.append(ingot("logs", "speak", "-f")))
    deadline = time.monotonic() + WAIT_SECONDS
    while not list(line.glob(".ingot/artifacts/speak/*/g1/*/logs/trainer-1.log")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    capsys.readouterr()
    said.start()
    time.sleep(1.5)
    shown = capsys.readouterr().out
    assert "trainer-0 | hello from 0\ntrainer-1 | hello from 1\n" in shown
    assert said.is_alive()
    (line / "go").touch()
    said.join(WAIT_SECONDS)
    running.join(WAIT_SECONDS)
    assert codes == [0, 0]
    assert "trainer-1 | the last words\n" in capsys.readouterr().out


def test_what_is_not_there_is_told(line: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ingot("run", "smoke", "@over.toml") == 0
    capsys.readouterr()
    assert ingot("logs", "data") == 1
    assert "data: no worker has printed anything into " in capsys.readouterr().err
    assert ingot("logs", "speak", "--rank", "7") == 2
    assert "--rank 7: speak has workers of ranks 0, 1; choose one" in capsys.readouterr().err
    assert ingot("logs", "speek") == 2
    assert "did you mean 'speak'?" in capsys.readouterr().err
