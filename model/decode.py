"""Sampling with a latent cache: MLA in its absorbed form.

The expansion of the latent into per-head keys and values is folded into the query and the output
(DeepSeek-V3, section 2.1.1), so the cache holds C + R values a token a layer and nothing per head.
Rows may have prompts of different lengths; a finished row leaves the batch.

Axes: B rows, P prompt positions, L cache slots, H heads, N no-position width, R rotary width,
C latent width, V value width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from configs.errors import DataError
from model.attention import LatentAttention
from model.transformer import DecoderLayer, Transformer


@dataclass(slots=True)
class Sample:
    """One answer: its tokens (the stop token included, if reached) and their log-probabilities."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Natural logarithms under the distribution that was sampled from."""
    stopped: bool = False
    """False when the token limit cut the answer off."""


def sample(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    stop_token: int,
    seeds: Sequence[int],
) -> list[Sample]:
    """One answer for each prompt; temperature 0 takes the likeliest token.

    Row i draws from its own stream, seeded by `seeds[i]`, whatever the other rows are. DataError
    if a prompt and its answer cannot fit the context.
    """
    context = model.config.max_position_embeddings
    for prompt in prompts:
        if not prompt:
            raise DataError("a prompt has no tokens; begin it with the begin-of-text token")
        if len(prompt) + max_new_tokens > context:
            raise DataError(
                f"a prompt of {len(prompt)} tokens and max_new_tokens = {max_new_tokens} exceed "
                f"the model's context of {context}; shorten either"
            )
    samples = [Sample() for _ in prompts]
    if not prompts:
        return samples
    draws = np.stack(
        [np.random.Generator(np.random.Philox(s)).random(max_new_tokens) for s in seeds]
    )
    with torch.inference_mode():
        state = _Decoding(model, prompts, max_new_tokens)
        logits_BV = state.prefill()
        for step in range(max_new_tokens):
            chosen_B, logprobs_B = _draw(logits_BV, temperature, draws[state.rows, step])
            for row, token, logprob in zip(
                state.rows, chosen_B.tolist(), logprobs_B.tolist(), strict=True
            ):
                samples[row].token_ids.append(token)
                samples[row].logprobs.append(logprob)
                samples[row].stopped = token == stop_token
            going = chosen_B != stop_token
            if step + 1 == max_new_tokens or not going.any():
                break
            state.keep(going)
            logits_BV = state.step(chosen_B[going])
    return samples


def _draw(logits_BV: Tensor, temperature: float, uniform_B: np.ndarray) -> tuple[Tensor, Tensor]:
    """Tokens by inverse transform sampling, with their log-probabilities."""
    if temperature == 0:
        logprobs_BV = logits_BV.log_softmax(-1)
        chosen_B = logits_BV.argmax(-1)
    else:
        logprobs_BV = (logits_BV / temperature).log_softmax(-1)
        cumulative_BV = logprobs_BV.double().exp().cumsum(-1)
        target_B1 = torch.from_numpy(uniform_B)[:, None] * cumulative_BV[:, -1:]
        chosen_B = torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(1)
        chosen_B = chosen_B.clamp_max(logits_BV.shape[1] - 1)
    return chosen_B, logprobs_BV.gather(1, chosen_B[:, None]).squeeze(1)


class _Decoding:
    """The latent caches of one batch, and which of the caller's rows are still in it."""

    def __init__(
        self, model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> None:
        self.model = model
        self.layers = [
            layer
            for layer in model.model.layers[: model.config.num_hidden_layers]
            if isinstance(layer, DecoderLayer)
        ]
        self.rows = np.arange(len(prompts))
        self.lengths_B = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(self.lengths_B.max())
        self.prompts_BP = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, prompt in zip(self.prompts_BP, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        config = model.config
        width = config.kv_lora_rank + config.qk_rope_head_dim
        shape = (len(prompts), longest + max_new_tokens, width)
        self.caches = [torch.zeros(shape) for _ in self.layers]

    def keep(self, going_B: Tensor) -> None:
        """Drop the rows that have finished."""
        if bool(going_B.all()):
            return
        self.rows = self.rows[going_B.numpy()]
        self.lengths_B = self.lengths_B[going_B]
        self.caches = [cache[going_B] for cache in self.caches]

    def prefill(self) -> Float[Tensor, "B V"]:
        """Run the prompts; logits after each row's last token."""
        batch, longest = self.prompts_BP.shape
        positions_BP = torch.arange(longest).expand(batch, longest)
        hidden = self._run(self.prompts_BP, positions_BP)
        last_BD = hidden[torch.arange(batch), self.lengths_B - 1]
        return self._logits(last_BD)

    def step(self, tokens_B: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        """Append one token to each row; logits after it."""
        hidden = self._run(tokens_B[:, None], self.lengths_B[:, None])
        self.lengths_B = self.lengths_B + 1
        return self._logits(hidden[:, 0])

    def _run(self, tokens_BP: Tensor, positions_BP: Tensor) -> Tensor:
        hidden: Tensor = self.model.model.embed_tokens(tokens_BP)
        # Slots beyond a query's own position hold padding or nothing, and are never read.
        last_slot = int(positions_BP.max()) + 1
        visible_BPL = torch.arange(last_slot) <= positions_BP[..., None]
        for layer, cache_BLW in zip(self.layers, self.caches, strict=True):
            normed = layer.input_layernorm(hidden)
            attended = attend_latent(layer.self_attn, normed, positions_BP, visible_BPL, cache_BLW)
            hidden = hidden + attended
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden

    def _logits(self, hidden_BD: Tensor) -> Tensor:
        logits: Tensor = self.model.lm_head(self.model.model.norm(hidden_BD))
        return logits


def attend_latent(
    attention: LatentAttention,
    x_BPD: Float[Tensor, "B P D"],
    positions_BP: Int[Tensor, "B P"],
    visible_BPL: Tensor,
    cache_BLW: Float[Tensor, "B Lmax W"],
) -> Float[Tensor, "B P D"]:
    """Absorbed MLA: write the new latents into the cache, attend over its first L slots."""
    config = attention.config
    q_nope_BPHN, q_rope_BPHR, latent_BPC, k_rope_BPR = attention.project(x_BPD, positions_BP)
    batch = torch.arange(x_BPD.shape[0])[:, None]
    cache_BLW[batch, positions_BP] = torch.cat([latent_BPC, k_rope_BPR], dim=-1)
    seen_BLW = cache_BLW[:, : visible_BPL.shape[-1]]
    expand_HEC = attention.kv_b_proj.weight.unflatten(0, (config.num_attention_heads, -1))
    key_HNC, value_HVC = expand_HEC.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
    q_BPHW = torch.cat([torch.einsum("bphn,hnc->bphc", q_nope_BPHN, key_HNC), q_rope_BPHR], -1)
    score_BHPL = torch.einsum("bphw,blw->bhpl", q_BPHW, seen_BLW) * attention.scale
    weight_BHPL = score_BHPL.masked_fill(~visible_BPL.unsqueeze(1), float("-inf")).softmax(-1)
    latent_BPHC = torch.einsum("bhpl,blc->bphc", weight_BHPL, seen_BLW[..., : config.kv_lora_rank])
    out_BPHV = torch.einsum("bphc,hvc->bphv", latent_BPHC, value_HVC)
    out: Tensor = attention.o_proj(out_BPHV.flatten(2))
    return out
