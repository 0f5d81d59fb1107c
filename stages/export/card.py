"""The README.md of a variant: what the model is, how it was made, how exact, how to serve it."""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from configs.delivery import ExportConfig, Target
from configs.model import ModelConfig, V4Config, V32Config
from configs.v4 import AttentionKind
from stages.artifacts import Asked, Checkpoint, Corpus, Parity
from stages.conventions import Conventions
from stages.export.described import WORDS, computed, limits, stored
from stages.export.rules import INT8
from stages.export.serving import describe
from stages.markdown import code
from stages.names import TOKENIZER
from stages.tokens import frame_texts
from stages.verifiers import read_problems

_EXAMPLE_CHARS = 500


@dataclass(frozen=True, slots=True)
class Served:
    """One variant, and what was found of it."""

    target: Target
    variant: str
    parity: Parity
    asked: Asked | None
    weight_bytes: int
    shortfall: str | None = None
    """Why the model is not what was asked for, if it is not."""
    settings: ExportConfig = field(default_factory=ExportConfig)
    """How the variant was asked for."""
    model: ModelConfig | None = None
    """What the variant holds, if it is not all of its source's model."""


def _warning(served: Served) -> str:
    """What stands first in the card of a model that fell short."""
    if served.shortfall is None:
        return ""
    return f"**This model did not come to what was asked of it:** {served.shortfall}.\n\n"


def render(served: Served, corpus: Corpus, source: Checkpoint, conventions: Conventions) -> str:
    """Markdown for one variant. Says nothing that the artifacts do not record."""
    model, variant, parity = served.model or source.model, served.variant, served.parity
    memory = ", with a memory of n-grams (Engram)" if model.engram else ""
    return f"""\
---
{_library(model, variant)}pipeline_tag: text-generation
---
# Ingot, {model.parameters() / 1e6:,.1f}M parameters, {variant} for {served.target}

{_warning(served)}A causal language model of the {WORDS[model.family].kind}{memory}.

{stored(model, variant, served.settings)} Weights: {served.weight_bytes:,} bytes.

{_shape(model)}
## How it was made

{_history(corpus, source)}
## How exact it is

Reloaded from these files and compared with its float32 source on {parity.positions:,} held-out
positions. {computed(variant)}

| figure | value |
|---|---|
| positions with the same likeliest token | {parity.top1_agreement:.2%} |
| mean KL(source, this) | {parity.mean_kl_nats:.3g} nats |
| largest logit error | {parity.max_abs_logit_error:.3g} |
{_as_text(parity)}{_answers(served.asked, conventions)}
Each single weight was also held to half a rounding step of its format. Rounding can tip a token
between two nearly tied experts, so the largest logit error may be far above the usual one.

## How to serve it

{describe(model, served.target, variant)}

## How to speak to it

{_speaking(corpus, source, conventions)}
## Limits

{limits(model, variant, served.settings, source.model)}"""


def _library(model: ModelConfig, variant: str) -> str:
    """What a hub is to load it with; nothing for integers, which no library of its list reads."""
    if model.engram:
        return "library_name: ingot\n"
    return "" if variant in INT8 else "library_name: transformers\n"


def _as_text(parity: Parity) -> str:
    """What was measured beside logits."""
    lines = []
    if (rise := parity.bits_per_byte_rise) is not None:
        lines.append(
            "| bits per byte of held-out text, in the source and here | "
            f"{parity.source_bits_per_byte:.4f}, {parity.bits_per_byte:.4f} ({rise:+.2%}) |"
        )
    if parity.greedy_agreement is not None:
        lines.append(
            "| tokens taken greedily, from text through these files, that are the source's up to "
            f"the first that is not | {parity.greedy_agreement:.2%} |"
        )
    if parity.worst_tensor is not None:
        lines.append(
            f"| error of the tensor that rounding changes most, {code(parity.worst_tensor)} | "
            f"{parity.worst_relative_error:.2%} of its length |"
        )
    return "".join(f"{line}\n" for line in lines)


def _answers(asked: Asked | None, conventions: Conventions) -> str:
    """What held-out problems came to, asked through the variant's own files."""
    if asked is None:
        return ""
    rows = {
        "right greedily, in the source": asked.source_greedy_accuracy,
        "right greedily, through these files": asked.greedy_accuracy,
        "right sampled, as `generation_config.json` says (pass@1)": asked.pass_at_1,
    }
    if conventions.brought is not None:
        rows |= {
            "right greedily, through the chat template": asked.chat_greedy_accuracy,
            "right sampled, through the chat template (pass@1)": asked.chat_pass_at_1,
        }
    body = "".join(f"| {name} | {value:.1%} |\n" for name, value in rows.items())
    return f"| of {asked.problems:,} held-out problems | |\n{body}"


def _speaking(corpus: Corpus, source: Checkpoint, conventions: Conventions) -> str:
    """What stands in front of a prompt, what ends an answer, and what was brought along."""
    begin, end = frame_texts(source.path(TOKENIZER))
    ids = ", ".join(map(str, conventions.end_tokens))
    lines = [
        f"- Every text begins with {code(begin)}, which the tokenizer puts in front by itself; "
        f"documents were trained to end with {code(end)}. Tokens that end an answer: {ids}.",
        "- Text that spells a special token becomes that token in most clients; to have it stay "
        "text, as in training, call the tokenizer with `split_special_tokens=True`.",
    ]
    if corpus.held_out_problems:
        one = read_problems(corpus.path("problems", "held_out.parquet"))[0]
        shown = code(one.prompt, chars=_EXAMPLE_CHARS)
        lines.append(
            f"- Its corpus asks problems such as {shown}, whose right answer is "
            f"{code(one.answer)}."
            + (" Other forms get answers that mean nothing." * (one.source == "arithmetic"))
        )
    brought = conventions.brought
    if brought is None:
        lines.append(
            "- The chat template lays one turn behind the other, with nothing between a question "
            "and its answer: the model was not trained on conversations."
        )
    else:
        carried = ", ".join(map(code, brought.carried)) or "nothing"
        lines.append(f"- The model was made elsewhere. With it came {carried}, carried through.")
        notes = (*brought.notes(), *conventions.said)
        lines += [f"- {line[0].upper()}{line[1:]}." for line in notes]
    return "".join(f"{line}\n" for line in lines)


def _shape(model: ModelConfig) -> str:
    rows = {
        "layers": f"{model.num_hidden_layers}, {_layers(model)}, "
        f"and {model.num_nextn_predict_layers} for multi-token prediction",
        "width": f"{model.hidden_size}"
        + (f", in {model.streams} residual streams" if model.streams > 1 else ""),
        "experts": f"{model.n_routed_experts} routed, {model.num_experts_per_tok} a token, "
        f"{model.n_shared_experts} shared",
        "parameters": f"{model.parameters():,}, of which {model.parameters(active=True):,} a token",
        "vocabulary": f"{model.vocab_size:,}",
        "context": f"{model.max_position_embeddings:,} tokens",
    }
    if isinstance(model, V32Config):
        rows["attention"] = f"to {model.index_topk} tokens that the indexer picks"
    if model.engram:
        rows["memory"] = (
            f"n-grams of up to {model.engram.max_ngram_size} tokens, in front of layers "
            f"{', '.join(map(str, model.engram.layer_ids))}"
        )
    body = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return f"| | |\n|---|---|\n{body}"


def _layers(model: ModelConfig) -> str:
    """Of which kinds the layers are."""
    if not isinstance(model, V4Config):
        dense = model.num_hidden_layers - model.num_moe_layers
        return f"the first {dense} dense"
    counts = Counter(model.attention_kind(layer) for layer in range(model.num_hidden_layers))
    kinds: dict[AttentionKind, str] = {
        "window": "with a window alone",
        "csa": f"compressing by {model.csa_ratio} and selecting",
        "hca": f"compressing by {model.hca_ratio}",
    }
    told = [f"{counts[kind]} {text}" for kind, text in kinds.items() if counts[kind]]
    return f"{', '.join(told)}; the first {model.num_hash_layers} route by token"


def _history(corpus: Corpus, source: Checkpoint) -> str:
    manifest = source.manifest()
    read = f"Pretraining read {source.sequences_seen:,} rows."
    beginning = read if source.sequences_seen else "It began with weights made elsewhere."
    # Of reinforcement learning the loss says nothing of how good a model is.
    told = source.final_loss is not None and manifest.stage_name == "pretrain"
    loss = f", at a loss of {source.final_loss:.4f}" if told else ""
    return f"""\
- Corpus: {corpus.train_rows:,} rows of {corpus.sequence_tokens} tokens, a vocabulary of
  {corpus.vocab_size:,}; held out from training: {sum(corpus.held_out_rows.values()):,} rows and
  {corpus.held_out_problems:,} problems.
{_training_text(corpus)}- {beginning}
- The weights are those that stage `{manifest.stage_name}` left after step {source.step:,}{loss}
  (artifact {manifest.fingerprint[:12]}).
"""


def _training_text(corpus: Corpus) -> str:
    """The sources by their share of the training tokens, and which of them err on purpose."""
    statistics = json.loads(corpus.path("statistics.json").read_text(encoding="utf-8"))
    sources: dict[str, dict[str, Any]] = statistics["sources"]
    shares = (
        f"{source['share']:.0%} {code(name)} ({source['type']})" for name, source in sources.items()
    )
    lines = [f"- Training text, by tokens: {', '.join(shares)}.\n"]
    # Only generated sources record slips.
    lines += [
        f"- About {source['slip_share']:.0%} of the training answers in {code(name)} are wrong on "
        "purpose, by one digit; its problems\n  for reinforcement learning and evaluation are all "
        "right.\n"
        for name, source in sources.items()
        if source.get("slip_share")
    ]
    return "".join(lines)
