"""The loss on held-out text: what it is, when it is measured, and that training never feels it."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster import checkpoint
from cluster.trainer import build_trainer
from configs.errors import DataError, TrainingError
from configs.model import AnyModelConfig
from configs.train import Fp8Config, IndexerConfig, PretrainSpec
from model.transformer import Transformer
from model.weights.files import load_pretrained
from stages.artifacts import Checkpoint, Corpus
from stages.framing import BOS_ID
from stages.pretrain.held_out_text import HeldOutText, held_out_text
from stages.pretrain.loop import best_measured, loss_at, pretrain
from stages.steps import METRICS, read_metrics
from tests.conftest import Recorder, workspace_at
from tests.model.transformers_twin import transformers_twin
from tests.ranks import on_ranks
from tests.references import TINY, tiny, tiny_v4, tiny_v32
from tests.stages.training import (
    ROW_TOKENS,
    measure_on_rank,
    one_rank,
    packed_rows,
    spec,
    text_of,
    write_corpus,
)

HELD_OUT = {"prose": packed_rows(7, seed=1), "sums": packed_rows(2, seed=2)}


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return write_corpus(tmp_path / "corpus", HELD_OUT)


def trained(
    config: PretrainSpec, folder: Path, corpus: Corpus, recorder: Recorder
) -> tuple[Checkpoint, list[dict[str, Any]], dict[str, Tensor]]:
    """The artifact, the step log, and the final sharded save with its moments."""
    folder.mkdir()
    work = workspace_at(folder, recorder)
    with one_rank(folder):
        made = pretrain(config, work, corpus=corpus)
    save = checkpoint.latest(work.resumable("saves")[0])
    assert save is not None
    return made, read_metrics(work.beside(METRICS)), checkpoint.load_shards(save[0])


def document_by_document(
    logits_of: Callable[[Tensor], Tensor], rows: NDArray[np.int64]
) -> tuple[float, int]:
    """Nats and number of predicted tokens of rows, each piece of a document read by itself."""
    nats, tokens = 0.0, 0
    for row in rows:
        for piece in np.split(row, np.flatnonzero(row == BOS_ID)):
            if len(piece) < 2:
                continue
            logits = logits_of(torch.from_numpy(piece)[None])[0, :-1].double()
            nats -= float(logits.log_softmax(-1)[range(len(piece) - 1), piece[1:]].sum())
            tokens += len(piece) - 1
    return nats, tokens


def by_transformers(weights: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Another implementation's logits, from the weights of a checkpoint."""
    _, theirs = transformers_twin(tiny(num_nextn_predict_layers=0))
    theirs.load_state_dict({name: weights[name] for name in theirs.state_dict()})

    def logits(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = theirs(tokens).logits
        return out

    return logits


def test_the_figures_are_those_of_another_implementation_on_the_same_rows(
    corpus: Corpus, tmp_path: Path, recorder: Recorder
) -> None:
    made, log, _ = trained(spec(), tmp_path / "slot", corpus, recorder)
    measured = {line["step"]: line for line in log if "held_out_loss" in line}
    assert list(measured) == [0, 2, 4]
    saves = tmp_path / "slot" / "000001-test" / "resume" / "saves"
    weights = {
        0: Transformer(TINY).initialize(0).state_dict(),
        2: checkpoint.load_shards(checkpoint.step_folder(saves, 2)),
        4: load_pretrained(made.path()).state_dict(),
    }
    picked = text_of(spec(), corpus).rows
    assert {name: len(rows) for name, rows in picked.items()} == {"prose": 5, "sums": 2}
    for step, state in weights.items():
        logits = by_transformers(state)
        found = {
            name: document_by_document(logits, HELD_OUT[name][list(rows)])
            for name, rows in picked.items()
        }
        for name, (nats, tokens) in found.items():
            assert measured[step][f"held_out_loss/{name}"] == pytest.approx(nats / tokens, rel=2e-5)
        nats, tokens = (sum(column) for column in zip(*found.values(), strict=True))
        assert measured[step]["held_out_loss"] == pytest.approx(nats / tokens, rel=2e-5)


@pytest.mark.parametrize(
    "model",
    [TINY, tiny_v32(), tiny_v4(index_topk=2, num_hash_layers=1)],
    ids=["v3", "v32", "v4"],
)
def test_training_is_the_same_to_the_last_bit_whether_or_not_it_is_measured(
    model: AnyModelConfig, corpus: Corpus, tmp_path: Path, recorder: Recorder
) -> None:
    changes: dict[str, Any] = {
        "precision": "fp8",
        "fp8": Fp8Config(telemetry_every_steps=1),
        "indexer": IndexerConfig(dense_steps=2),
    }
    runs = []
    for every in (0, 1):
        torch.manual_seed(0)
        config = spec(model, evaluate_every_steps=every, **changes)
        _, log, save = trained(config, tmp_path / f"every-{every}", corpus, recorder)
        runs.append((log, save, torch.get_rng_state()))
    (plain, weights, random), (told, measured_weights, measured_random) = runs
    assert [line["step"] for line in told if "held_out_loss" in line] == [0, 1, 2, 3, 4]
    stripped = [
        {name: value for name, value in line.items() if not name.startswith("held_out_")}
        for line in told[1:]
    ]
    for line in [*plain, *stripped]:
        del line["tokens_per_second"], line["mfu"]
        # How quick the machine was found to be.
        line.pop("tags", {}).pop("mfu.peak", None)
    assert any(name.startswith("fp8_flushed") for name in plain[0])
    assert stripped == plain
    assert weights.keys() == measured_weights.keys()
    assert all(torch.equal(measured_weights[name], weights[name]) for name in weights)
    assert torch.equal(measured_random, random)


def test_a_measurement_is_heard_by_no_telemetry(corpus: Corpus) -> None:
    config = spec(precision="fp8")
    trainer = build_trainer(
        TINY,
        optim=config.pretrain.optim,
        balance=config.pretrain.balance,
        precision="fp8",
        seed=0,
    )
    tokens = {"tokens": torch.from_numpy(HELD_OUT["prose"])}
    trainer.forward_backward(tokens, loss_at(config.pretrain, 1), counting=True)

    def heard() -> tuple[Any, ...]:
        recorder = trainer.numerics.recorder
        # What the trainer has added up.
        loads = trainer.load_LE.tolist()
        return dict(trainer.fp8_tallies()), recorder.watching, len(recorder._scales), loads

    before = heard()
    assert before[0]
    assert any(map(any, before[3]))
    text = text_of(config, corpus)
    trainer.measure(text.batches(rank=0, world=1), partial(text.sums, step=1))
    assert heard() == before


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(corpus: Corpus, tmp_path: Path) -> None:
    """Nine rows do not divide over the passes, nor over the ranks."""
    with one_rank(tmp_path):
        alone = measure_on_rank(corpus)
    pair = on_ranks(2, tmp_path / "ranks", measure_on_rank, corpus)
    assert pair[0] == pair[1] == pytest.approx(alone, rel=1e-5)
    # Counted from the rows: what is no begin-of-text, but for each row's first token.
    tokens = {name: int((rows[:, 1:] != BOS_ID).sum()) for name, rows in HELD_OUT.items()}
    assert {name: alone[f"targets/{name}"] for name in tokens} == tokens
    total = sum(alone[f"held_out_loss/{name}"] * count for name, count in tokens.items())
    assert alone["held_out_loss"] == pytest.approx(total / sum(tokens.values()), rel=1e-12)


@pytest.mark.parametrize(("world", "batch"), [(1, 4), (2, 4), (4, 4), (2, 64), (4, 8)])
def test_ranks_share_the_rows_evenly_and_read_each_once(
    corpus: Corpus, world: int, batch: int
) -> None:
    text = text_of(spec(batch_sequences=batch, evaluate_rows=7), corpus)
    shares = [list(text.batches(rank=rank, world=world)) for rank in range(world)]
    sizes = {tuple(len(part["tokens"]) for part in share) for share in shares}
    assert len(sizes) == 1
    assert world * max(*sizes.pop(), 0) <= batch + world - 1
    seen: dict[int, list[list[int]]] = {-1: [], 0: [], 1: []}
    for share in shares:
        for part in share:
            for source, row in zip(part["source"].tolist(), part["tokens"].tolist(), strict=True):
                seen[source].append(row)
    for number, name in enumerate(("prose", "sums")):
        assert sorted(seen[number]) == sorted(HELD_OUT[name].tolist())
    assert all(row == [BOS_ID] * ROW_TOKENS for row in seen[-1])


def test_a_pass_has_no_more_rows_than_a_part_of_a_step(corpus: Corpus) -> None:
    config = spec(batch_sequences=8, evaluate_rows=7)
    found = held_out_text(config, corpus, partial(loss_at, config.pretrain), micro_batches=4)
    assert found is not None
    assert {len(part["tokens"]) for part in found.batches(rank=0, world=1)} == {2}


def test_the_rows_are_drawn_by_the_seed_from_those_with_something_to_predict(
    tmp_path: Path,
) -> None:
    rows = packed_rows(40, seed=3)
    rows[[3, 39], 1:] = BOS_ID
    corpus = write_corpus(tmp_path, {"prose": rows})
    picks = [text_of(spec(seed=seed), corpus).rows["prose"] for seed in (0, 0, 1)]
    assert picks[0] == picks[1] != picks[2]
    assert len(set(picks[0])) == 5
    every = text_of(spec(evaluate_rows=99), corpus).rows["prose"]
    assert every == tuple(number for number in range(40) if number not in (3, 39))


def test_it_is_measured_before_the_first_step_at_the_interval_and_after_the_last(
    corpus: Corpus,
) -> None:
    text = text_of(spec(steps=10, evaluate_every_steps=4), corpus)
    assert [step for step in range(11) if text.due(step)] == [0, 4, 8, 10]
    never = spec(evaluate_every_steps=0)
    assert held_out_text(never, corpus, partial(loss_at, never.pretrain)) is None


@pytest.mark.parametrize("sources", [{}, {"prose": np.full((2, ROW_TOKENS), BOS_ID)}])
def test_a_corpus_with_nothing_to_measure_is_refused(
    sources: dict[str, NDArray[np.int64]], tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path, sources)
    with pytest.raises(DataError, match=r"pretrain\.evaluate_every_steps = 2; raise"):
        held_out_text(spec(), corpus, partial(loss_at, spec().pretrain))


def test_the_best_step_is_marked_and_told(
    corpus: Corpus, tmp_path: Path, recorder: Recorder
) -> None:
    # So high a rate undoes what the first steps learnt.
    config = spec(steps=6, evaluate_every_steps=1, optim={"learning_rate": 0.3})
    made, log, _ = trained(config, tmp_path / "slot", corpus, recorder)
    losses = [line["held_out_loss"] for line in log]
    best = losses.index(min(losses))
    assert best < 6
    assert made.best_step == best
    told = f"loss on held-out text {losses[-1]:.4f} nats a token after the last step; it was lowest"
    assert recorder.notes[-1] == f"{told} after step {best}: {losses[best]:.4f}"
    assert [step for step, _ in recorder.logged] == list(range(7))
    history = json.loads(made.path("history.json").read_text())
    assert history["held_out"]["held_out_loss"] == losses
    assert history["held_out"]["step"] == list(range(7))
    assert history["step"] == list(range(1, 7))
    # Of equal ones the first.
    records = [{"step": step, "held_out_loss": 1.0} for step in (0, 5)]
    assert best_measured(records) == records[0]
    assert best_measured([{"step": 1, "loss": 1.0}]) is None


def test_a_loss_that_is_not_finite_ends_training(
    corpus: Corpus, tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HeldOutText, "figures", lambda *_: {"held_out_loss": float("nan")})
    with pytest.raises(TrainingError, match="after step 0, not finite on held-out text"):
        trained(spec(), tmp_path / "slot", corpus, recorder)
