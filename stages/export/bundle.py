"""The stage `export`: write each variant of a target, read it back, prove it, describe it."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.backend import own
from configs.delivery import ExportConfig, ExportSpec, Target
from configs.errors import ExportError
from configs.model import ModelConfig
from configs.shape import FP8_BLOCK
from model.transformer import Transformer
from model.weights.config import table_of
from model.weights.files import load_pretrained
from model.weights.table import ScaleType
from stages.artifacts import Asked, Bundle, Checkpoint, Corpus, Parity, Report
from stages.contract import Workspace, fills
from stages.conventions import Conventions, as_field, read_conventions
from stages.export import face, npu, parity, served
from stages.export.ascend import Integers
from stages.export.calibration import Range, calibration_rows, measure, of_weight
from stages.export.card import Served, render
from stages.export.client import Client
from stages.export.cuda import Fp4Experts, Fp8Blocks
from stages.export.formats import Bf16, Format
from stages.export.smoothing import smoothed
from stages.export.tensors import TensorFolder, write_json, write_weights
from stages.names import GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG
from stages.shards import Int64
from stages.tokens import load_tokenizer, served_record, write_tokenizer

ENGRAM_ARCHITECTURE = "IngotEngramForCausalLM"
"""Known to no server, which therefore refuses a model whose memory it could not read."""
_USUAL = ExportConfig()
PHASES = 4
"""Each variant is written, proved, compared and asked."""


def formats(
    target: Target, model: ModelConfig, config: ExportConfig = _USUAL
) -> tuple[Format, ...]:
    """The variants that a bundle for `target` holds, of those asked for.

    ExportError if FP8 is among them and servers would read this model's wrongly, if the model has
    no such variant, or if none is asked for.
    """
    makers: dict[str, Callable[[], Format]] = {"bf16": lambda: Bf16(model)}
    if target == "cuda":
        makers["fp8"] = lambda: Fp8Blocks(model, scales=_scales(model, config))
        makers["fp4"] = lambda: Fp4Experts(model)
    else:
        makers["w8a8"] = lambda: Integers(model, mindie=config.mindie)
        makers["w4a8"] = lambda: Integers(model, "w4a8", mindie=config.mindie)
    forms = tuple(make() for variant, make in makers.items() if variant in config.variants)
    if not forms:
        raise ExportError(
            f"export.variants = {sorted(config.variants)}: none of them is one for {target}, which "
            f"has {', '.join(makers)}; name one of these"
        )
    in_blocks = [form for form in forms if isinstance(form, Fp8Blocks)]
    if in_blocks and (ragged := model.ragged_rows):
        shown = ", ".join(f"{name} = {rows}" for name, rows in ragged.items())
        raise ExportError(
            f"export.variants asks for {in_blocks[0].variant}, but of this model {shown} is no "
            f"multiple of {FP8_BLOCK}: servers load matrices of so many rows into one with those "
            "that follow, and would scale rows by another block's scale without a word; leave it "
            'out (export.variants = ["bf16", "w8a8"]), or train a model of other sizes'
        )
    return forms


def _scales(model: ModelConfig, config: ExportConfig) -> ScaleType | None:
    """Of FP8 blocks, if they are not to be the family's own."""
    own = table_of(model).SCALES
    if config.fp8_scales is None or own == "e8m0":
        if config.fp8_scales == "float32":
            raise ExportError(
                'export.fp8_scales = "float32", but V4 has its scales in a byte, and servers read '
                'no others of it; leave it out, or set "ue8m0"'
            )
        return None
    return "float32" if config.fp8_scales == "float32" else "powers"


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
    ranges = _ranges(config, corpus, forms, reference)
    proof = _Proof(config, work, reference, rows_NS, exam)
    shortfall = None if report is None else report.shortfall
    figures: dict[str, Parity] = {}
    asked: dict[str, Asked] = {}
    for number, form in enumerate(forms):
        first = number * PHASES + 1
        form, read = _calibrated(config.export, source, form, ranges)
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
            ),
            corpus,
            checkpoint,
            conventions,
        )
        Path(work.out, form.variant, "README.md").write_text(card, encoding="utf-8")
    return Bundle(
        uri=work.out, target=config.target, parity=figures, asked=asked, shortfall=shortfall
    )


def _ranges(
    config: ExportSpec, corpus: Corpus, forms: Sequence[Format], reference: Transformer
) -> dict[str, Range]:
    """What activations come to on training text, if a variant needs to know."""
    count = config.export.calibration_rows
    if not count or not any(isinstance(form, Integers) for form in forms):
        return {}
    return measure(reference, calibration_rows(corpus, count, seed=config.seed))


def _calibrated(
    config: ExportConfig, source: TensorFolder, form: Format, ranges: Mapping[str, Range]
) -> tuple[Format, TensorFolder]:
    """The variant that knows the ranges of its activations, and the weights that it is to hold."""
    if not isinstance(form, Integers) or not ranges:
        return form, source
    if config.smooth:
        source, ranges = smoothed(source, form, ranges)
    known = {name: of_weight(ranges, name).whole for name in form.calibrated(source.names)}
    return replace(form, ranges=known), source


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


def _prove(
    proof: _Proof, source: TensorFolder, form: Format, *, step: int
) -> tuple[Parity, Asked | None]:
    """All proofs of one variant; ExportError if one fails."""
    work, config, variant = proof.work, proof.config.export, form.variant
    folder = Path(work.out, variant)
    stored = TensorFolder(folder)
    share = parity.prove_weights(source, stored, form)
    fused = parity.prove_fused(stored, form) if isinstance(form, Fp8Blocks) else 0
    work.tracker.log(
        {f"{variant}/weight_error_of_bound": share, f"{variant}/fused_matrices": fused}, step=step
    )
    model = parity.reload(stored, form, source.names)
    if isinstance(form, Integers):
        npu.prove(source, stored, form, seed=proof.config.seed)
        npu.emulate(model, form, stored)
    model.to(parity.device_of(proof.reference))
    measured = parity.compare(proof.reference, model, proof.rows_NS)
    named = {f"{variant}/{name}": value for name, value in measured.model_dump().items()}
    work.tracker.log(named, step=step + 1)
    parity.require(measured, variant, config)
    client = Client(folder)
    served.prove_text(client, proof.exam, variant)
    asked = served.ask_variant(client, model, proof.exam)
    told = f"{measured.top1_agreement:.2%} of {measured.positions:,} likeliest tokens as in the "
    told += f"source, KL {measured.mean_kl_nats:.2g} nats"
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
