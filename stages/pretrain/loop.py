"""The pretrain stage: packed rows in, a checkpoint out."""

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from cluster.backend import fitted, foresee
from cluster.checkpoint import consolidate, latest
from cluster.fit import FitJob, fit
from cluster.memory import less_memory
from cluster.output import Output
from cluster.saves import Saves
from cluster.tracing import untraced
from configs.errors import ConfigError
from configs.model import ModelConfig
from configs.parallel import ClusterConfig
from configs.train import PretrainConfig, PretrainSpec
from model.engram import canonical_ids
from model.fp8.scheme import Numerics
from model.optim import warmup_cosine
from stages.artifacts import Checkpoint, Corpus
from stages.contract import Workspace, fills
from stages.pretrain import face
from stages.pretrain.batches import PackedBatches
from stages.pretrain.held_out_text import LOSS, held_out_text
from stages.pretrain.objective import PretrainLoss
from stages.telemetry import SAVES, begin_metrics, following, open_metrics, write_history
from stages.tokens import load_tokenizer, vocabulary_size


@fills(face.pretrain)
def pretrain(
    config: PretrainSpec, work: Workspace, *, corpus: Corpus, base: Checkpoint | None = None
) -> Checkpoint:
    """Train a model on the corpus, over expert-parallel workers.

    It begins with the weights of `base`, if there is one, and moments of its own; otherwise with
    weights drawn by the seed. Rows are read on from `config.rows_before`.
    """
    if corpus.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {config.model.vocab_size} is below the corpus's vocabulary of "
            f"{corpus.vocab_size}; raise the first"
        )
    if base is not None and base.model != config.model:
        raise ConfigError(
            f"model: {_differing(base.model, config.model)} of the checkpoint that training begins "
            "with, which was made otherwise; use its model, or another checkpoint"
        )
    job = _job(config, work, corpus, base)
    foresee(_numerics(config, work), work.machines)
    work.tracker.start(steps=config.pretrain.steps, unit="step")
    # Steps after the last save will be made again, and are not to be shown until then.
    begin_metrics(work, job.saves.newest())
    with following(work.beside(), work.tracker):
        final = fit(job, fitted(work.machines), work.out, str(work.beside("ray")))
    if told := untraced(job.output, job.profile, job.steps):
        work.tracker.note(told)
    consolidate(final, config.model, work.path())
    shutil.copy(corpus.path("tokenizer.json"), work.path("tokenizer.json"))
    records = write_history(work)
    best = best_measured(records)
    if best is not None:
        work.tracker.note(_tell(best, records[-1]))
    return Checkpoint(
        uri=work.out,
        step=config.pretrain.steps,
        sequences_seen=config.rows_before + config.pretrain.steps * config.pretrain.batch_sequences,
        model=config.model,
        final_loss=records[-1]["loss"],
        best_step=None if best is None else best["step"],
    )


def _differing(theirs: ModelConfig, ours: ModelConfig) -> str:
    """The first setting in which two models differ, as `hidden_size = 64 where 128 is asked`."""
    for name in type(ours).model_fields:
        found, asked = getattr(theirs, name, None), getattr(ours, name)
        if found != asked:
            return f"{name} = {found!r} where {asked!r} is asked"
    return f"family = {theirs.family!r} where {ours.family!r} is asked"


def best_measured(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The first record of a step log with the lowest loss on held-out text; none without one."""
    return min((one for one in records if LOSS in one), key=itemgetter(LOSS), default=None)


def _tell(best: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    told = f"loss on held-out text {last[LOSS]:.4f} nats a token after the last step"
    if best["step"] == last["step"]:
        return f"{told}, the lowest that was measured"
    return f"{told}; it was lowest after step {best['step']}: {best[LOSS]:.4f}"


def _job(config: PretrainSpec, work: Workspace, corpus: Corpus, base: Checkpoint | None) -> FitJob:
    train = config.pretrain
    saves = work.resumable(SAVES)
    return FitJob(
        model=config.model,
        optim=train.optim,
        balance=train.balance,
        precision=_numerics(config, work),
        seed=config.seed,
        steps=train.steps,
        tokens_per_step=train.batch_sequences * corpus.sequence_tokens,
        checkpoint_every_steps=train.checkpoint_every_steps,
        learning_rate=partial(learning_rate, train),
        indexer_learning_rate=train.indexer.learning_rate,
        source=PackedBatches(
            str(corpus.path("train")), train.batch_sequences, config.seed, config.rows_before
        ),
        loss=partial(loss_at, train),
        saves=Saves(saves[0], tuple(saves[1:]), latest(*saves[1:]), work.supply),
        base=None if base is None else str(base.path()),
        open_log=partial(open_metrics, str(work.beside())),
        may_write=work.lease.check,
        threads=work.machines.threads_per_worker,
        output=Output(str(work.logs), "trainer"),
        reads=(corpus.path("train"), corpus.path("held_out"), *([base.path()] if base else [])),
        profile=work.profile,
        micro_batches=work.machines.micro_batches,
        less_memory=_less_memory(train, corpus, work.machines),
        flops_per_token=config.model.training_flops_per_token(corpus.sequence_tokens),
        held_out=held_out_text(
            config,
            corpus,
            partial(loss_at, train),
            micro_batches=work.machines.micro_batches,
        ),
        vocabulary=vocabulary(corpus.path("tokenizer.json")) if config.model.engram else None,
    )


def _less_memory(train: PretrainConfig, corpus: Corpus, machines: ClusterConfig) -> str:
    """Which settings lower what a rank holds; all but those of the cluster begin anew."""
    divides = train.batch_sequences > machines.stage_trainers * machines.micro_batches
    narrower = ", or set pretrain.optim.moments = 'bfloat16'"
    moments = narrower if train.optim.moments == "float32" else ""
    more = less_memory(machines.ep, "cluster.micro_batches or " if divides else "")
    return (
        f"{more}, or begin anew with a lower pretrain.batch_sequences = {train.batch_sequences} or "
        f"data.sequence_tokens = {corpus.sequence_tokens}{moments}"
    )


def _numerics(config: PretrainSpec, work: Workspace) -> Numerics:
    return Numerics(config.pretrain.precision, config.pretrain.fp8, work.machines.fp8_backend)


def vocabulary(tokenizer_json: Path) -> tuple[int, ...]:
    """What each id of the tokenizer, up to its highest, counts as to a memory of n-grams."""
    tokenizer = load_tokenizer(tokenizer_json)
    texts: list[str | None] = []
    for i in range(vocabulary_size(tokenizer)):
        # What no token has would be decoded to an empty text, as if all such ids were one token.
        known = tokenizer.id_to_token(i) is not None
        texts.append(tokenizer.decode([i], skip_special_tokens=False) if known else None)
    return tuple(canonical_ids(texts))


def loss_at(train: PretrainConfig, step: int) -> PretrainLoss:
    """What is minimised at `step`: indexers learn dense attention first, then what they pick."""
    return PretrainLoss(
        mtp_weight=train.mtp_loss_weight,
        balance_weight=train.balance.sequence_loss_weight,
        attend_across_documents=train.attend_across_documents,
        indexer="dense" if step <= train.indexer.dense_steps else "sparse",
        indexer_weight=train.indexer.loss_weight,
    )


def learning_rate(train: PretrainConfig, step: int) -> float:
    """The rate at `step`: linear warm-up, constant, cosine decay."""
    factor = warmup_cosine(
        step,
        steps=train.steps,
        warmup_steps=train.warmup_steps,
        decay_share=train.decay_share,
        final_share=train.final_learning_rate_share,
    )
    return train.optim.learning_rate * factor
