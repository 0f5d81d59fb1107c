"""A recipe's relative paths mean the user's folder, wherever the process goes."""

from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from configs.data import EvaluationSet, FilesSource, ProblemsSource
from configs.parallel import TrackingConfig
from configs.reading import load_recipe
from pipeline.places import absolute, sqlite_path, tracking_uri

BASE = Path("/home/user")


def test_every_path_of_the_users_becomes_absolute() -> None:
    recipe = load_recipe("smoke", sets=["tracking.uri='sqlite:///runs.db'"])
    mine = {"mine": FilesSource(share=0.5, glob="books/*.txt"), **recipe.data.sources}
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": mine})})
    settled = absolute(recipe, BASE)
    assert settled.store.url == "/home/user/.ingot"
    assert settled.tracking.uri == "sqlite:////home/user/runs.db"
    assert settled.base is None
    source = settled.data.sources["mine"]
    assert isinstance(source, FilesSource)
    assert source.glob == "/home/user/books/*.txt"
    assert absolute(settled, Path("/elsewhere")) == settled


def test_a_base_and_a_tokenizer_become_absolute() -> None:
    sets = ["base='models/v3'", "data.tokenizer.file='tok.json'"]
    settled = absolute(load_recipe("smoke", sets=sets), BASE)
    assert settled.base == "/home/user/models/v3"
    assert settled.data.tokenizer.file == "/home/user/tok.json"
    assert absolute(settled, Path("/elsewhere")) == settled


def test_the_files_of_every_corpus_become_absolute() -> None:
    corpus = "{train_tokens=5000, sources.own={type='files', share=1.0, glob='more/*.txt'}}"
    recipe = load_recipe("smoke", sets=[f"data.corpora.more={corpus}"])
    source = absolute(recipe, BASE).data.corpora["more"].sources["own"]
    assert isinstance(source, FilesSource)
    assert source.glob == "/home/user/more/*.txt"


@pytest.mark.parametrize(
    ("corpus", "own"), [("data", ("stdlib", "arithmetic")), ("data.corpora.more", ("one",))]
)
def test_the_files_of_problems_and_evaluations_become_absolute(
    corpus: str, own: tuple[str, ...]
) -> None:
    asked = "{type='problems', share=1.0, glob='p/*.jsonl', held_out_glob='h/*.jsonl'}"
    sets = [
        "data.corpora.more={train_tokens=5000, sources.one={type='stdlib', share=1.0}}",
        *(f"{corpus}.sources.{name}.share=0" for name in own),
        f"{corpus}.sources.asked={asked}",
        f"{corpus}.evaluations.exam={{glob='exam/*.jsonl'}}",
        f"{corpus}.evaluations.far={{glob='s3://bucket/*.jsonl'}}",
    ]
    settled = absolute(load_recipe("smoke", sets=sets), BASE)
    found = settled.data if corpus == "data" else settled.data.corpora["more"]
    problems = ProblemsSource(
        share=1.0, glob="/home/user/p/*.jsonl", held_out_glob="/home/user/h/*.jsonl"
    )
    assert found.sources == {"asked": problems}
    assert found.evaluations == {
        "exam": EvaluationSet(glob="/home/user/exam/*.jsonl"),
        "far": EvaluationSet(glob="s3://bucket/*.jsonl"),
    }
    assert absolute(settled, Path("/elsewhere")) == settled


def test_problems_without_held_out_files_stay_without() -> None:
    asked = "{type='problems', share=1.0, glob='p/*.jsonl'}"
    corpus = f"{{train_tokens=5000, sources.own={asked}}}"
    recipe = load_recipe("smoke", sets=[f"data.corpora.more={corpus}"])
    sources = absolute(recipe, BASE).data.corpora["more"].sources
    assert sources == {"own": ProblemsSource(share=1.0, glob="/home/user/p/*.jsonl")}


@pytest.mark.parametrize("name", ["~nobody-of-this-name", "a[1]", "x::y", "w?", "n#1", "größe"])
def test_a_folder_of_any_name_becomes_absolute(name: str) -> None:
    recipe = load_recipe("smoke", sets=[f"store.url='{name}/s'", f"base='{name}'"])
    settled = absolute(recipe, BASE / name)
    assert settled.store.url == f"/home/user/{name}/{name}/s"
    assert settled.base == f"/home/user/{name}/{name}"


def test_addresses_and_absolute_paths_stay() -> None:
    recipe = load_recipe("smoke", sets=["tracking.uri='http://host:1'", "store.url='/data/store'"])
    settled = absolute(recipe, BASE)
    assert settled.tracking.uri == "http://host:1"
    assert settled.store.url == "/data/store"


@pytest.mark.parametrize("name", ["x%20y", "100%", "x?y", "x#y", "x y", "größe"])
def test_the_address_of_a_database_leads_to_its_file(name: str) -> None:
    """As SQLAlchemy reads it, by which MLflow opens it."""
    uri = tracking_uri(TrackingConfig(), Path("/home", name))
    assert make_url(uri).database == f"/home/{name}/mlflow.db"
    assert dict(make_url(uri).query) == {}
    assert sqlite_path(uri) == Path("/home", name, "mlflow.db")
    recipe = load_recipe("smoke", sets=["tracking.uri='sqlite:///my%20runs.db?timeout=5'"])
    settled = absolute(recipe, Path("/home", name))
    assert settled.tracking.uri is not None
    assert make_url(settled.tracking.uri).database == f"/home/{name}/my runs.db"
    assert dict(make_url(settled.tracking.uri).query) == {"timeout": "5"}
    assert absolute(settled, Path("/elsewhere")) == settled


def test_without_an_address_tracking_lies_in_the_store() -> None:
    assert tracking_uri(TrackingConfig(), Path("/s")) == "sqlite:////s/mlflow.db"
    assert tracking_uri(TrackingConfig(uri="http://h"), Path("/s")) == "http://h"
