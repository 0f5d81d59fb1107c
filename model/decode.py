"""Decoding with caches: rows that join and leave a running batch, and what is drawn for them.

Each layer keeps of a row what its kind of attention needs (latents, or compressed entries and a
window). A row's answer depends on its prompt, its seed and the weights, never on the other rows,
but for the last bits of sums.

Axes: B rows, S positions, V vocabulary, L layers with experts, K choices.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from configs.errors import DataError
from configs.seed import derive
from model.moe import MoE
from model.passes import Caches, Step, Whole
from model.transformer import Transformer


@dataclass(slots=True)
class Sample:
    """One answer: its tokens (the stop token included, if reached) and their log-probabilities."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Natural logarithms under the distribution that was sampled from."""
    stopped: bool = False
    """False when the token limit cut the answer off."""
    experts: np.ndarray | None = None
    """On request int32 [tokens read, L, K]: the experts that each token of prompt and answer went
    to; the answer's last token was never read."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """How a token is chosen from logits."""

    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int | None = None
    """Keep only this many of the likeliest tokens; of equals, the lower ids."""
    top_p: float = 1.0
    """Then keep the fewest likeliest tokens whose probabilities reach this sum."""


class Session:
    """A running batch: rows join, take steps together, and leave one by one."""

    def __init__(self, model: Transformer, *, rows: int, tokens: int) -> None:
        """Caches for at most `rows` rows of at most `tokens` tokens, prompt and answer."""
        self.model = model
        self.count = 0
        """Rows in the batch now; they are numbered from 0."""
        self._device = model.lm_head.weight.device
        self._caches = model.new_caches(rows, tokens)
        self._lengths_R = torch.zeros(rows, dtype=torch.int64, device=self._device)

    def join(self, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "B V"]:
        """Read the prompts into new rows at the end of the batch; logits after each."""
        rows = slice(self.count, self.count + len(prompts))
        lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        tokens_BS = torch.zeros(len(prompts), int(lengths_B.max()), dtype=torch.int64)
        for row, prompt in zip(tokens_BS, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        caches = self._view(rows)
        for cache in caches.values():
            for tensor in cache.values():
                tensor.zero_()
        batch = Whole(tokens_BS.to(self._device), caches=caches, lengths_B=lengths_B)
        hidden_BSD = self.model.read(batch)
        last_BD = hidden_BSD[torch.arange(len(prompts), device=self._device), lengths_B - 1]
        self._lengths_R[rows] = lengths_B
        self.count += len(prompts)
        return self.model.logits(last_BD)

    def step(self, tokens_B: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        """Append one token to every row; logits after it."""
        rows = slice(0, self.count)
        tokens_B1 = tokens_B.to(self._device)[:, None]
        hidden_B1D = self.model.read(Step(tokens_B1, self._lengths_R[rows], self._view(rows)))
        self._lengths_R[rows] += 1
        return self.model.logits(hidden_B1D[:, 0])

    def leave(self, row: int) -> None:
        """Drop a row; the last row takes its number."""
        last = self.count - 1
        if row != last:
            for cache in self._caches.values():
                for tensor in cache.values():
                    tensor[row] = tensor[last]
            self._lengths_R[row] = self._lengths_R[last]
        self.count = last

    def _view(self, rows: slice) -> Caches:
        return {
            module: {name: tensor[rows] for name, tensor in cache.items()}
            for module, cache in self._caches.items()
        }


def generate(
    model: Transformer,
    tokens_BS: Int[Tensor, "B S"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop_tokens: Collection[int] = (),
    seed: int = 0,
) -> Int[Tensor, "B S+N"]:
    """Prompts of one length, continued by at most `max_new_tokens` tokens.

    A row that reached a stop token is filled up with that token. Sampling is repeatable by `seed`.
    """
    answers = sample(
        model,
        tokens_BS.tolist(),
        max_new_tokens=max_new_tokens,
        drawing=Drawing(temperature, top_k, top_p),
        stop_tokens=stop_tokens,
        seeds=[derive(seed, "generate", row) for row in range(len(tokens_BS))],
    )
    longest = max((len(answer.token_ids) for answer in answers), default=0)
    new = [a.token_ids + [a.token_ids[-1]] * (longest - len(a.token_ids)) for a in answers]
    new_BN = torch.tensor(new, dtype=tokens_BS.dtype, device=tokens_BS.device)
    return torch.cat([tokens_BS, new_BN.view(len(answers), longest)], dim=1)


def sample(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    drawing: Drawing,
    stop_tokens: Collection[int],
    seeds: Sequence[int],
    max_rows: int | None = None,
    keep_experts: bool = False,
) -> list[Sample]:
    """One answer for each prompt, in order.

    At most `max_rows` rows decode at a time (all of them, if none is given); a prompt joins as
    soon as an answer is finished. Row i draws from its own stream, seeded by `seeds[i]`. DataError
    if a prompt and its answer cannot fit the context.
    """
    _check(model.config.max_position_embeddings, prompts, max_new_tokens)
    if not prompts:
        return []
    longest = max(map(len, prompts)) + max_new_tokens
    with torch.inference_mode(), _keeping_routing(model, keep_experts) as blocks:
        session = Session(model, rows=min(max_rows or len(prompts), len(prompts)), tokens=longest)
        requests = [
            _Request(prompt, np.random.Generator(np.random.Philox(seed)).random(max_new_tokens))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        waiting = list(reversed(requests))
        room = session._lengths_R.numel()
        running: list[_Request] = []
        logits_BV = torch.empty(0, model.config.vocab_size)
        while waiting or running:
            joining = [waiting.pop() for _ in range(min(room - len(running), len(waiting)))]
            if joining:
                joined_BV = session.join([request.prompt for request in joining])
                _note_prompts(joining, blocks)
                logits_BV = torch.cat([logits_BV.to(joined_BV.device), joined_BV])
                running += joining
            chosen_B = _draw_tokens(running, logits_BV, drawing, stop_tokens)
            for row in reversed(range(len(running))):
                if running[row].finished:
                    session.leave(row)
                    # The session's last row took this number.
                    running[row] = running[-1]
                    chosen_B[row] = chosen_B[len(running) - 1]
                    running.pop()
            if running:
                logits_BV = session.step(chosen_B[: len(running)])
                _note_step(running, blocks)
            else:
                logits_BV = logits_BV[:0]
    return [request.result(keep_experts) for request in requests]


@dataclass(slots=True)
class _Request:
    """A prompt, its answer so far, and the numbers that its tokens are drawn with."""

    prompt: Sequence[int]
    uniform_N: np.ndarray
    answer: Sample = field(default_factory=Sample)
    experts: list[np.ndarray] = field(default_factory=list)
    """[tokens, L, K] of each pass."""

    @property
    def finished(self) -> bool:
        """Stopped, or as long as allowed."""
        return self.answer.stopped or len(self.answer.token_ids) == len(self.uniform_N)

    def result(self, keep_experts: bool) -> Sample:
        """The finished answer."""
        if keep_experts:
            self.answer.experts = np.concatenate(self.experts)
        return self.answer


def _draw_tokens(
    running: Sequence[_Request],
    logits_BV: Tensor,
    drawing: Drawing,
    stop_tokens: Collection[int],
) -> Tensor:
    """Choose each row's next token and note it."""
    uniform_B = np.array([r.uniform_N[len(r.answer.token_ids)] for r in running])
    chosen_B, logprobs_B = draw(logits_BV, drawing, torch.from_numpy(uniform_B))
    for request, token, logprob in zip(
        running, chosen_B.tolist(), logprobs_B.tolist(), strict=True
    ):
        request.answer.token_ids.append(token)
        request.answer.logprobs.append(logprob)
        request.answer.stopped = token in stop_tokens
    return chosen_B


def draw(
    logits_BV: Float[Tensor, "B V"], drawing: Drawing, uniform_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens by inverse transform sampling, with their log-probabilities after truncation."""
    if drawing.temperature == 0:
        logprobs_BV = logits_BV.log_softmax(-1)
        chosen_B = logits_BV.argmax(-1)
        return chosen_B, logprobs_BV.gather(1, chosen_B[:, None]).squeeze(1)
    scaled_BV = _truncated(logits_BV / drawing.temperature, drawing)
    logprobs_BV = scaled_BV.log_softmax(-1)
    cumulative_BV = logprobs_BV.double().exp().cumsum(-1)
    target_B1 = uniform_B.to(cumulative_BV)[:, None] * cumulative_BV[:, -1:]
    chosen_B = torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(1)
    # Rounding may point past the end, or past the last token that has any probability.
    possible_BV = logprobs_BV > float("-inf")
    last_B = possible_BV.shape[1] - 1 - possible_BV.flip(1).int().argmax(1)
    chosen_B = torch.minimum(chosen_B, last_B)
    return chosen_B, logprobs_BV.gather(1, chosen_B[:, None]).squeeze(1)


def _truncated(logits_BV: Tensor, drawing: Drawing) -> Tensor:
    """Logits with -inf where top-k or top-p leave a token out."""
    if drawing.top_k is None and drawing.top_p >= 1:
        return logits_BV
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    if drawing.top_k is not None:
        sorted_BV[:, drawing.top_k :] = float("-inf")
    if drawing.top_p < 1:
        probabilities_BV = sorted_BV.double().softmax(-1)
        before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
        sorted_BV = sorted_BV.masked_fill(before_BV >= drawing.top_p, float("-inf"))
    return torch.empty_like(logits_BV).scatter_(1, order_BV, sorted_BV)


def _check(context: int, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    for prompt in prompts:
        if not prompt:
            raise DataError("a prompt has no tokens; begin it with the begin-of-text token")
        if len(prompt) + max_new_tokens > context:
            raise DataError(
                f"a prompt of {len(prompt)} tokens and max_new_tokens = {max_new_tokens} exceed "
                f"the model's context of {context}; shorten either"
            )


@contextmanager
def _keeping_routing(model: Transformer, keep: bool) -> Iterator[list[MoE]]:
    """The main model's MoE blocks if their choices are asked for, which they then keep."""
    layers = model.model.layers[: model.config.depth]
    blocks = [m for layer in layers for m in layer.modules() if isinstance(m, MoE)] if keep else []
    for block in blocks:
        block.keep_routing = True
    try:
        yield blocks
    finally:
        for block in blocks:
            block.keep_routing, block.routing = False, None


def _note_prompts(joining: Sequence[_Request], blocks: Sequence[MoE]) -> None:
    """Record where the prompts' tokens went, padding left out."""
    if blocks:
        chosen_TLK = _choices(blocks)
        by_row = chosen_TLK.reshape(len(joining), -1, *chosen_TLK.shape[1:])
        for request, row_SLK in zip(joining, by_row, strict=True):
            request.experts.append(row_SLK[: len(request.prompt)])


def _note_step(running: Sequence[_Request], blocks: Sequence[MoE]) -> None:
    """Record where the last tokens went."""
    if blocks:
        for request, token_LK in zip(running, _choices(blocks), strict=True):
            request.experts.append(token_LK[None])


def _choices(blocks: Sequence[MoE]) -> np.ndarray:
    """int32 [tokens of the pass, L, K]."""
    chosen = [block.routing[0] for block in blocks if block.routing is not None]
    return torch.stack(chosen, dim=1).to(torch.int32).cpu().numpy()
