"""A phase goes on from another's model, on its rows from where that ended, in one tokenizer."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.delivery import ExportConfig, ExportSpec
from configs.errors import ConfigError
from stages.artifacts import Checkpoint, Corpus, Report
from stages.contract import Workspace
from stages.data.loop import data
from stages.export.bundle import export
from stages.pretrain import loop
from stages.pretrain.batches import PackedBatches
from tests.conftest import workspace_at
from tests.references import TINY
from tests.stages.bundles import BRIEF, Notebook, make_checkpoint
from tests.stages.bundles import make_corpus as bundle_corpus
from tests.stages.test_data import spec as data_spec
from tests.stages.test_data import text_folder
from tests.stages.training import one_rank, packed_rows, spec, write_corpus

__all__ = ["text_folder"]


@pytest.fixture(autouse=True)
def _one_rank(tmp_path: Path) -> Iterator[None]:
    with one_rank(tmp_path):
        yield


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return write_corpus(tmp_path / "corpus", {"prose": packed_rows(5, seed=1)})


def train(corpus: Corpus, work: Workspace, **given: Any) -> Checkpoint:
    asked = spec(steps=2).model_copy(update={"rows_before": given.pop("rows_before", 0)})
    return loop.pretrain(asked, work, corpus=corpus, **given)


def history(made: Checkpoint) -> Any:
    return json.loads(made.path("history.json").read_text())


def test_training_goes_on_with_the_weights_that_another_phase_ended_with(
    corpus: Corpus, tmp_path: Path
) -> None:
    first = train(corpus, workspace_at(tmp_path / "first", Notebook()))
    second = train(corpus, workspace_at(tmp_path / "second", Notebook()), base=first, rows_before=8)
    ended, begun = history(first)["held_out"], history(second)["held_out"]
    assert (ended["step"][-1], begun["step"][0]) == (2, 0)
    assert begun["held_out_loss"][0] == ended["held_out_loss"][-1]
    assert begun["held_out_loss"][0] != ended["held_out_loss"][0]
    assert (first.sequences_seen, second.sequences_seen) == (8, 16)
    # Without it, weights are drawn anew.
    alone = train(corpus, workspace_at(tmp_path / "alone", Notebook()))
    assert history(alone)["held_out"]["held_out_loss"] == ended["held_out_loss"]


def test_a_phase_reads_on_where_the_one_before_it_ended(corpus: Corpus) -> None:
    folder = str(corpus.path("train"))
    whole = PackedBatches(folder, 4, seed=0)
    later = PackedBatches(folder, 4, seed=0, rows_before=8)
    for step in (1, 2, 3):
        expected = whole.batch(step + 2, rank=0, world=1)["tokens"]
        assert later.batch(step, rank=0, world=1)["tokens"].equal(expected)
    # The second rank's rows too.
    assert later.batch(1, rank=1, world=2)["tokens"].equal(
        whole.batch(3, rank=1, world=2)["tokens"]
    )


def test_a_model_made_otherwise_cannot_be_gone_on_from(corpus: Corpus, tmp_path: Path) -> None:
    first = train(corpus, workspace_at(tmp_path / "first", Notebook()))
    other = first.model_copy(update={"model": TINY.model_copy(update={"hidden_size": 999})})
    with pytest.raises(ConfigError, match="hidden_size = 999 where") as caught:
        train(corpus, workspace_at(tmp_path / "second", Notebook()), base=other)
    assert "use its model, or another checkpoint" in str(caught.value)


def test_a_further_corpus_is_in_the_tokens_of_the_first(text_folder: Path, tmp_path: Path) -> None:
    first = data(data_spec(text_folder), workspace_at(tmp_path / "first", Notebook()))
    work = workspace_at(tmp_path / "second", Notebook())
    sources = {"sums": {"type": "arithmetic", "share": 1.0, "max_problems": 1_000}}
    asked = data_spec(text_folder, sources=sources)
    second = data(asked, work, tokenizer=first)
    theirs, ours = (json.loads(one.path("tokenizer.json").read_text()) for one in (first, second))
    assert ours == theirs
    alone = data(asked, workspace_at(tmp_path / "alone", Notebook()))
    assert json.loads(alone.path("tokenizer.json").read_text()) != theirs
    assert second.vocab_size == first.vocab_size


@pytest.mark.parametrize("shortfall", [None, "after_pass_at_1 = 0.1, which is too low"])
def test_a_bundle_says_that_its_model_fell_short(tmp_path: Path, shortfall: str | None) -> None:
    report = Report(uri="/", headline={}, shortfall=shortfall)
    made = export(
        ExportSpec(seed=1, target="cuda", export=ExportConfig(**(BRIEF | {"variants": ("bf16",)}))),
        workspace_at(tmp_path / "bundle", Notebook()),
        corpus=bundle_corpus(tmp_path / "bundle_corpus"),
        checkpoint=make_checkpoint(tmp_path / "checkpoint"),
        report=report,
    )
    card = made.path("bf16", "README.md").read_text()
    assert made.told() == shortfall
    assert ("did not come to what was asked of it" in card) == (shortfall is not None)
    assert (shortfall or "") in card
