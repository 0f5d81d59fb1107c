"""The record in MLflow is whole and true where stores, addresses and variables are odd."""

import json
import re
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from mlflow.tracking import MlflowClient

from configs.errors import ArtifactError, ConfigError, MachineError, StoreError, TrainingError
from configs.masking import masked, without_login
from configs.parallel import StoreConfig, TrackingConfig
from configs.reading import load_recipe
from pipeline import background, embedded
from pipeline.described import beginning, conclusion, version
from pipeline.embedded import schema_lock
from pipeline.graph import Selection, make_graph
from pipeline.landing import ORDER, OUTCOME, VIEW_TAG, landing_page
from pipeline.places import URI_VARIABLE, tracking_uri
from pipeline.plain import figure_metrics, step_metrics
from pipeline.records import Run
from pipeline.tracking import child as child_module
from pipeline.tracking import listener
from pipeline.tracking import server as server_module
from pipeline.tracking.listener import Tracking
from pipeline.tracking.runs import _without_folders, log_figures
from pipeline.tracking.server import REGISTRY_VARIABLE, Server, is_ours, open_server
from stages.artifacts import Checkpoint, Corpus, Report
from stages.contract import Workspace, stage
from stages.plots import PLOTS
from tests.pipeline import test_tracking
from tests.pipeline.fakes import FakeConfig, World, failed, gather, made, make_line, train
from tests.pipeline.test_tracking import child, tracked

# MLflow's own use of SQLAlchemy and of protobuf is behind their deprecations.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("mlflow_variables"),
]

CONFIG = TrackingConfig(timeout_seconds=30)


@pytest.fixture
def world(store_config: StoreConfig, empty_database: Path) -> World:
    """A store in which nothing was recorded yet."""
    world = World(store_config)
    world.store.prepare()
    shutil.copyfile(empty_database, world.store.root / "mlflow.db")
    return world


@stage(revision=1)
def odd_report(
    config: FakeConfig, work: Workspace, *, corpus: Corpus, checkpoint: Checkpoint
) -> Report:
    """A plugin's: no `report.json`, and a figure that bears the name of a setting."""
    work.path("notes.txt").write_text("all is well")
    return Report(uri=work.out, headline={"seeds": 3.0, "recall": 0.5}, key=("recall", "seeds"))


def test_a_plugins_report_is_recorded_whatever_its_figures_are_called(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = gather(FakeConfig())
    checkpoint = train(FakeConfig(), corpus=corpus)
    line = {"data": corpus, "train": checkpoint}
    line["odd"] = odd_report(FakeConfig(), corpus=corpus, checkpoint=checkpoint)
    graph = make_graph(line, world.store.hashes)
    monkeypatch.setattr(world, "graph", lambda: graph)
    run, _ = tracked(world, CONFIG)
    assert world.said == []
    client = MlflowClient(tracking_uri(CONFIG, world.store.root))
    metrics = client.get_run(str(run.tracking_id)).data.metrics
    assert (metrics["odd/seeds"], metrics["odd/recall"]) == (3.0, 0.5)
    assert child(client, run, "odd").data.metrics["figures/seeds"] == 3.0


def test_the_table_of_runs_has_the_order_outcomes_and_figures_of_the_line(world: World) -> None:
    first, tracking = tracked(world, CONFIG)
    tracked(world, CONFIG, judge={"fails": True})
    client = MlflowClient(tracking_uri(CONFIG, world.store.root))
    experiment = client.get_run(str(first.tracking_id)).info.experiment_id
    found = client.search_runs(
        [experiment], f"tags.`{OUTCOME}` != 'reused'", order_by=[f"tags.`{ORDER}` ASC"]
    )
    shown = [(one.info.run_name.split()[0], one.data.tags[OUTCOME]) for one in found]
    assert shown == [
        ("fake", "failed: judge"),
        ("judge", "failed"),
        ("fake", "succeeded"),
        *((name, "built") for name in make_line()),
    ]
    parents = [one for one in found if "mlflow.parentRunId" not in one.data.tags]
    for one in parents:
        assert one.data.metrics["train/loss"] == pytest.approx(1 / 3)
        assert one.data.tags["mlflow.source.name"] == "ingot run fake"
    view = json.loads(client.get_experiment(experiment).tags[VIEW_TAG + "fake"])
    assert view["selectedColumns"][:4] == [
        *("tags.`ingot.outcome`", "tags.`ingot.recipe`"),
        *("metrics.`judge/before_pass_at_1`", "metrics.`judge/after_pass_at_1`"),
    ]
    assert tracking.landing().endswith(
        f"/#/experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey=fake"
    )


def test_a_run_says_what_it_reused_from_where_and_how_to_repeat_it(world: World) -> None:
    first, _ = tracked(world, CONFIG)
    second, _ = tracked(world, CONFIG)
    client = MlflowClient(tracking_uri(CONFIG, world.store.root))
    text = client.get_run(str(second.tracking_id)).data.tags["mlflow.note.content"]
    assert "`ingot run fake`" in text
    for node in second.outcomes:
        row = next(line for line in text.splitlines() if line.startswith(f"| [{node}]("))
        assert str(made(second, node).tracking_id) in row
        assert (
            f"reused from [its build](#/experiments/1/runs/{made(first, node).tracking_id}" in row
        )


def test_a_node_is_shown_to_take_as_long_as_it_took(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However late MLflow was told of it."""
    real = Server.client

    def late(server: Server) -> MlflowClient:
        if not server.is_open:
            time.sleep(2)
        return real(server)

    monkeypatch.setattr(Server, "client", late)
    run, _ = tracked(world, CONFIG, every={"seconds": 0.3})
    client = MlflowClient(tracking_uri(CONFIG, world.store.root))
    for node in run.outcomes:
        info = child(client, run, node).info
        assert 300 <= info.end_time - info.start_time < 1500


def test_a_build_that_goes_on_says_from_where(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[int] = []

    @stage(revision=1)
    def falters(config: FakeConfig, work: Workspace, *, corpus: Corpus) -> Checkpoint:
        checkpoint = train.run(config, work, corpus=corpus)
        attempts.append(1)
        if len(attempts) == 1:
            raise TrainingError("it faltered")
        return checkpoint

    corpus = gather(FakeConfig())
    line = {"data": corpus, "train": falters(FakeConfig(), corpus=corpus)}
    graph = make_graph(line, world.store.hashes)
    monkeypatch.setattr(world, "graph", lambda: graph)
    tracked(world, CONFIG)
    run, _ = tracked(world, CONFIG)
    client = MlflowClient(tracking_uri(CONFIG, world.store.root))
    tags = child(client, run, "train").data.tags
    assert tags["ingot.resumed_from"].startswith(str(world.store.root))
    said = f"went on from the interrupted build in `{tags['ingot.resumed_from']}`"
    assert said in tags["mlflow.note.content"]
    assert "went on" not in child(client, run, "data").data.tags["mlflow.note.content"]


def test_plots_that_cannot_be_drawn_are_one_warning_and_the_rest_is_recorded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    @stage(revision=1)
    def careless(config: FakeConfig, work: Workspace) -> Corpus:
        work.path(PLOTS).write_text('[{"name": "a"}]')
        return gather.run(config, work)

    corpus = careless(FakeConfig())
    line = {"data": corpus, "train": train(FakeConfig(), corpus=corpus)}
    graph = make_graph(line, world.store.hashes)
    monkeypatch.setattr(world, "graph", lambda: graph)
    run, _ = tracked(world, CONFIG)
    (warning,) = world.said
    assert "data: MLflow does not show all of it" in warning
    assert "panels" in warning
    client = MlflowClient(tracking_uri(CONFIG, world.store.root))
    listed = client.list_artifacts(child(client, run, "train").info.run_id)
    assert "metrics.jsonl" in {one.path for one in listed}


def test_no_figure_repeats_the_last_value_of_a_curve(world: World) -> None:
    run, _ = tracked(world, CONFIG)
    client = MlflowClient(tracking_uri(CONFIG, world.store.root))
    metrics = child(client, run, "train").data.metrics
    assert "curves/loss" in metrics
    assert not [name for name in metrics if name.startswith("figures/")]
    assert all(name.count("/") == 1 for name in metrics)


def test_what_is_measured_of_many_parts_is_no_metric() -> None:
    parts = {f"fp8_flushed/part_{number}": 0.5 for number in range(20)}
    record = {"step": 1, "loss": 2.0, "held_out_loss/a b": 3.0, "grad_norm": 1.0} | parts
    assert step_metrics(record) == {
        "curves/loss": 2.0,
        "curves/held_out_loss.a b": 3.0,
        "details/grad_norm": 1.0,
    }
    bounds = figure_metrics({"pass_at_1": 0.5, "pass_at_1_low": 0.4})
    assert bounds == {"figures/pass_at_1": 0.5, "intervals/pass_at_1_low": 0.4}


def test_reuse_points_the_alias_again(world: World) -> None:
    tracked(world, CONFIG)
    tracked(world, CONFIG, pack={"steps": 9})
    client = MlflowClient(tracking_uri(CONFIG, world.store.root))
    assert client.get_model_version_by_alias("ingot-fake", "cuda").version in ("3", 3)
    tracked(world, CONFIG)
    assert client.get_model_version_by_alias("ingot-fake", "cuda").version in ("1", 1)
    assert len(client.search_model_versions("name = 'ingot-fake'")) == 4


def test_a_version_says_where_it_comes_from_and_how_to_load_it(world: World) -> None:
    run, _ = tracked(world, CONFIG)
    client = MlflowClient(tracking_uri(CONFIG, world.store.root))
    text = client.get_model_version_by_alias("ingot-fake", "cuda").description
    assert text is not None
    for node in ("pack.cuda", "judge"):
        assert f"/runs/{made(run, node).tracking_id}" in text
    assert str(run.tracking_id) in text
    assert str(world.files(run, "pack.cuda")) in text
    assert "from_pretrained" in text


def test_a_deleted_experiment_is_restored_and_that_is_said(world: World) -> None:
    first, _ = tracked(world, CONFIG)
    client = MlflowClient(tracking_uri(CONFIG, world.store.root))
    client.delete_experiment(client.get_run(str(first.tracking_id)).info.experiment_id)
    second, _ = tracked(world, CONFIG)
    assert second.tracking_id is not None
    (said,) = world.said
    assert "'ingot' was deleted; it is restored" in said


def test_the_address_in_the_environment_counts_where_the_recipe_names_none(
    store_config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(store_config)
    elsewhere = f"sqlite:///{tmp_path}/elsewhere.db"
    monkeypatch.setenv(URI_VARIABLE, elsewhere)
    monkeypatch.setenv(REGISTRY_VARIABLE, f"sqlite:///{tmp_path}/registry.db")
    run, _ = tracked(world, CONFIG)
    assert len(world.said) == 2
    assert elsewhere in world.said[0]
    assert REGISTRY_VARIABLE in world.said[1]
    client = MlflowClient(elsewhere, registry_uri=elsewhere)
    assert client.get_run(str(run.tracking_id)).info.status == "FINISHED"
    assert client.get_model_version_by_alias("ingot-fake", "cuda")
    assert not (tmp_path / "registry.db").exists()
    assert not (world.store.root / "mlflow.db").exists()
    named = TrackingConfig(uri=f"sqlite:///{tmp_path}/named.db", timeout_seconds=30)
    tracked(world, named)
    assert f"{URI_VARIABLE} is left aside" in world.said[2]


def test_an_address_without_a_scheme_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri.*begins with what it is: http://HOST"):
        load_recipe("smoke", sets=["tracking.uri=server:5000"])
    with pytest.raises(ConfigError, match=r"tracking\.uri.*begins with what it is: http://HOST"):
        load_recipe("smoke", sets=["tracking.uri=htp://server:5000"])
    monkeypatch.setenv(URI_VARIABLE, "mlruns")
    with pytest.raises(ConfigError, match=rf"{URI_VARIABLE}: an address of MLflow"):
        tracking_uri(TrackingConfig(), Path("/s"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:secret@there:5/x", "http://me:***@there:5/x"),
        ("https://secret@there/x", "https://***@there/x"),
        ("https://h/x?access_token=secret&y=1", "https://h/x?access_token=***&y=1"),
        ("https://h/x?y=1&sslpassword=secret", "https://h/x?y=1&sslpassword=***"),
        ("postgresql+psycopg2://u:se/cret@h/db", "postgresql+psycopg2://u:***@h/db"),
        (
            "postgresql://h/db?user=x&password=secret&z=1",
            "postgresql://h/db?user=x&password=***&z=1",
        ),
        ("tracking.uri=http://a:secret@d", "tracking.uri=http://a:***@d"),
        ("http://there:5000/x", "http://there:5000/x"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
        ("data.sources.code.weight=2", "data.sources.code.weight=2"),
    ],
)
def test_no_password_is_shown(text: str, shown: str) -> None:
    assert masked(text) == shown


def test_no_password_reaches_a_warning_or_the_record(world: World) -> None:
    uri = "http://me:secret@127.0.0.1:9"
    run, _ = tracked(world, TrackingConfig(uri=uri, timeout_seconds=1))
    (warning,) = world.said
    assert "http://me:***@127.0.0.1:9" in warning
    assert "secret" not in warning
    for path in world.store.records.folder.iterdir():
        assert "secret" not in path.read_text()
    assert run.succeeded


@pytest.mark.filterwarnings("ignore:Query string argument")
def test_no_password_reaches_the_parameters(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path}/m.db?password=secret"
    run, _ = tracked(world, TrackingConfig(uri=uri, timeout_seconds=30))
    client = MlflowClient(uri)
    opened = client.get_run(str(run.tracking_id))
    assert opened.data.params["tracking.uri"].endswith("m.db?password=***")
    artifacts = Path(opened.info.artifact_uri.removeprefix("file://"))
    texts = [path.read_text() for path in artifacts.rglob("*.json")]
    assert texts and not any("secret" in text for text in texts)


def server(path: Path) -> Server:
    return Server(TrackingConfig(), f"sqlite:///{path}", path.parent, print)


def test_a_damaged_store_is_one_error_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "m.db"
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(MachineError, match=rf"cannot open it .* move {path} away"):
        open_server(server(path))


def test_a_store_of_an_older_mlflow_is_one_error_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "m.db"
    open_server(server(tmp_path / "new.db"))
    # Under another name, as MLflow looks at an address once a process.
    shutil.copyfile(tmp_path / "new.db", path)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    with pytest.raises(MachineError, match=r"mlflow db upgrade 'sqlite:///.*m\.db'"):
        open_server(server(path))


def test_a_lock_that_nobody_gives_back_is_waited_for_no_longer_than_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "LOCK_SECONDS", 0.3)
    uri = f"sqlite:///{tmp_path}/m.db"
    with (
        schema_lock(uri),
        pytest.raises(TimeoutError, match=r"process \d+ held .*m\.db\.lock for more than 0\.3 s"),
        schema_lock(uri),
    ):
        pass


def test_making_the_schema_may_take_longer_than_an_answer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine it takes longer than a short run, and was then given up."""

    @contextmanager
    def slow(uri: str) -> Iterator[None]:
        with schema_lock(uri):
            time.sleep(2)
            yield

    monkeypatch.setattr(server_module, "schema_lock", slow)
    run, _ = tracked(world, TrackingConfig(timeout_seconds=0.5))
    assert world.said == []
    assert run.tracking_id is not None


def test_a_key_of_a_view_may_stand_in_a_link() -> None:
    assert landing_page("http://h/", "1", "tiny").endswith("viewStateShareKey=tiny")
    keys = [landing_page("h", "1", name).rpartition("=")[2] for name in ("a b/c", "模型", "数据")]
    assert all(re.fullmatch(r"[\w-]+", one, re.ASCII) for one in keys)
    assert len(set(keys)) == 3


def test_a_password_in_any_setting_is_recorded_nowhere(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "ftp://me:hunter2@there/*.txt"
    own = f'data.sources.own={{type="files", share=0.1, glob="{secret}"}}'
    recipe = load_recipe("smoke", sets=[own, "data.sources.stdlib.share=0.4"])
    monkeypatch.setattr(test_tracking, "load_recipe", lambda name: recipe)
    run, _ = tracked(world, CONFIG)
    client = MlflowClient(tracking_uri(CONFIG, world.store.root))
    parent = client.get_run(str(run.tracking_id))
    masked_glob = "ftp://me:***@there/*.txt"
    assert parent.data.params["data.sources.own.glob"] == masked_glob
    text = mlflow_text(client, str(run.tracking_id), "recipe.json")
    assert masked_glob in text
    assert "hunter2" not in text


def mlflow_text(client: MlflowClient, run_id: str, name: str) -> str:
    return Path(client.download_artifacts(run_id, name)).read_text()


def test_an_error_does_not_show_a_password(world: World) -> None:
    run = world.run(graph=make_graph({"telling": telling(FakeConfig())}, world.store.hashes))
    assert failed(run, "telling").error == "http://me:***@there: refused"


@stage(revision=1)
def telling(config: FakeConfig, work: Workspace) -> Corpus:
    """Fails with an address in its error."""
    raise TrainingError("http://me:hunter2@there: refused")


def test_a_password_that_was_left_out_of_a_record_is_not_taken_for_one() -> None:
    with pytest.raises(ConfigError, match="its password was left out of the record"):
        tracking_uri(TrackingConfig(uri="http://me:***@there"), Path("/s"))


def test_a_database_that_the_variable_names_is_the_same_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(URI_VARIABLE, "sqlite:///my.db")
    assert tracking_uri(TrackingConfig(), Path("/s")) == f"sqlite:///{tmp_path}/my.db"


def test_a_link_asks_for_no_password_with_a_wrong_one() -> None:
    assert without_login("https://me:secret@there:5/x") == "https://there:5/x"
    assert without_login("https://there:5/x") == "https://there:5/x"


def test_a_hiccup_while_a_run_is_opened_costs_no_setting_and_makes_no_second_run(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, broken = MlflowClient.log_batch, dict.fromkeys(["parent", "child"], True)

    def log_batch(client: MlflowClient, run_id: str, **given: Any) -> None:
        which = "parent" if "ingot.run" in client.get_run(run_id).data.tags else "child"
        if given.get("params") and broken[which]:
            broken[which] = False
            raise ConnectionError("reset by the peer")
        real(client, run_id, **given)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    monkeypatch.setattr(background, "RETRY_SECONDS", 0.1)
    run, _ = tracked(world, CONFIG)
    client = MlflowClient(tracking_uri(CONFIG, world.store.root))
    assert not any(broken.values())
    found = client.search_runs(["1"])
    assert len(found) == 1 + len(run.outcomes)
    assert {one.info.status for one in found} == {"FINISHED"}
    assert all(one.data.params for one in found)


def test_a_damaged_record_of_the_builder_costs_only_the_link(world: World) -> None:
    first, _ = tracked(world, CONFIG)
    (world.store.records.folder / f"{first.id}.json").write_text("{")
    second, _ = tracked(world, CONFIG)
    client = MlflowClient(tracking_uri(CONFIG, world.store.root))
    assert client.get_run(str(second.tracking_id)).info.status == "FINISHED"
    assert child(client, second, "train").info.status == "FINISHED"


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (ValueError("of a plot"), True),
        (ArtifactError("no such sample"), True),
        (MlflowException("no such run", error_code=RESOURCE_DOES_NOT_EXIST), True),
        (MlflowException("API request failed"), False),
        (StoreError("locked"), False),
        (ConnectionError("refused"), False),
        (requests.exceptions.InvalidJSONError("half an answer"), False),
    ],
)
def test_who_does_not_answer_is_told_from_what_was_asked_wrongly(
    error: Exception, ours: bool
) -> None:
    assert is_ours(error) == ours


def test_a_database_that_is_held_is_not_to_be_moved_away(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def held(server: Server) -> MlflowClient:
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(Server, "client", held)
    uri = tracking_uri(CONFIG, world.store.root)
    with pytest.raises(MachineError, match="no other process holds it") as caught:
        open_server(Server(CONFIG, uri, world.store.root, print))
    assert "move" not in str(caught.value)


def test_a_part_of_the_line_adds_its_columns_behind_those_that_are_there(world: World) -> None:
    tracked(world, CONFIG)
    tracked(world, CONFIG, chosen=Selection(only=("train",)), train={"steps": 5})
    client = MlflowClient(tracking_uri(CONFIG, world.store.root))
    columns = json.loads(client.get_experiment("1").tags[VIEW_TAG + "fake"])["selectedColumns"]
    assert columns[2:4] == [
        *("metrics.`judge/before_pass_at_1`", "metrics.`judge/after_pass_at_1`")
    ]


def test_more_figures_than_one_call_takes_are_all_recorded(world: World) -> None:
    uri = tracking_uri(CONFIG, world.store.root)
    client = MlflowClient(uri, registry_uri=uri)
    run = client.create_run(client.create_experiment("many"))
    log_figures(client, run.info.run_id, {f"f{number}": number for number in range(1500)})
    assert len(client.get_run(run.info.run_id).data.metrics) == 1500


def test_words_that_are_too_long_for_mlflow_say_where_they_are_cut(world: World) -> None:
    run = world.run()
    long = {f"{name}-{i}": one for i in range(200) for name, one in run.outcomes.items()}
    text = conclusion(replace(run, outcomes=long), "ingot run", {}, {}, {})
    assert len(text) < 8000
    assert text.endswith("(cut here)")
    assert "Again: ``ingot run a`b``" in beginning(run, "ingot run a`b", {})


def test_the_page_of_a_failed_node_says_why_and_where_to_look(world: World) -> None:
    run, _ = tracked(world, CONFIG, judge={"fails": True})
    client = MlflowClient(tracking_uri(CONFIG, world.store.root))
    note = child(client, run, "judge").data.tags["mlflow.note.content"]
    assert note.startswith("**failed**: judge was told to fail")
    assert "`ingot logs judge`" in note


def test_a_commands_paths_are_shown_as_mlflow_would_cut_them() -> None:
    command = "ingot run /a/b/mine.toml @/c/over.toml --set base=/x/y --set seed=1"
    assert _without_folders(command) == "ingot run mine.toml @over.toml --set y --set seed=1"


def test_a_version_says_how_that_very_version_is_loaded(world: World) -> None:
    uri = tracking_uri(CONFIG, world.store.root)
    words = version("models:/m/3", "cuda", tracking=uri, folder="/f", pages={}, not_copied=None)
    assert f'mlflow.set_tracking_uri("{uri}")' in words
    assert 'load_model("models:/m/3")' in words
    apart = version("models:/m/3", "cuda", tracking=uri, folder="/f", pages={}, not_copied="odd")
    assert "It stays where it is, as odd." in apart


def test_a_run_names_the_models_that_it_delivers(world: World) -> None:
    for _ in range(2):
        _, tracking = tracked(world, CONFIG)
        assert tracking.registered == ("models:/ingot-fake@cuda", "models:/ingot-fake@ascend")


def test_a_page_that_cannot_be_drawn_is_told_by_who_asked_and_costs_no_record(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run: Run) -> Path:
        raise TypeError("nothing to draw")

    real = Tracking.finish
    monkeypatch.setattr(Tracking, "finish", lambda one, run, write: real(one, run, broken))
    run, tracking = tracked(world, CONFIG)
    assert tracking.page is None
    assert world.said == []
    client = MlflowClient(tracking_uri(CONFIG, world.store.root))
    assert client.get_run(str(run.tracking_id)).info.status == "FINISHED"


def test_an_artifact_that_cannot_be_drawn_costs_its_own_page_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: object) -> None:
        raise TypeError("nothing to draw")

    monkeypatch.setattr(listener, "show", broken)
    run, _ = tracked(world, CONFIG)
    assert sorted(world.said) == [
        f"warning: {node}: MLflow does not show all of it: nothing to draw"
        for node in sorted(run.outcomes)
    ]
    client = MlflowClient(tracking_uri(CONFIG, world.store.root))
    assert client.get_model_version_by_alias("ingot-fake", "cuda")


def test_a_counter_that_cannot_be_read_here_is_left_out_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Broken:
        def __init__(self) -> None:
            raise OSError("no such counter")

    whole = len(list(child_module._monitors()))
    monkeypatch.setattr(child_module, "DiskMonitor", Broken)
    assert len(list(child_module._monitors())) == whole - 1 >= 2
