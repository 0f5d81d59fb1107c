"""Decoding with caches: rows that join and leave a running batch, and what is drawn for them.

Each layer keeps of a row what its kind of attention needs (latents, or compressed entries and a
window). A row's answer depends on its prompt, its seed and the weights, never on the other rows,
but for the last bits of sums.

Axes: B rows, S positions, T positions with answers, V vocabulary, L layers with experts, K choices.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from configs.errors import ConfigError, DataError, TrainingError
from configs.seed import derive
from model.drawing import Drawing, draw, widest
from model.moe import MoE
from model.passes import Caches, Pass, Step, Whole
from model.transformer import Transformer

SHORTEST_REACH = 64
"""Positions that a step on a device looks back over at the least; beyond, powers of two."""


@dataclass(slots=True)
class Sample:
    """One answer: its tokens (the stop token included, if reached) and their log-probabilities."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Natural logarithms under the distribution that was drawn from (see `draw`)."""
    stopped: bool = False
    """False when the token limit cut the answer off."""
    experts: np.ndarray | None = field(default=None, compare=False)
    """On request int32 [tokens read, L, K]: the experts that each token of prompt and answer went
    to; the answer's last token was never read."""


class Session:
    """A running batch: rows join, take steps together, and leave one by one."""

    def __init__(
        self, model: Transformer, *, rows: int, tokens: int, keep_routing: bool = False
    ) -> None:
        """Caches for at most `rows` rows of at most `tokens` tokens, prompt and answer."""
        self.model = model
        self.keep_routing = keep_routing
        self.routing_TLK: Tensor | None = None
        """With `keep_routing`: the experts that the tokens of the last pass went to, rows one after
        another, padding included."""
        self.rows = rows
        self.count = 0
        """Rows in the batch now; they are numbered from 0."""
        self._tokens = tokens
        self._device = model.lm_head.weight.device
        self._caches = model.new_caches(rows, tokens)
        # On the device for the layers, and here for the shapes: neither has to ask the other.
        self._lengths_R = torch.zeros(rows, dtype=torch.int64, device=self._device)
        self._lengths: list[int] = []

    def join(self, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "B V"]:
        """Read the prompts into new rows at the end of the batch; logits after each."""
        assert self.count + len(prompts) <= self.rows, "more rows than the session has room for"
        rows = slice(self.count, self.count + len(prompts))
        lengths_B = torch.tensor([len(prompt) for prompt in prompts])
        tokens_BS = torch.zeros(len(prompts), int(lengths_B.max()), dtype=torch.int64)
        for row, prompt in zip(tokens_BS, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        lengths_B = lengths_B.to(self._device)
        caches = self._view(rows)
        for cache in caches.values():
            for tensor in cache.values():
                tensor.zero_()
        batch = Whole(
            tokens_BS.to(self._device),
            caches=caches,
            lengths_B=lengths_B,
            routing=self.keep_routing,
        )
        hidden_BSD = self._read(batch)
        last_BD = hidden_BSD[torch.arange(len(prompts), device=self._device), lengths_B - 1]
        self._lengths_R[rows] = lengths_B
        self._lengths += map(len, prompts)
        self.count += len(prompts)
        return self.model.logits(last_BD)

    def step(self, tokens_B: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        """Append one token to every row; logits after it."""
        rows = slice(0, self.count)
        tokens_B1 = tokens_B.to(self._device)[:, None]
        # A copy: the pass must not see its own positions move on.
        batch = Step(
            tokens_B1,
            self._lengths_R[rows].clone(),
            self._view(rows),
            self.keep_routing,
            self._reach(),
        )
        hidden_B1D = self._read(batch)
        self._lengths_R[rows] += 1
        self._lengths = [length + 1 for length in self._lengths]
        return self.model.logits(hidden_B1D[:, 0])

    def leave(self, row: int) -> None:
        """Drop a row; the last row takes its number."""
        last = self.count - 1
        if row != last:
            for cache in self._caches.values():
                for tensor in cache.values():
                    tensor[row] = tensor[last]
            self._lengths_R[row] = self._lengths_R[last]
            self._lengths[row] = self._lengths[last]
        self._lengths.pop()
        self.count = last

    def _read(self, batch: Pass) -> Float[Tensor, "B S D"]:
        hidden_BSD, reports = self.model.read_and_report(batch)
        chosen = [report.routing for report in reports if report.routing is not None]
        self.routing_TLK = torch.stack(chosen, dim=1) if chosen else None
        return hidden_BSD

    def _reach(self) -> int:
        """How far back the next step looks. Devices look as far for many steps in turn, which then
        are the same operations on the same shapes; a CPU reads no more than there is."""
        longest = max(self._lengths, default=0) + 1
        if self._device.type == "cpu":
            return longest
        return min(max(SHORTEST_REACH, 1 << (longest - 1).bit_length()), self._tokens)

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
) -> Int[Tensor, "B T"]:
    """Prompts of one length, continued to T tokens by as many as the longest answer has.

    An answer that reached a stop token is filled up with that token. Sampling is repeatable by
    `seed`. Errors are those of `sample`.
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
    soon as an answer is finished. Row i draws from its own stream, seeded by `seeds[i]`.
    ConfigError for a number that means nothing, DataError for a prompt that the model cannot read,
    TrainingError if its logits are not finite.
    """
    _check(model, prompts, max_new_tokens, max_rows)
    requests = [
        _Request(prompt, np.random.Generator(np.random.Philox(seed)).random(max_new_tokens))
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    stops = frozenset(stop_tokens)
    waiting = requests[::-1]
    running: list[_Request] = []
    if keep_experts and not _has_experts(model):
        raise ConfigError("keep_experts is asked for, but no layer of the model has experts")
    with _evaluating(model):
        session = Session(
            model,
            rows=min(max_rows or len(prompts), len(prompts)),
            tokens=max(map(len, prompts), default=0) + max_new_tokens,
            keep_routing=keep_experts,
        )
        uniforms = _Uniforms(session.rows, max_new_tokens, model.lm_head.weight.device)
        logits_BV = model.lm_head.weight.new_empty(0, model.config.vocab_size)
        while waiting or running:
            room = min(session.rows - len(running), len(waiting))
            if room:
                joining = [waiting.pop() for _ in range(room)]
                uniforms.join([request.uniform_N for request in joining])
                joined_BV = session.join([request.prompt for request in joining])
                _note_prompts(joining, session.routing_TLK)
                logits_BV = torch.cat([logits_BV, joined_BV])
                running += joining
            chosen_B = _draw_tokens(running, logits_BV, drawing, uniforms, stops)
            chosen_B = _dismiss(session, running, uniforms, chosen_B)
            if running:
                logits_BV = session.step(chosen_B)
                _note_step(running, session.routing_TLK)
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


class _Uniforms:
    """The numbers that rows draw with, on the device from the moment a row joins."""

    def __init__(self, rows: int, tokens: int, device: torch.device) -> None:
        self._numbers_RN = torch.zeros(rows, tokens, dtype=widest(device), device=device)
        self._used_R1 = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._count = 0

    def join(self, uniforms: Sequence[np.ndarray]) -> None:
        """New rows at the end, with all numbers of their answers."""
        rows = slice(self._count, self._count + len(uniforms))
        self._numbers_RN[rows] = torch.from_numpy(np.stack(uniforms)).to(self._numbers_RN)
        self._used_R1[rows] = 0
        self._count = rows.stop

    def next(self) -> Float[Tensor, " B"]:
        """Each row's next number."""
        used_B1 = self._used_R1[: self._count]
        uniform_B = self._numbers_RN[: self._count].gather(1, used_B1).squeeze(1)
        used_B1 += 1
        return uniform_B

    def leave(self, row: int) -> None:
        """Drop a row; the last row takes its number."""
        self._count -= 1
        for tensor in (self._numbers_RN, self._used_R1):
            tensor[row] = tensor[self._count]


def _draw_tokens(
    running: Sequence[_Request],
    logits_BV: Tensor,
    drawing: Drawing,
    uniforms: _Uniforms,
    stops: frozenset[int],
) -> Tensor:
    """Choose each row's next token and note it."""
    chosen_B, logprobs_B = draw(logits_BV, drawing, uniforms.next())
    for request, token, logprob in zip(running, *_read(chosen_B, logprobs_B), strict=True):
        if not math.isfinite(logprob):
            raise TrainingError(
                f"logits after {len(request.prompt)} tokens of prompt and "
                f"{len(request.answer.token_ids)} of answer are not finite; the weights are "
                "damaged, or training diverged: sample from an earlier checkpoint"
            )
        answer = request.answer
        answer.token_ids.append(token)
        answer.logprobs.append(logprob)
        answer.stopped = token in stops
    return chosen_B


def _read(chosen_B: Tensor, logprobs_B: Tensor) -> tuple[list[int], list[float]]:
    """Both as numbers, in one copy to the host, which waits for it."""
    if logprobs_B.dtype != torch.float32:
        return chosen_B.tolist(), logprobs_B.tolist()
    # float32 has no room for every token's number, and not every device has float64.
    tokens, bits = torch.stack([chosen_B, logprobs_B.view(torch.int32).long()]).tolist()
    return tokens, np.array(bits, dtype=np.int32).view(np.float32).tolist()


def _dismiss(
    session: Session, running: list[_Request], uniforms: _Uniforms, chosen_B: Tensor
) -> Tensor:
    """Let finished rows leave; the tokens of those that stay."""
    for row in reversed(range(len(running))):
        if running[row].finished:
            session.leave(row)
            uniforms.leave(row)
            # As in the session, the last row takes this number.
            running[row], chosen_B[row] = running[-1], chosen_B[len(running) - 1]
            running.pop()
    return chosen_B[: len(running)]


def _check(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    max_rows: int | None,
) -> None:
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens = {max_new_tokens}, but an answer has 1 token or more")
    if max_rows is not None and max_rows < 1:
        raise ConfigError(f"max_rows = {max_rows}, but 1 row or more must decode; none means all")
    context, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    for prompt in prompts:
        if not prompt:
            raise DataError("a prompt has no tokens; begin it with the begin-of-text token")
        if len(prompt) + max_new_tokens > context:
            raise DataError(
                f"a prompt of {len(prompt)} tokens and max_new_tokens = {max_new_tokens} exceed "
                f"the model's context of {context}; shorten either"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise DataError(
                f"a prompt holds tokens {min(prompt)} to {max(prompt)}, but the model's are 0 to "
                f"{vocabulary - 1}; encode it with the model's own tokenizer"
            )


def _has_experts(model: Transformer) -> bool:
    layers = model.model.layers[: model.config.depth]
    return any(isinstance(module, MoE) for layer in layers for module in layer.modules())


@contextmanager
def _evaluating(model: Transformer) -> Iterator[None]:
    """No gradients, and evaluation mode."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def _note_prompts(joining: Sequence[_Request], routing_TLK: Tensor | None) -> None:
    """Record where the prompts' tokens went, padding left out."""
    if routing_TLK is not None:
        by_row = _on_host(routing_TLK).reshape(len(joining), -1, *routing_TLK.shape[1:])
        for request, row_SLK in zip(joining, by_row, strict=True):
            request.experts.append(row_SLK[: len(request.prompt)])


def _note_step(running: Sequence[_Request], routing_TLK: Tensor | None) -> None:
    """Record where the last tokens went."""
    if routing_TLK is not None:
        for request, token_LK in zip(running, _on_host(routing_TLK), strict=True):
            request.experts.append(token_LK[None])


def _on_host(routing_TLK: Tensor) -> np.ndarray:
    """int32 [tokens of the pass, L, K]."""
    return routing_TLK.to(torch.int32).cpu().numpy()
