"""Engram, conditional memory: what follows known n-grams, looked up instead of computed.

Described in arXiv 2601.07372, section 2. In front of a layer, each token's last 2, 3, ... tokens
are hashed, several times over, into tables of trained rows. The rows side by side are the memory e;
one value v = W_V e goes to every residual stream, through a gate of its own that compares the
stream's state with its key W_K e:

    alpha = sigmoid(sign(d) sqrt(max(|d|, 1e-6))),  d = norm(h) . norm(W_K e) / sqrt(D)
    u = alpha v,   H <- H + u + SiLU(conv(norm(u)))

The convolution is causal and by channel, and its taps start at 0. Neither n-grams nor taps reach
over the start of a document, unless documents attend to each other.

Before hashing, tokens that spell the same but for case, accents and white space become one
(`canonical_ids`). That map and the hash multipliers, which depend on it, are buffers of the state,
so that weights bring along what they were trained with. Without `set_vocabulary` every token stands
for itself.

Key and value projections are in high precision unless asked otherwise: a few layers have them.
Gradients of the table are dense: at each step AdamW moves the moments of every row, whichever were
read, and gradients take as much memory as the table. Tables of the published size would need a
sparse optimiser.

Axes: B rows, S positions, N residual streams, D model width, M tokens of the longest n-gram,
H tables (n-gram lengths by heads), E width of the memory, V vocabulary, K taps of the convolution,
P tokens that it looks back over.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from configs.engram import EngramConfig
from configs.errors import ConfigError
from configs.model import ModelConfig
from model.fp8.linear import Linear
from model.fp8.scheme import HIGH, Numerics
from model.passes import Cache, Pass, Step, Whole
from model.weight_cache import cast
from model.widening import widened

_LAYER_STRIDE = 10007
"""Sets the seeds of two layers' multipliers apart."""
_REPLACEMENT = "\ufffd"
"""What a decoder puts where bytes are no whole character."""


class Engram(nn.Module):
    """The memory in front of one layer."""

    canonical_ids: Tensor
    multipliers: Tensor
    rows_H: Tensor
    offsets_H: Tensor

    def __init__(self, config: ModelConfig, layer: int, numerics: Numerics = HIGH) -> None:
        super().__init__()
        engram = config.engram
        assert engram is not None
        self.config, self.layer, self.streams = engram, layer, config.streams
        width, epsilon = config.hidden_size, config.rms_norm_eps
        rows = torch.tensor([rows for heads in engram.table_rows(layer) for rows in heads])
        total = sum(sum(heads) for heads in engram.table_rows(layer))
        self.register_buffer("rows_H", rows, persistent=False)
        self.register_buffer("offsets_H", rows.cumsum(0) - rows, persistent=False)
        identity = torch.arange(config.vocab_size)
        self.register_buffer("canonical_ids", identity)
        self.register_buffer("multipliers", multipliers(engram, layer, config.vocab_size))
        self.table = MemoryTable(total, engram.head_dim, on_host=engram.table_device == "host")
        scheme = numerics.of("engram")
        self.key_proj = Linear(engram.width, config.streams * width, scheme)
        self.value_proj = Linear(engram.width, width, scheme)
        self.query_norm = StreamNorm(config.streams, width, epsilon)
        self.key_norm = StreamNorm(config.streams, width, epsilon)
        self.short_conv = ShortConv(engram, config.streams, width, epsilon, numerics)

    def forward(self, h_BSND: Float[Tensor, "B S N D"], batch: Pass) -> Float[Tensor, "B S N D"]:
        """The streams with what the memory adds to each."""
        index_BSH = self.table_index(self._ngrams(batch))
        memory_BSE = self.table(index_BSH).flatten(2).to(h_BSND.dtype)
        value_BSND = self.gated_values(h_BSND, memory_BSE)
        out_BSND: Tensor = h_BSND + value_BSND + self.short_conv(value_BSND, batch)
        return out_BSND

    def table_index(self, ngrams_BSM: Int[Tensor, "B S M"]) -> Int[Tensor, "B S H"]:
        """Which rows of the stacked tables hold n-grams, given as canonical ids, latest first.

        The hash of n tokens is the XOR of each times its own odd number; each head takes it modulo
        its own prime.
        """
        mixed_BSM = ngrams_BSM * self.multipliers
        hashes = [mixed_BSM[..., 0]]
        for back in range(1, mixed_BSM.shape[-1]):
            hashes.append(hashes[-1] ^ mixed_BSM[..., back])
        heads = self.config.n_head_per_ngram
        hash_BSH = torch.stack(hashes[1:], dim=-1).repeat_interleave(heads, dim=-1)
        return hash_BSH.remainder(self.rows_H) + self.offsets_H

    def gated_values(
        self, h_BSND: Float[Tensor, "B S N D"], memory_BSE: Float[Tensor, "B S E"]
    ) -> Float[Tensor, "B S N D"]:
        """What is read, as far as each stream's gate lets it through."""
        key_BSND = self.key_norm(self.key_proj(memory_BSE).unflatten(-1, (self.streams, -1)))
        products_BSND = widened(self.query_norm(h_BSND)) * widened(key_BSND)
        dot_BSN1 = products_BSND.sum(-1, keepdim=True) * h_BSND.shape[-1] ** -0.5
        root_BSN1 = dot_BSN1.abs().clamp(min=1e-6).sqrt() * dot_BSN1.sign()
        value_BS1D = self.value_proj(memory_BSE).unsqueeze(2)
        out_BSND: Tensor = torch.sigmoid(root_BSN1).to(value_BS1D.dtype) * value_BS1D
        return out_BSND

    def set_vocabulary(self, canonical: Sequence[int]) -> None:
        """Let token i count as `canonical[i]`, numbers from 0 without gaps.

        Ids past the end of `canonical`, which the tokenizer does not have, get numbers of their
        own. ConfigError if there are more than the model has tokens.
        """
        room = self.canonical_ids.numel() - len(canonical)
        if room < 0:
            raise ConfigError(
                f"model.vocab_size = {self.canonical_ids.numel()} is below the "
                f"{len(canonical)} tokens that the engram is told of; raise the first"
            )
        used = max(canonical, default=-1) + 1
        self.canonical_ids.copy_(torch.tensor([*canonical, *range(used, used + room)]))
        self.multipliers.copy_(multipliers(self.config, self.layer, used + room))

    def new_cache(self, rows: int, tokens: int) -> Cache:
        """Room for the canonical ids of the tokens before the next one, oldest first."""
        count = self.config.max_ngram_size - 1
        return {"ids_BM": self.canonical_ids.new_zeros(rows, count)}

    def _ngrams(self, batch: Pass) -> Tensor:
        """[B, S, M]: canonical ids of each token and of those before it, or of the pad token."""
        ids_BS = self.canonical_ids[batch.tokens_BS]
        pad = self.canonical_ids[self.config.pad_id]
        reach = self.config.max_ngram_size - 1
        if isinstance(batch, Step):
            cache_BM = batch.caches[self]["ids_BM"]
            window_BM = torch.cat([cache_BM, ids_BS], dim=1)
            cache_BM.copy_(window_BM[:, 1:])
            back_M = torch.arange(reach + 1, device=ids_BS.device)
            exists_BM = back_M <= batch.positions_B[:, None]
            return torch.where(exists_BM, window_BM.flip(1), pad).unsqueeze(1)
        if batch.caches is not None:
            assert batch.lengths_B is not None
            batch.caches[self]["ids_BM"].copy_(_last(ids_BS, batch.lengths_B, reach))
        back = [_earlier(ids_BS, distance, batch.segments_BS, pad) for distance in range(reach + 1)]
        return torch.stack(back, dim=-1)


class MemoryTable(nn.Module):
    """Rows to look up. On the host, they stay in main memory wherever the model is moved.

    Only the rows that were read travel, and their gradients back.
    """

    def __init__(self, rows: int, width: int, *, on_host: bool) -> None:
        super().__init__()
        self.on_host = on_host
        # A model on the meta device is there to be counted: it must cost no memory.
        moved = on_host and torch.get_default_device().type != "meta"
        self.weight = nn.Parameter(torch.empty(rows, width, device="cpu" if moved else None))

    def forward(self, index: Int[Tensor, "*B"]) -> Float[Tensor, "*B W"]:
        """The rows at `index`, on its device."""
        return F.embedding(index.to(self.weight.device), self.weight).to(index.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MemoryTable":
        if not self.on_host:
            super()._apply(fn, recurse)
            return self

        def without_moving(tensor: Tensor) -> Tensor:
            probe = fn(tensor.new_empty(0))
            if probe.device == tensor.device:
                return fn(tensor)
            if tensor.is_meta:
                return torch.empty_like(tensor, dtype=probe.dtype, device="cpu")
            return tensor.to(probe.dtype)

        super()._apply(without_moving, recurse)
        return self


class StreamNorm(nn.Module):
    """RMS norm over the last dim, with a weight for each stream."""

    def __init__(self, streams: int, width: int, epsilon: float) -> None:
        super().__init__()
        # One vector: as such it starts at 1 and does not decay.
        self.weight = nn.Parameter(torch.ones(streams * width))
        self.epsilon = epsilon

    def forward(self, x_BSND: Float[Tensor, "B S N D"]) -> Float[Tensor, "B S N D"]:
        """x / rms(x) * weight of its stream."""
        width = x_BSND.shape[-1]
        normed_BSND = F.rms_norm(x_BSND, (width,), None, self.epsilon)
        return normed_BSND * cast(self.weight, x_BSND.dtype).view(-1, width)


class ShortConv(nn.Module):
    """SiLU of a causal convolution of each channel, on the normed input.

    Its taps lie as many tokens apart as the longest n-gram has.
    """

    initial_values: ClassVar[dict[str, float]] = {"weight": 0.0}

    def __init__(
        self,
        engram: EngramConfig,
        streams: int,
        width: int,
        epsilon: float,
        numerics: Numerics = HIGH,
    ) -> None:
        super().__init__()
        self.shape, self.compute = (streams, width), numerics.compute
        self.dilation = engram.max_ngram_size
        self.norm = StreamNorm(streams, width, epsilon)
        self.weight = nn.Parameter(torch.empty(streams * width, engram.kernel_size))

    def forward(self, x_BSND: Float[Tensor, "B S N D"], batch: Pass) -> Float[Tensor, "B S N D"]:
        """The last tap is the current token's."""
        normed_BSND = self.norm(x_BSND)
        taps = self.weight.shape[1]
        distances = [self.dilation * (taps - 1 - tap) for tap in range(taps)]
        if isinstance(batch, Step):
            cache_BPND = batch.caches[self]["values_BPND"]
            window_BPND = torch.cat([cache_BPND, normed_BSND], dim=1)
            cache_BPND.copy_(window_BPND[:, 1:])
            seen = [window_BPND[:, distances[0] - distance, None] for distance in distances]
        else:
            self._remember(normed_BSND, batch)
            zero = normed_BSND.new_zeros(())
            seen = [_earlier(normed_BSND, d, batch.segments_BS, zero) for d in distances]
        weight_NDK = cast(self.weight, x_BSND.dtype).unflatten(0, self.shape)
        out_BSND = widened(seen[-1] * weight_NDK[..., -1])
        for tap in range(taps - 1):
            out_BSND = out_BSND + seen[tap] * weight_NDK[..., tap]
        return F.silu(out_BSND).to(x_BSND.dtype)

    def new_cache(self, rows: int, tokens: int) -> Cache:
        """Room for the normed inputs that the next token's taps reach, oldest first."""
        reach = (self.weight.shape[1] - 1) * self.dilation
        values = self.weight.new_zeros(rows, reach, *self.shape, dtype=self.compute)
        return {"values_BPND": values}

    def _remember(self, normed_BSND: Tensor, batch: Whole) -> None:
        if batch.caches is not None:
            assert batch.lengths_B is not None
            cache_BPND = batch.caches[self]["values_BPND"]
            cache_BPND.copy_(_last(normed_BSND, batch.lengths_B, cache_BPND.shape[1]))


def engram_before(config: ModelConfig, layer: int, numerics: Numerics) -> Engram | None:
    """The memory read in front of `layer`, if the config has one there."""
    if config.engram is None or layer not in config.engram.layer_ids:
        return None
    return Engram(config, layer, numerics)


def set_vocabulary(model: nn.Module, canonical: Sequence[int]) -> None:
    """Tell every memory of `model` what each token counts as (`canonical_ids`)."""
    for module in model.modules():
        if isinstance(module, Engram):
            module.set_vocabulary(canonical)


def canonical_ids(texts: Sequence[str | None]) -> list[int]:
    """A number for each token's text, equal for texts that spell the same, from 0 in their order.

    The same means: equal after NFKC, without accents and case, with runs of blanks as one and none
    at the ends. A text of which nothing would be left stands for itself. So does a token that is
    no whole character, told by U+FFFD in its text: equal texts of two such hide different bytes.
    None is the text of an id that is no token's, and each such id is another.
    """
    numbers: dict[str | int, int] = {}
    found = []
    for token, text in enumerate(texts):
        key: str | int = token
        if text is not None and _REPLACEMENT not in text:
            key = _folded(text) or text
        found.append(numbers.setdefault(key, len(numbers)))
    return found


def multipliers(engram: EngramConfig, layer: int, vocabulary: int) -> Int[Tensor, " M"]:
    """An odd number for each place in an n-gram of `layer`.

    Small enough that its product with any of `vocabulary` canonical ids fits in int64.
    """
    bound = max(1, torch.iinfo(torch.int64).max // vocabulary // 2)
    generator = np.random.default_rng(engram.seed + _LAYER_STRIDE * layer)
    drawn = generator.integers(0, bound, size=engram.max_ngram_size, dtype=np.int64)
    return torch.tensor((2 * drawn + 1).tolist(), dtype=torch.int64)


def _folded(text: str) -> str:
    decomposed = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    # Letter by letter: Greek's last sigma is no other letter.
    letters = [c.lower() for c in decomposed if not unicodedata.category(c).startswith("M")]
    blanks_as_one = re.sub(r"[ \t\r\n]+", " ", "".join(letters))
    return blanks_as_one if blanks_as_one == " " else blanks_as_one.strip()


def _earlier(x_BS: Tensor, distance: int, segments_BS: Tensor | None, absent: Tensor) -> Tensor:
    """`x` [B, S, ...] as seen `distance` tokens later; `absent` where that token is not there."""
    if distance == 0:
        return x_BS
    missing = min(distance, x_BS.shape[1])
    kept = x_BS[:, : x_BS.shape[1] - missing]
    shifted = torch.cat([absent.expand_as(x_BS[:, :missing]), kept], dim=1)
    if segments_BS is None:
        return shifted
    outside_BS = torch.zeros_like(segments_BS, dtype=torch.bool)
    outside_BS[:, missing:] = segments_BS[:, missing:] != segments_BS[:, : kept.shape[1]]
    return torch.where(_spread(outside_BS, x_BS), absent, shifted)


def _last(x_BS: Tensor, lengths_B: Tensor, count: int) -> Tensor:
    """The last `count` of each row's real entries [B, count, ...], oldest first; 0 before any."""
    positions_BP = lengths_B[:, None] - count + torch.arange(count, device=lengths_B.device)
    rows_B1 = torch.arange(len(lengths_B), device=lengths_B.device)[:, None]
    entries = x_BS[rows_B1, positions_BP.clamp(min=0)]
    return entries.masked_fill(_spread(positions_BP < 0, entries), 0)


def _spread(mask_BS: Tensor, x: Tensor) -> Tensor:
    """`mask_BS` with trailing dims of 1, as many as `x` [B, S, ...] has."""
    return mask_BS.view(*mask_BS.shape, *(1,) * (x.dim() - 2))
