"""Pretraining: the loss by a loop over positions, batches by their step, the rate by its config."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor

from cluster import checkpoint
from cluster.figures import read
from cluster.fit import FitJob
from configs.data import TokenizerConfig
from configs.errors import ConfigError, MachineError
from configs.model import ModelConfig
from configs.parallel import ClusterConfig
from configs.rl import PosttrainConfig, PosttrainSpec
from configs.train import Fp8Config, IndexerConfig, OptimConfig, PretrainConfig, PretrainSpec
from model.balance import sequence_balance_loss
from model.moe import Gate, HashGate
from model.passes import IndexerPhase
from model.transformer import Transformer
from stages.artifacts import Checkpoint, Corpus
from stages.contract import Workspace
from stages.data.tokenizer import train_tokenizer
from stages.framing import BOS_ID, EOS_ID
from stages.posttrain.loop import posttrain
from stages.pretrain import loop
from stages.pretrain.batches import PackedBatches
from stages.pretrain.loop import learning_rate, loss_at, pretrain, vocabulary
from stages.pretrain.objective import PretrainLoss, scored_targets
from stages.segments import segments_of
from stages.shards import consumed_rows, write_rows
from stages.telemetry import MetricsFile
from tests.conftest import Recorder
from tests.losses import part_of
from tests.references import TINY, random_model, random_tokens, tiny_v4, tiny_v32

LOSS = PretrainLoss(mtp_weight=0.3, balance_weight=0.05, attend_across_documents=False)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """An empty one, of which only sizes are read."""
    return Corpus(
        uri=str(tmp_path),
        train_rows=8,
        held_out_rows={},
        sequence_tokens=16,
        vocab_size=TINY.vocab_size,
        train_problems=0,
        held_out_problems=0,
    )


SPEC = PretrainSpec(
    seed=0, model=TINY, pretrain=PretrainConfig(steps=9, warmup_steps=1, evaluate_every_steps=0)
)


def test_a_backend_that_cannot_run_here_is_refused_before_any_worker_starts(
    corpus: Corpus, make_workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "fit", lambda *_: pytest.fail("workers were started"))
    work = make_workspace(machines=ClusterConfig(fp8_backend="triton"))
    told = r"cluster\.fp8_backend = 'triton' cannot compute on cpu: it is for CUDA devices"
    with pytest.raises(MachineError, match=told):
        pretrain(SPEC, work, corpus=corpus)


def test_the_table_of_parts_is_held_against_the_model_that_comes_in(
    corpus: Corpus, workspace: Workspace
) -> None:
    """An imported model is not the recipe's."""
    parts = Fp8Config(
        attention="high", dense_ffn="high", shared_experts="high", routed_experts="high"
    )
    rl = PosttrainConfig(steps=1, precision="fp8", fp8=parts)
    base = Checkpoint(uri=corpus.uri, step=1, sequences_seen=0, model=TINY, final_loss=None)
    with pytest.raises(ConfigError, match="sets every part of this model"):
        posttrain(
            PosttrainSpec(seed=0, posttrain=rl),
            workspace,
            corpus=corpus.model_copy(update={"train_problems": 1}),
            base=base,
        )


def test_steps_that_no_save_holds_are_not_shown_as_done(
    corpus: Corpus, workspace: Workspace, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MetricsFile(workspace.beside())
    for step in (1, 2, 3, 4):
        log.append({"loss": 9.0}, step=step)
    save = workspace.resumable("saves", "step-00000002")[0]
    checkpoint.save_shard(save, {"any": torch.ones(1)}, {}, rank=0, world=1)
    checkpoint.mark_complete(save, {"step": 2})

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain(SPEC, workspace, corpus=corpus)
    assert [step for step, _ in recorder.logged] == [1, 2]


def test_workers_take_rows_in_the_parts_that_are_asked_for(
    corpus: Corpus, make_workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[FitJob] = []

    def interrupted(job: FitJob, *_: object) -> None:
        jobs.append(job)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "fit", interrupted)
    asked: list[int] = []
    monkeypatch.setattr(
        loop, "held_out_text", lambda *_, micro_batches: asked.append(micro_batches)
    )
    for machines in (ClusterConfig(), ClusterConfig(micro_batches=2, ep=1)):
        with pytest.raises(KeyboardInterrupt):
            pretrain(SPEC, make_workspace(machines=machines), corpus=corpus)
    assert [job.micro_batches for job in jobs] == asked == [1, 2]
    assert "raise cluster.micro_batches or cluster.trainers and run" in jobs[0].less_memory
    assert "cluster.trainers and cluster.ep = 1 and run" in jobs[1].less_memory


def rows() -> Tensor:
    """Rows that begin inside a document, hold several, or end in padding."""
    tokens = random_tokens(4, 12).clamp_min(2)
    tokens[0, [3, 9]] = BOS_ID
    tokens[0, [2, 8]] = EOS_ID
    tokens[1, 0] = BOS_ID
    tokens[2, 5:] = BOS_ID
    return tokens


def model() -> Transformer:
    return random_model().train()


@contextmanager
def scoring(one: Transformer) -> Iterator[list[tuple[Gate, Tensor]]]:
    """Within it, the list fills with gates that are called, and their scores [T, E]."""
    seen: list[tuple[Gate, Tensor]] = []

    def note(gate: Gate, given: object, made: tuple[Tensor, ...]) -> None:
        seen.append((gate, made[2]))

    gates = [module for module in one.modules() if isinstance(module, Gate)]
    handles = [gate.register_forward_hook(note) for gate in gates]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def position_by_position(
    one: Transformer, tokens_BS: Tensor, loss: PretrainLoss
) -> dict[str, float]:
    """Every mean of the loss, read off its definition."""
    next_terms, after_terms, balance = [], [], 0.0
    for row in tokens_BS:
        segments, document = [], 0
        for token in row.tolist():
            document += token == BOS_ID
            segments.append(document)
        given = None if loss.attend_across_documents else torch.tensor([segments])
        with scoring(one) as seen:
            predicted = one.predict(row[None], given)
        assert predicted.after_next_BSV is not None
        for i in range(len(row)):
            if i + 1 < len(row) and row[i + 1] != BOS_ID:
                next_terms.append(float(-predicted.next_BSV[0, i].log_softmax(-1)[row[i + 1]]))
            if i + 2 < len(row) and BOS_ID not in row[i + 1 : i + 3].tolist():
                after = predicted.after_next_BSV[0, i].log_softmax(-1)
                after_terms.append(float(-after[row[i + 2]]))
        assert len(seen) == len(one.moe_layers())
        for _, scores_TE in seen:
            for e in range(TINY.n_routed_experts):
                best = scores_TE.argsort(dim=1, descending=True)[:, :2]
                frequency = float((best == e).sum()) * 8 / (2 * len(row))
                share = (scores_TE[:, e] / scores_TE.sum(1)).mean()
                balance += frequency * float(share) / len(tokens_BS)
    means = {
        "next_token_loss": sum(next_terms) / len(next_terms),
        "mtp_loss": sum(after_terms) / len(after_terms),
        "balance_loss": balance,
    }
    weights = (1.0, loss.mtp_weight, loss.balance_weight)
    return means | {"loss": sum(w * v for w, v in zip(weights, means.values(), strict=True))}


@pytest.mark.parametrize("across", [False, True])
@torch.no_grad()
def test_the_loss_is_its_definition(across: bool) -> None:
    loss = PretrainLoss(mtp_weight=0.3, balance_weight=0.05, attend_across_documents=across)
    one, batch = model(), {"tokens": rows()}
    value, metrics = part_of(loss, one, batch)
    expected = position_by_position(one, rows(), loss)
    assert metrics | {"loss": float(value)} == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_ranks_parts_add_up_to_the_whole() -> None:
    one, whole = model(), {"tokens": rows()}
    parts = [{"tokens": rows()[:1]}, {"tokens": rows()[1:]}]
    counted = [LOSS.counts(part) for part in parts]
    totals = {name: sum(count[name] for count in counted) for name in counted[0]}
    assert totals == LOSS.counts(whole)
    value, metrics = part_of(LOSS, one, whole, totals)
    values, reports = zip(*(part_of(LOSS, one, part, totals) for part in parts), strict=True)
    assert float(sum(values)) == pytest.approx(float(value), rel=1e-5)
    for name in metrics:
        found = sum(read(r)[name] for r in reports)
        assert found == pytest.approx(read(metrics)[name], rel=1e-5)


def test_a_target_that_begins_a_document_is_never_scored() -> None:
    next_BS, after_BS = scored_targets(torch.tensor([[5, 1, 0, 6, 7, 0, 0, 8]]))
    assert next_BS.tolist() == [[True, False, True, True, False, False, True]]
    assert after_BS.tolist() == [[False, False, True, False, False, False]]
    one, tokens = model(), rows()
    leaf = one.lm_head.weight
    loss = PretrainLoss(mtp_weight=0.0, balance_weight=0.0, attend_across_documents=True)
    # A row whose only targets are unscored changes no number.
    padding = torch.cat([tokens, torch.full((1, 12), BOS_ID)])
    grads = []
    for batch in ({"tokens": tokens}, {"tokens": padding}):
        value, _ = part_of(loss, one, batch)
        grads.append(torch.autograd.grad(value, leaf)[0])
    torch.testing.assert_close(*grads)


def test_a_document_learns_nothing_from_its_neighbours_in_the_row() -> None:
    """The second document's loss has no gradient in what only the first one shows."""
    one, tokens = model(), rows()[:1]
    tokens[0, :3] = 63
    tokens[0, 3:] = tokens[0, 3:].clamp(max=60)
    logits = one.predict(tokens, segments_of(tokens)).next_BSV
    second = logits[0, 4:8].logsumexp(-1).sum()
    (grad,) = torch.autograd.grad(second, one.model.embed_tokens.weight)
    assert not grad[63].any()
    assert bool(grad[tokens[0, 4]].any())


def test_a_memorys_vocabulary_folds_what_the_tokenizer_keeps_apart(tmp_path: Path) -> None:
    text = "the cat and the dog, The Cat and The Dog; thé" * 20
    tokenizer = train_tokenizer([text], TokenizerConfig(vocab_size=300))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = vocabulary(tmp_path / "tokenizer.json")
    assert len(found) == 1 + max(tokenizer.get_vocab().values())
    words = ("the", " the", " The", " cat")
    ids = {word: tokenizer.encode(word, add_special_tokens=False).ids for word in words}
    assert {len(tokens) for tokens in ids.values()} == {1}
    numbers = {text: found[token] for text, (token,) in ids.items()}
    assert numbers["the"] == numbers[" the"] == numbers[" The"] != numbers[" cat"]
    # Special tokens, and the 128 bytes that are no character alone, are what they are.
    assert found[BOS_ID] != found[EOS_ID]
    pieces = [i for i in range(len(found)) if "\ufffd" in tokenizer.decode([i])]
    assert len(pieces) >= 128
    assert len({found[i] for i in pieces}) == len(pieces)


def test_a_memorys_vocabulary_reaches_over_gaps_to_the_highest_id(tmp_path: Path) -> None:
    spelt = {"<begin>": 0, "<end>": 1, "the": 2, "cat": 5, "The": 9}
    Tokenizer(models.WordLevel(spelt, unk_token="<end>")).save(str(tmp_path / "tokenizer.json"))
    found = vocabulary(tmp_path / "tokenizer.json")
    assert found == (0, 1, 2, 3, 4, 5, 6, 7, 8, 2)


@torch.no_grad()
def test_layers_that_route_by_hash_are_not_balanced() -> None:
    one, batch = random_model(tiny_v4(num_hash_layers=2)).train(), {"tokens": rows()}
    with scoring(one) as seen:
        _, metrics = part_of(LOSS, one, batch)
    expected, hashed = 0.0, 0
    for gate, scores_TE in seen:
        if isinstance(gate, HashGate):
            hashed += 1
            continue
        scores_BSE = scores_TE.unflatten(0, (4, 12))
        expected += float(sequence_balance_loss(scores_BSE, 2).mean())
    assert hashed == 2
    assert len(seen) == len(one.moe_layers()) > 2
    assert metrics["balance_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("phase", ["dense", "sparse"])
@pytest.mark.parametrize("config", [tiny_v32(), tiny_v4(index_topk=2)], ids=["v32", "v4"])
@torch.no_grad()
def test_an_indexers_loss_is_added_as_a_mean_over_all_ranks_queries(
    config: ModelConfig, phase: IndexerPhase
) -> None:
    """Rows of short documents have fewer queries than others from which V4 shows a block."""
    one, batch = random_model(config).train(), {"tokens": rows()}
    plain = PretrainLoss(0.3, 0.05, False)
    loss = PretrainLoss(0.3, 0.05, False, indexer=phase, indexer_weight=0.25)
    totals = loss.counts(batch)
    value, terms = part_of(loss, one, batch, totals)
    metrics = read(terms)
    seen = one.predict(rows(), segments_of(rows()), indexer=phase).indexer_loss
    assert seen is not None
    assert metrics["indexer_loss"] == pytest.approx(float(seen), rel=1e-6)
    rest = metrics["next_token_loss"] + 0.3 * metrics["mtp_loss"] + 0.05 * metrics["balance_loss"]
    assert float(value) == pytest.approx(rest + 0.25 * float(seen), rel=1e-5)
    parts = [part_of(loss, one, {"tokens": part}, totals) for part in (rows()[:1], rows()[1:])]
    assert float(sum(part for part, _ in parts)) == pytest.approx(float(value), rel=1e-5)
    added = sum(read(report)["indexer_loss"] for _, report in parts)
    assert added == pytest.approx(metrics["indexer_loss"], rel=1e-5)
    assert "indexer_loss" not in part_of(plain, one, batch, totals)[1]
    assert "indexer_loss" not in part_of(loss, model(), batch, totals)[1]


@pytest.mark.parametrize("phase", ["off", "dense", "sparse"])
@pytest.mark.parametrize(
    "config", [TINY, tiny_v32(), tiny_v4(index_topk=2)], ids=["v3", "v32", "v4"]
)
@torch.no_grad()
def test_next_token_nats_are_the_terms_of_the_loss_row_by_row(
    config: ModelConfig, phase: IndexerPhase
) -> None:
    one, batch = random_model(config), {"tokens": rows()}
    loss = PretrainLoss(0.3, 0.0, False, indexer=phase)
    counts = loss.counts(batch)
    predicted = one.predict(rows(), segments_of(rows()), indexer=phase).next_BSV
    next_BS, _ = scored_targets(rows())
    expected = []
    for row, tokens, scored in zip(predicted.double(), rows(), next_BS, strict=True):
        terms = row[:-1].log_softmax(-1)[range(len(tokens) - 1), tokens[1:]]
        expected.append(-terms[scored].sum())
    found = loss.next_token_nats(one, rows())
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)
    _, metrics = part_of(loss, one.train(), batch, counts)
    mean = float(found.sum()) / counts["next"]
    assert mean == pytest.approx(float(metrics["next_token_loss"]), rel=1e-5)


def test_attention_is_dense_for_as_many_steps_as_configured() -> None:
    train = PretrainConfig(
        steps=100, mtp_loss_weight=0.7, indexer=IndexerConfig(dense_steps=3, loss_weight=0.5)
    )
    losses = [loss_at(train, step) for step in range(1, 6)]
    assert [loss.indexer for loss in losses] == ["dense"] * 3 + ["sparse"] * 2
    assert {(loss.indexer_weight, loss.mtp_weight) for loss in losses} == {(0.5, 0.7)}


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Eleven rows, each with its number in every place."""
    write_rows(tmp_path / "train", np.repeat(np.arange(11)[:, None], 6, axis=1), rows_per_shard=4)
    return tmp_path / "train"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_batches_are_the_single_ranks_batch_divided(packed: Path, world: int) -> None:
    batches = PackedBatches(str(packed), 4, seed=3)
    for step in (1, 2, 3, 7):
        whole = batches.batch(step, rank=0, world=1)["tokens"]
        parts = [batches.batch(step, rank=r, world=world)["tokens"] for r in range(world)]
        assert torch.equal(torch.cat(parts), whole)
        assert whole.shape == (4, 6)
        assert whole.dtype == torch.int64


def test_a_batch_is_a_function_of_its_step_alone(packed: Path) -> None:
    def numbers(batches: PackedBatches, step: int) -> list[int]:
        found: list[int] = batches.batch(step, rank=0, world=1)["tokens"][:, 0].tolist()
        return found

    walked = PackedBatches(str(packed), 4, seed=3)
    walk = [numbers(walked, step) for step in range(1, 10)]
    assert [numbers(PackedBatches(str(packed), 4, seed=3), step) for step in range(1, 10)] == walk
    flat = [number for batch in walk for number in batch]
    assert flat == consumed_rows(11, 36, seed=3).tolist()
    assert flat[:11] == list(range(11))
    assert sorted(flat[11:22]) == list(range(11))
    assert flat[11:22] != list(range(11))
    other = PackedBatches(str(packed), 4, seed=4)
    assert [numbers(other, step) for step in range(1, 10)] != walk


def test_the_rate_warms_up_stays_and_decays_as_configured() -> None:
    train = PretrainConfig(
        steps=100,
        warmup_steps=10,
        decay_share=0.2,
        final_learning_rate_share=0.1,
        optim=OptimConfig(learning_rate=2.0),
    )
    rates = [learning_rate(train, step) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9:80] == [2.0] * 71
    assert rates[89] == pytest.approx(2 * (0.1 + 0.9 * 0.5))
    assert rates[99] == pytest.approx(0.2)
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)
    assert sorted(rates[80:], reverse=True) == rates[80:]
