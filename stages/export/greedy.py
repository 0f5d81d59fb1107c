"""How far a variant goes on as its source does, from held-out texts put to both as to a server.

The likeliest token of each position is compared in `parity.py` too, but there both models read the
corpus' own ids. Here each reads its own words, behind a prompt that came as text through its own
tokenizer and chat template: what a user of the two would see.
"""

from functools import cached_property
from itertools import takewhile

from cluster.generation import Sampling
from model import decode
from model.drawing import Drawing
from model.transformer import Transformer
from stages.export.client import Client
from stages.export.conversations import SourceChat

_ROWS = 64
"""Texts that a model goes on from at a time; their caches are in memory together."""


class Continuations:
    """The openings of texts, and how the source goes on from each."""

    def __init__(
        self, texts: list[str], source: Transformer, chat: SourceChat, sampling: Sampling
    ) -> None:
        """Of each text the first half is put as a question; those beyond the context are not."""
        room = source.config.max_position_embeddings - sampling.max_new_tokens
        self._prompts: list[tuple[str, list[int]]] = []
        for text in texts:
            opening = text[: len(text) // 2]
            ids = chat.encode(_question(opening)) if opening else None
            if ids is not None and 0 < len(ids) <= room:
                self._prompts.append((opening, ids))
        self._source, self._sampling = source, sampling

    @cached_property
    def of_source(self) -> list[list[int]]:
        """The ids of what the source says, for each opening."""
        return _go_on(self._source, [ids for _, ids in self._prompts], self._sampling)

    def agreement(self, client: Client, model: Transformer) -> float | None:
        """The share of tokens that are the source's, up to the first that is not.

        Of an opening count as many tokens as the longer answer has. None if there is no opening.
        """
        if not self._prompts:
            return None
        prompts = [client.encode_chat(_question(opening)) for opening, _ in self._prompts]
        sampling = client.sampling(self._sampling.max_new_tokens)
        pairs = list(zip(self.of_source, _go_on(model, prompts, sampling), strict=True))
        alike = sum(
            sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(one, other, strict=False)))
            for one, other in pairs
        )
        return alike / sum(max(len(one), len(other)) for one, other in pairs)


def _question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _go_on(model: Transformer, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
    """The tokens that the model takes greedily, that which ends an answer included."""
    answers = decode.sample(
        model,
        prompts,
        max_new_tokens=sampling.max_new_tokens,
        drawing=Drawing(0.0),
        stop_tokens=sampling.stop_tokens,
        seeds=[0] * len(prompts),
        max_rows=_ROWS,
    )
    return [one.token_ids for one in answers]
