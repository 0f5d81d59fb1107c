"""The README.md of a variant: what the model is, how it was made, how exact, how to serve it."""

import json
from typing import Any

from configs.model import ModelConfig
from stages.artifacts import Checkpoint, Corpus, Parity, read_manifest
from stages.shards import BOS_TOKEN, EOS_TOKEN

_STORED = {
    "bf16": "All weights in bfloat16, the routing bias in float32.",
    "fp8": (
        "Linear and expert weights in float8 E4M3 with one float32 scale per 128 x 128 block; "
        "embeddings, output head, norms and router in bfloat16, the routing bias in float32."
    ),
    "w8a8": (
        "Linear and expert weights in int8 with one float32 scale per output row (W8A8_DYNAMIC); "
        "key-value up-projection, router, norms, embeddings, output head and the MTP layer in "
        "bfloat16. `quant_model_description.json` says which tensor is which."
    ),
}
_SERVE = {
    "cuda": """\
```sh
vllm serve . --served-model-name ingot
python -m sglang.launch_server --model-path . --served-model-name ingot
```
```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")
```
transformers needs `accelerate` for the FP8 variant, which it widens to bfloat16 without a GPU; it
reports the tensors of the MTP layer as unexpected and does not use them.""",
    "ascend": """\
```sh
vllm serve . --served-model-name ingot --enable-expert-parallel{quantization}
```
with vllm-ascend installed.""",
}


def render(
    target: str, variant: str, parity: Parity, weight_bytes: int, corpus: Corpus, source: Checkpoint
) -> str:
    """Markdown for one variant. Says nothing that the artifacts do not record."""
    model = source.model
    quantization = " --quantization ascend" if variant == "w8a8" else ""
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
---
# Ingot, {model.parameters() / 1e6:,.1f}M parameters, {variant} for {target}

A causal language model of the DeepSeek-V3 family: multi-head latent attention and a mixture of
experts. {_STORED[variant]} Weights: {weight_bytes:,} bytes.

{_shape(model)}
## How it was made

{_history(corpus, source)}
## How exact it is

Reloaded from these files and compared with its float32 source on {parity.positions:,} held-out
positions. Weights are rounded; activations are float32 on both sides, so what a server's own
quantisation of activations adds is not in these figures.

| figure | value |
|---|---|
| positions with the same likeliest token | {parity.top1_agreement:.2%} |
| mean KL(source, this) | {parity.mean_kl_nats:.3g} nats |
| largest logit error | {parity.max_abs_logit_error:.3g} |

Each single weight was also held to half a rounding step of its format. Rounding can tip a token
between two nearly tied experts, so the largest logit error may be far above the usual one.

## How to serve it

{_SERVE[target].format(quantization=quantization)}

A prompt must begin with `{BOS_TOKEN}`, which the tokenizer does not add by itself.
The model ends an answer with `{EOS_TOKEN}`.

## Limits

{_limits(model, variant)}"""


def _shape(model: ModelConfig) -> str:
    rows = {
        "layers": f"{model.num_hidden_layers}, the first {model.first_k_dense_replace} dense, "
        f"and {model.num_nextn_predict_layers} for multi-token prediction",
        "width": f"{model.hidden_size}",
        "experts": f"{model.n_routed_experts} routed, {model.num_experts_per_tok} a token, "
        f"{model.n_shared_experts} shared",
        "parameters": f"{model.parameters():,}, of which {model.parameters(active=True):,} a token",
        "vocabulary": f"{model.vocab_size:,}",
        "context": f"{model.max_position_embeddings:,} tokens",
    }
    body = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return f"| | |\n|---|---|\n{body}"


def _history(corpus: Corpus, source: Checkpoint) -> str:
    manifest = read_manifest(source.uri)
    return f"""\
- Corpus: {corpus.train_rows:,} rows of {corpus.sequence_tokens} tokens, a vocabulary of
  {corpus.vocab_size:,}; held out from training: {sum(corpus.held_out_rows.values()):,} rows and
  {corpus.held_out_problems:,} problems.
{_training_text(corpus)}- Pretraining read {source.sequences_seen:,} rows.
- The weights are those that stage `{manifest.stage}` left after step {source.step:,}, at a loss of
  {source.final_loss:.4f} (artifact {manifest.fingerprint[:12]}).
"""


def _training_text(corpus: Corpus) -> str:
    """The sources by their share of the training tokens, and which of them err on purpose."""
    statistics = json.loads(corpus.path("statistics.json").read_text(encoding="utf-8"))
    sources: dict[str, dict[str, Any]] = statistics["sources"]
    shares = (
        f"{source['share']:.0%} `{name}` ({source['type']})" for name, source in sources.items()
    )
    lines = [f"- Training text, by tokens: {', '.join(shares)}.\n"]
    # Only generated sources record slips.
    lines += [
        f"- About {source['slip_share']:.0%} of the training answers in `{name}` are wrong on "
        "purpose, by one digit; its problems\n  for reinforcement learning and evaluation are all "
        "right.\n"
        for name, source in sources.items()
        if source.get("slip_share")
    ]
    return "".join(lines)


def _limits(model: ModelConfig, variant: str) -> str:
    limits = [
        "It knows what its corpus taught it and nothing else; it was not aligned to be helpful or "
        "harmless.",
        "These files follow the formats that the servers document. The parity above was measured "
        "by Ingot, on the machine that made the bundle, not by those servers.",
    ]
    ragged = {
        name: size
        for name in ("intermediate_size", "moe_intermediate_size", "hidden_size")
        if (size := getattr(model, name)) % 128
    }
    if variant == "fp8" and ragged:
        sizes = ", ".join(f"{name} = {size}" for name, size in ragged.items())
        limits.append(
            f"Block-FP8 kernels want sizes that are multiples of 128; here {sizes}. A server that "
            "insists must be given the bf16 variant."
        )
    return "".join(f"- {limit}\n" for limit in limits)
