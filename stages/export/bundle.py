"""The stage `export`: write each variant of a target, read it back, prove it, describe it."""

import json
import shutil
from pathlib import Path

from configs.delivery import ExportSpec, Target
from configs.errors import ExportError
from configs.model import ModelConfig
from model.transformer import Transformer
from model.weights.files import load_pretrained
from stages.artifacts import Bundle, Checkpoint, Corpus, Parity
from stages.contract import Workspace, stage
from stages.export import parity
from stages.export.ascend import Int8Rows
from stages.export.card import render
from stages.export.cuda import Fp8Blocks
from stages.export.formats import Bf16, Format
from stages.export.tensors import TensorFolder, write_json, write_weights
from stages.shards import BOS_ID, EOS_ID, Int64
from stages.tokens import frame_texts

ENGRAM_ARCHITECTURE = "IngotEngramForCausalLM"
"""Known to no server, which therefore refuses a model whose memory it could not read."""
PHASES = 3
"""Each variant is written, proved and compared."""


def formats(target: Target, model: ModelConfig) -> tuple[Format, ...]:
    """The variants that a bundle for `target` holds."""
    match target:
        case "cuda":
            return Bf16(model), Fp8Blocks(model)
        case "ascend":
            return Bf16(model), Int8Rows(model)


@stage(revision=1)
def export(
    config: ExportSpec, work: Workspace, *, corpus: Corpus, checkpoint: Checkpoint
) -> Bundle:
    """One folder per variant, each compared with `checkpoint` before this returns.

    ExportError, and no bundle, if a variant does not reproduce its source or does not fit on disk.
    """
    source = TensorFolder(checkpoint.path())
    forms = formats(config.target, checkpoint.model)
    _check_disk(source, forms, Path(work.out))
    rows_NS = parity.held_out_rows(corpus, config.export.parity_prompts, seed=config.seed)
    reference = load_pretrained(checkpoint.path())
    work.tracker.start(steps=PHASES * len(forms), unit="steps")
    figures: dict[str, Parity] = {}
    for number, form in enumerate(forms):
        first = number * PHASES + 1
        weight_bytes = _write(config, work, source, form, checkpoint, step=first)
        measured = _prove(config, work, source, form, reference, rows_NS, step=first + 1)
        card = render(config.target, form.variant, measured, weight_bytes, corpus, checkpoint)
        Path(work.out, form.variant, "README.md").write_text(card, encoding="utf-8")
        figures[form.variant] = measured
    return Bundle(uri=work.out, target=config.target, parity=figures)


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
    _write_config(folder, form, checkpoint)
    for name, body in form.side_files(source.names).items():
        write_json(folder / name, body)
    work.tracker.log({f"{form.variant}/weight_bytes": weight_bytes}, step=step)
    return weight_bytes


def _write_config(folder: Path, form: Format, checkpoint: Checkpoint) -> None:
    """The source's config in this variant's dtype, and what tokenizer and sampler need to know."""
    config = json.loads(checkpoint.path("config.json").read_text())
    config.pop("quantization_config", None)
    config |= {"dtype": "bfloat16", **form.config_entries}
    if checkpoint.model.engram is not None:
        # A server that knows the family would leave the memory out and say nothing.
        config["architectures"] = [ENGRAM_ARCHITECTURE]
    write_json(folder / "config.json", config)
    shutil.copyfile(checkpoint.path("tokenizer.json"), folder / "tokenizer.json")
    begin, end = frame_texts(checkpoint.path("tokenizer.json"))
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "eos_token": end,
        "pad_token": end,
        "model_max_length": checkpoint.model.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", tokenizer)
    generation = {
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": EOS_ID,
        "do_sample": True,
        "temperature": 1.0,
    }
    write_json(folder / "generation_config.json", generation)


def _prove(
    config: ExportSpec,
    work: Workspace,
    source: TensorFolder,
    form: Format,
    reference: Transformer,
    rows_NS: Int64,
    *,
    step: int,
) -> Parity:
    """Both proofs of one variant; ExportError if either fails."""
    stored = TensorFolder(Path(work.out, form.variant))
    share = parity.prove_weights(source, stored, form)
    work.tracker.log({f"{form.variant}/weight_error_of_bound": share}, step=step)
    measured = parity.compare(reference, parity.reload(stored, form, source.names), rows_NS)
    named = {f"{form.variant}/{name}": value for name, value in measured.model_dump().items()}
    work.tracker.log(named, step=step + 1)
    parity.require(measured, form.variant, config.export)
    work.tracker.note(
        f"{form.variant}: {measured.top1_agreement:.2%} of {measured.positions:,} likeliest tokens "
        f"as in the source, KL {measured.mean_kl_nats:.2g} nats"
    )
    return measured
