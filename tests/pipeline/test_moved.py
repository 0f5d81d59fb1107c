"""A store that was moved or copied is whole where it lies, and leaves its original alone."""

import hashlib
import json
import re
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from mlflow.tracking import MlflowClient

from configs.errors import StoreError
from configs.parallel import StoreConfig, TrackingConfig
from configs.reading import load_recipe
from configs.recipe import Recipe
from pipeline import cli
from pipeline.places import tracking_uri
from pipeline.store import STORE, Store
from pipeline.verbs import asked
from stages.contract import Planned
from stages.manifest import FORMAT, MANIFEST, verify
from tests.pipeline.fakes import World, make_line, outcomes
from tests.pipeline.test_tracking import tracked

# MLflow's own use of SQLAlchemy and of protobuf is behind their deprecations.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("mlflow_variables"),
]

CONFIG = TrackingConfig(timeout_seconds=30)


def world_at(folder: Path) -> World:
    return World(StoreConfig(url=str(folder), min_free_bytes=0))


def contents(folder: Path) -> dict[str, str]:
    """Every file below `folder` by its content."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def locations(store: Path) -> Iterator[str]:
    """Every address of files that MLflow gives for a store, but for its own empty experiment."""
    client = MlflowClient(tracking_uri(CONFIG, store))
    experiments = [one for one in client.search_experiments() if one.name != "Default"]
    for experiment in experiments:
        yield experiment.artifact_location
    for one in client.search_runs([experiment.experiment_id for experiment in experiments]):
        yield one.info.artifact_uri


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which the line was built once, with MLflow's records inside."""
    folder = tmp_path_factory.mktemp("original") / "store"
    tracked(world_at(folder), CONFIG)
    return folder


@pytest.mark.parametrize("name", ["x%20y", "x?y", "x#y"])
def test_mlflow_keeps_its_records_in_a_store_whose_path_looks_like_an_address(
    tmp_path: Path, name: str
) -> None:
    store = tmp_path / name / "store"
    run, _ = tracked(world_at(store), CONFIG)
    assert run.tracking_id is not None
    assert (store / "mlflow.db").is_file()
    assert set(locations(store)) != set()
    assert list((store / "mlflow-artifacts").rglob("recipe.json"))
    assert [path for path in tmp_path.rglob("*.db") if path.parent != store] == []
    moved = tmp_path / f"{name}%3F" / "store"
    shutil.copytree(store, moved)
    tracked(world_at(moved), CONFIG)
    assert all(f"/{name}/" not in unquote(place) for place in locations(moved))


def test_a_copy_reuses_all_and_writes_nothing_into_its_original(
    original: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(original, copy)
    before = contents(original)
    world = world_at(copy)
    again, _ = tracked(world, CONFIG)
    assert set(outcomes(again).values()) == {"reused"}
    changed, _ = tracked(world, CONFIG, train={"steps": 4})
    assert outcomes(changed)["train"] == "built"
    assert world.said == []
    assert contents(original) == before
    for node in changed.outcomes:
        made = world.generation(changed, node)
        assert made.is_relative_to(copy)
        verify(str(made))
    latest = world.store.records.latest_artifacts().values()
    assert all(path.is_relative_to(copy) for path in latest)


def test_the_runs_of_a_copy_keep_their_plots_beside_it(original: Path, tmp_path: Path) -> None:
    copy = tmp_path / "a copy with spaces"
    shutil.copytree(original, copy)
    theirs = set(locations(original))
    tracked(world_at(copy), CONFIG)
    found = set(locations(copy))
    assert all(one.startswith(original.as_uri()) for one in theirs)
    assert all(one.startswith(copy.as_uri()) for one in found)
    assert set(locations(original)) == theirs
    # What the original drew is found in the copy, also once the original is gone.
    client = MlflowClient(tracking_uri(CONFIG, copy))
    plots = [
        file.path
        for one in client.search_runs(["1"])
        for file in client.list_artifacts(one.info.run_id, "plots")
    ]
    assert "plots/loss.png" in plots


def naming(database: Path, text: str) -> set[tuple[str, str]]:
    """Tables and columns of a database in which some value holds `text`."""
    found = set()
    with closing(sqlite3.connect(database)) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        for (table,) in tables.fetchall():
            for _, column, *_ in connection.execute(f'PRAGMA table_info("{table}")').fetchall():
                query = f'SELECT 1 FROM "{table}" WHERE instr(CAST("{column}" AS TEXT), ?) LIMIT 1'
                if connection.execute(query, (text,)).fetchone():
                    found.add((table, column))
    return found


def test_no_row_of_a_copys_database_leads_to_its_original(original: Path, tmp_path: Path) -> None:
    """MLflow keeps addresses of runs, models and their versions in tables of its own."""
    copy = tmp_path / "copy"
    shutil.copytree(original, copy)
    places = naming(copy / "mlflow.db", str(original))
    assert {table for table, _ in places} >= {"runs", "logged_models", "model_versions"}
    tracked(world_at(copy), CONFIG)
    assert naming(copy / "mlflow.db", str(original)) == set()
    assert naming(copy / "mlflow.db", str(copy)) == places


def test_nothing_in_a_store_but_what_is_told_of_the_machine_names_its_place(
    original: Path, tmp_path: Path
) -> None:
    """Records and manifests find each other wherever the store lies."""
    manifests, runs = list(original.rglob(MANIFEST)), list((original / "runs").glob("*.json"))
    assert len(manifests) >= 5 and len(runs) == 1
    for path in (*manifests, *runs):
        record = json.loads(path.read_text())
        for known in ("provenance", "store_root", "process"):
            record.pop(known, None)
        assert str(original) not in json.dumps(record), path


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with a recipe of their own, and the fake line in place of the real one."""

    def fake(recipe: Recipe) -> dict[str, Planned[Any]]:
        return make_line(train={"steps": recipe.pretraining["pretrain"].steps})

    monkeypatch.setattr(asked, "production", fake)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "over.toml").write_text(
        '[tracking]\nuri = "http://127.0.0.1:9"\n[pretrain]\nsteps = 27\n'
    )
    return folder


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_commands_mean_what_lies_in_the_folder_where_they_are_given(
    line: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    assert cli.main(["run", "smoke", "@over.toml"]) == 0
    there = line.with_name("there")
    (shutil.move if how == "moved" else shutil.copytree)(line, there)
    monkeypatch.chdir(there)
    if how == "copied":
        # The copy's own overlay counts, and what lies in the original is not looked at.
        shutil.rmtree(line / ".ingot" / "artifacts")
    capsys.readouterr()
    assert cli.main(["status"]) == 0
    assert re.findall(r"^  \S+ +(\S+)", capsys.readouterr().out, re.M) == ["fresh"] * 5
    assert cli.main(["show", "train"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^  step +27$", told, re.M)
    assert str(there) in told
    assert str(line) + "/" not in told
    assert cli.main(["run", "smoke", "@over.toml"]) == 0
    assert "built" not in re.sub(r"built by", "", capsys.readouterr().out).replace("reused", "")


def test_a_store_of_the_first_format_is_refused_with_a_remedy(tmp_path: Path) -> None:
    generation = tmp_path / "artifacts" / "data" / "0123456789abcdef" / "g1"
    generation.mkdir(parents=True)
    (generation / MANIFEST).write_text('{"kind": "corpus"}')
    with pytest.raises(StoreError) as caught:
        Store(StoreConfig(url=str(tmp_path)), say=print)
    told = str(caught.value)
    assert told.startswith(f"store.url = {tmp_path}: holds artifacts of format 1")
    assert "name another folder in store.url, or delete this one" in told
    assert (generation / MANIFEST).exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (json.dumps({"format": FORMAT + 1}), f"{STORE} says format {FORMAT + 1}"),
        ("{}", f"{STORE} cannot be read (KeyError"),
        ("format 2", f"{STORE} cannot be read (JSONDecodeError"),
        ("[2]", f"{STORE} cannot be read (TypeError"),
    ],
)
def test_a_store_whose_format_is_not_ours_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / STORE).write_text(text)
    with pytest.raises(StoreError) as caught:
        Store(StoreConfig(url=str(tmp_path)), say=print)
    assert told in str(caught.value)
    assert f"format {FORMAT}" in str(caught.value) or "cannot be read" in str(caught.value)


def test_a_store_says_its_format_before_anything_lies_in_it(tmp_path: Path) -> None:
    world = world_at(tmp_path / "store")
    assert not (tmp_path / "store").exists()
    world.store.prepare()
    assert json.loads((tmp_path / "store" / STORE).read_text()) == {"format": FORMAT}
    assert world_at(tmp_path / "store").store.root == tmp_path / "store"
    assert load_recipe("smoke").store.url == ".ingot"
