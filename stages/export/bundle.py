"""The stage `export`: write each variant of a target, read it back, prove it, describe it."""

import json
import shutil
from dataclasses import asdict, dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import Any

from cluster.backend import own
from cluster.generation import Sampling
from configs.delivery import ExportSpec
from configs.errors import ExportError
from model.transformer import Transformer
from model.weights.config import to_hf_config
from model.weights.files import load_pretrained
from stages.artifacts import Asked, Bundle, Checkpoint, Corpus, Parity, Report
from stages.contract import Workspace, fills
from stages.conventions import Conventions, as_field, read_conventions
from stages.export import blame, emulator, face, parity, proofs, served
from stages.export.ascend import Integers
from stages.export.card import Served, render
from stages.export.client import Client
from stages.export.conversations import SourceChat, prove_conversations
from stages.export.cuda import Fp8Blocks
from stages.export.formats import Format
from stages.export.greedy import Continuations
from stages.export.sums import write_sums
from stages.export.tensors import TensorFolder, write_json, write_weights
from stages.export.variants import Preparation, formats
from stages.names import GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG
from stages.shards import Int64
from stages.tokens import load_tokenizer, served_record, write_tokenizer

ENGRAM_ARCHITECTURE = "IngotEngramForCausalLM"
"""Known to no server, which therefore refuses a model whose memory it could not read."""
PARITY = "parity.json"
"""Beside the variants: for each, by layer, which tensors rounding changed most."""
PHASES = 4
"""Each variant is written, proved, compared and asked."""


@fills(face.export)
def export(
    config: ExportSpec,
    work: Workspace,
    *,
    corpus: Corpus,
    checkpoint: Checkpoint,
    report: Report | None = None,
) -> Bundle:
    """One folder per variant, each compared with `checkpoint` before this returns.

    If the `report` of its model says that it fell short, the bundle and its cards say so too.
    ExportError, and no bundle, if a variant does not reproduce its source, does not encode text as
    its source was trained to read it, or does not fit on disk.
    """
    forms = formats(config.target, checkpoint.model, config.export)
    source = TensorFolder(checkpoint.path())
    _check_disk(source, forms, Path(work.out))
    conventions = read_conventions(
        checkpoint.path(),
        load_tokenizer(checkpoint.path(TOKENIZER)),
        max_tokens=checkpoint.model.max_position_embeddings,
    )
    rows_NS = parity.held_out_rows(corpus, config.export.parity_prompts, seed=config.seed)
    device = own(work.machines.device).device
    reference = load_pretrained(checkpoint.path(), device=device)
    exam = served.Examination(
        corpus,
        checkpoint.path(),
        reference,
        conventions.end_tokens,
        rows_NS,
        config.export,
        seed=config.seed,
    )
    work.tracker.start(steps=PHASES * len(forms), unit="steps")
    preparation = Preparation(config, corpus, source, reference)
    chat = SourceChat(checkpoint.path(), conventions)
    sampling = Sampling(config.export.max_new_tokens, 0.0, conventions.end_tokens)
    continued = Continuations(exam.longest, reference, chat, sampling)
    proof = _Proof(
        config,
        work,
        reference,
        rows_NS,
        exam,
        conventions=conventions,
        continued=continued,
        chat=chat,
    )
    shortfall = None if report is None else report.shortfall
    figures: dict[str, Parity] = {}
    asked: dict[str, Asked] = {}
    for number, form in enumerate(forms):
        first = number * PHASES + 1
        form, read = preparation.of(form)
        weight_bytes = _write(config, work, read, form, checkpoint, conventions, step=first)
        figures[form.variant], answers = _prove(proof, read, form, step=first + 1)
        if answers is not None:
            asked[form.variant] = answers
        card = render(
            Served(
                config.target,
                form.variant,
                figures[form.variant],
                answers,
                weight_bytes,
                shortfall,
                config.export,
                form.model,
            ),
            corpus,
            checkpoint,
            conventions,
        )
        folder = Path(work.out, form.variant)
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_sums(folder)
    write_json(Path(work.out, PARITY), proof.nearest)
    return Bundle(
        uri=work.out, target=config.target, parity=figures, asked=asked, shortfall=shortfall
    )


def _check_disk(source: TensorFolder, forms: tuple[Format, ...], out: Path) -> None:
    """Bfloat16 takes two bytes a value and no other variant takes more."""
    needed, free = 2 * source.count_values() * len(forms), shutil.disk_usage(out).free
    if free < needed:
        raise ExportError(
            f"{out}: the bundle needs up to {needed:,} bytes, the disk has {free:,} free; free "
            "some, or run `ingot clean`"
        )


def _write(
    config: ExportSpec,
    work: Workspace,
    source: TensorFolder,
    form: Format,
    checkpoint: Checkpoint,
    conventions: Conventions,
    *,
    step: int,
) -> int:
    """Write one variant's folder, all but its README; returns the bytes of its tensors."""
    folder = Path(work.out, form.variant)
    work.lease.check()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    weight_bytes = write_weights(
        source,
        form,
        folder,
        max_shard_bytes=config.export.max_shard_bytes,
        before_write=work.lease.check,
    )
    _write_config(folder, form, checkpoint, conventions)
    for name, body in form.side_files(source.names).items():
        write_json(folder / name, body)
    work.tracker.log({f"{form.variant}/weight_bytes": weight_bytes}, step=step)
    return weight_bytes


def _write_config(
    folder: Path, form: Format, checkpoint: Checkpoint, conventions: Conventions
) -> None:
    """The source's config in this variant's dtype, and what tokenizer and sampler need to know."""
    config = json.loads(checkpoint.path("config.json").read_text())
    config.pop("quantization_config", None)
    if form.model != checkpoint.model:
        config |= to_hf_config(form.model)
    config |= {"dtype": "bfloat16", **form.config_entries}
    config["eos_token_id"] = as_field(conventions.end_tokens)
    if checkpoint.model.engram is not None:
        # A server that knows the family would leave the memory out and say nothing.
        config["architectures"] = [ENGRAM_ARCHITECTURE]
    write_json(folder / "config.json", config)
    write_tokenizer(folder / TOKENIZER, served_record(checkpoint.path(TOKENIZER)))
    write_json(folder / TOKENIZER_CONFIG, conventions.tokenizer)
    write_json(folder / GENERATION_CONFIG, conventions.generation)
    for name, template in conventions.templates.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(template, encoding="utf-8")


@dataclass(frozen=True, slots=True)
class _Proof:
    """What every variant is held to."""

    config: ExportSpec
    work: Workspace
    reference: Transformer
    rows_NS: Int64
    exam: served.Examination
    chat: SourceChat
    continued: Continuations
    conventions: Conventions
    nearest: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By variant and layer what `parity.prove_weights` found."""


def _prove(
    proof: _Proof, source: TensorFolder, form: Format, *, step: int
) -> tuple[Parity, Asked | None]:
    """All proofs of one variant; ExportError if one fails."""
    work, config, variant = proof.work, proof.config.export, form.variant
    folder = Path(work.out, variant)
    stored = TensorFolder(folder)
    layers = parity.prove_weights(source, stored, form)
    proof.nearest[variant] = {layer: asdict(one) for layer, one in layers.items()}
    worst = reduce(parity.LayerErrors.worse, layers.values())
    fused = parity.prove_fused(stored, form) if isinstance(form, Fp8Blocks) else 0
    work.tracker.log(
        {
            f"{variant}/weight_error_of_bound": worst.share,
            f"{variant}/weight_error_by_layer": [one.relative_error for one in layers.values()],
            f"{variant}/fused_matrices": fused,
        },
        step=step,
    )
    client = _prove_files(proof, source, stored, form)
    model = parity.reload(stored, form, source.names)
    if isinstance(form, Integers):
        emulator.prove(source, stored, form, seed=proof.config.seed)
        emulator.emulate(model, form, stored)
    model.to(parity.device_of(proof.reference))
    num_bytes = parity.bytes_of(proof.exam.tokenizer, proof.rows_NS)
    measured = parity.compare(proof.reference, model, proof.rows_NS, num_bytes=num_bytes)
    measured = measured.model_copy(
        update={
            "greedy_agreement": proof.continued.agreement(client, model),
            "worst_tensor": worst.coarsest,
            "worst_relative_error": worst.relative_error,
        }
    )
    named = {f"{variant}/{name}": value for name, value in measured.measured().items()}
    work.tracker.log(named, step=step + 1)
    blamed = partial(
        blame.find_culprit,
        *(source, stored, form, proof.reference, proof.rows_NS, measured.mean_kl_nats),
    )
    parity.require(measured, variant, config, lambda: str(blamed()))
    asked = served.ask_variant(client, model, proof.exam)
    told = f"{measured.top1_agreement:.2%} of {measured.positions:,} likeliest tokens as in the "
    told += f"source, KL {measured.mean_kl_nats:.2g} nats"
    if (rise := measured.bits_per_byte_rise) is not None:
        told += f", {rise:+.3%} bits per byte"
    if asked is not None:
        named = {f"{variant}/{name}": value for name, value in asked.model_dump().items()}
        work.tracker.log(named, step=step + 2)
        served.require(asked, variant, config)
        told += (
            f"; of {asked.problems} problems {asked.greedy_accuracy:.1%} right greedily through "
            f"its own files, {asked.source_greedy_accuracy:.1%} in the source"
        )
    else:
        work.tracker.log({f"{variant}/problems": 0}, step=step + 2)
    work.tracker.note(f"{variant}: {told}")
    return measured, asked


def _prove_files(proof: _Proof, source: TensorFolder, stored: TensorFolder, form: Format) -> Client:
    """Prove what stands beside the weights, down to text and conversations; who reads it so."""
    folder = stored.folder
    proofs.prove_indexes(folder, form)
    if isinstance(form, Integers):
        proofs.prove_description(stored, form, form.model)
    proofs.prove_tokenizer(folder, source.folder, form.variant)
    proofs.prove_configs(folder, form, source.folder, proof.conventions)
    client = Client(folder)
    prove_conversations(client, proof.chat, form.variant)
    proofs.prove_templates(folder, form, proof.conventions)
    served.prove_text(client, proof.exam, form.variant)
    return client
