"""A variant asked as a server is asked: text in, through the variant's own files, text out.

The logits of `parity.py` compare weights on token ids that the corpus holds. What a server is sent
is text, which passes through `tokenizer.json`, the chat template and the generation config first;
a fault there leaves every weight right and every answer wrong. So each variant must encode text as
training did, and is asked held-out problems through these files alone.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path

from tokenizers import Tokenizer

from cluster.generation import Sampling
from configs.delivery import ExportConfig
from configs.errors import ExportError
from model.transformer import Transformer
from stages.answers import Answered, ask, choose, sampler_of
from stages.artifacts import Asked, Corpus
from stages.estimators import pass_at_k
from stages.export.client import Client
from stages.framing import BOS_ID, EOS_ID
from stages.names import TOKENIZER
from stages.prompts import Prompt, answer_text
from stages.shards import Int64
from stages.tokens import load_tokenizer
from stages.verifiers import read_problems


class Examination:
    """What every variant of a bundle is asked, and how its source answers."""

    def __init__(
        self,
        corpus: Corpus,
        folder: Path,
        source: Transformer,
        end_tokens: tuple[int, ...],
        rows_NS: Int64,
        config: ExportConfig,
        *,
        seed: int,
    ) -> None:
        """Choose held-out problems that fit the context, and texts, among them those of `rows_NS`.

        `folder` holds the tokenizer of the model `source`.
        """
        self.config, self.seed = config, seed
        self.tokenizer = load_tokenizer(folder / TOKENIZER)
        """Reads text as training did."""
        self._source, self._end_tokens = source, end_tokens
        held_out = (
            read_problems(corpus.path("problems", "held_out.parquet"))
            if corpus.held_out_problems and config.problems
            else []
        )
        room = source.config.max_position_embeddings - config.max_new_tokens
        every = [Prompt(one, self.ids(one.prompt)) for one in held_out]
        fitting = [one for one in every if len(one.token_ids) <= room]
        chosen = {
            one.id for one in choose([p.problem for p in fitting], config.problems, seed=seed)
        }
        self.prompts = [one for one in fitting if one.problem.id in chosen]
        questions = (one.problem.prompt for one in self.prompts)
        pieces = [list(_pieces(self.tokenizer, row)) for row in rows_NS.tolist()]
        self.texts = [*questions, *(text for row in pieces for text in row)]
        """Documents and questions that must be encoded as training encodes them."""
        self.longest = [max(row, key=len) for row in pieces if row]
        """Of each row the longest document, or part of one."""

    def ids(self, text: str) -> tuple[int, ...]:
        """A text as training has it, up to where it goes on."""
        return (BOS_ID, *self.tokenizer.encode(text, add_special_tokens=False).ids)

    @cached_property
    def answered(self) -> list[Answered]:
        """What the source answers, asked as the line asks: by token ids."""
        sampling = Sampling(self.config.max_new_tokens, 1.0, self._end_tokens)
        return _ask(self._source, self.prompts, sampling, self.config, self.tokenizer, self.seed)


def prove_text(client: Client, exam: Examination, variant: str) -> None:
    """ExportError unless the variant's own tokenizer encodes text as training encoded it.

    Text that spells a token stays text in training; of a client this must be asked. What looks like
    a control token and is not called special becomes one in every client: such a text proves
    nothing.
    """
    spelt = {token.content for token in client.added_tokens}
    unsplit = {token.content for token in client.added_tokens if not token.special} & {
        token.content
        for token in exam.tokenizer.get_added_tokens_decoder().values()
        if token.special
    }
    for text in exam.texts:
        if any(token in text for token in unsplit):
            continue
        expected = list(exam.ids(text))
        found = client.encode(text, split_special_tokens=any(token in text for token in spelt))
        if found != expected:
            at = next(
                (
                    i
                    for i, (one, two) in enumerate(zip(found, expected, strict=False))
                    if one != two
                ),
                min(len(found), len(expected)),
            )
            raise ExportError(
                f"{variant}: its tokenizer encodes {text[:40]!r} as {found[: at + 3]}, but "
                f"training as {expected[: at + 3]}, from token {at} on; mend the post-processor or "
                "the added tokens in tokenizer.json"
            )


def ask_variant(client: Client, model: Transformer, exam: Examination) -> Asked | None:
    """How the variant answers through its own files; none if there is nothing to ask.

    Questions go through the chat template. Where the model brought one of its own, plain prompts
    are asked as well, since that is how the line itself asks.
    """
    if not exam.prompts:
        return None
    problems = [prompt.problem for prompt in exam.prompts]
    chats = [
        Prompt(one, tuple(client.encode_chat([{"role": "user", "content": one.prompt}])))
        for one in problems
    ]
    plain = [Prompt(one, tuple(client.encode(one.prompt))) for one in problems]
    sampling = client.sampling(exam.config.max_new_tokens)
    found = _ask(model, plain, sampling, exam.config, client.tokenizer, exam.seed)
    chat = (
        found
        if chats == plain
        else _ask(model, chats, sampling, exam.config, client.tokenizer, exam.seed)
    )
    return Asked(
        problems=len(found),
        source_greedy_accuracy=_greedy(exam.answered),
        greedy_accuracy=_greedy(found),
        greedy_verdicts_apart=sum(
            one.greedy_correct != other.greedy_correct
            for one, other in zip(found, exam.answered, strict=True)
        ),
        chat_greedy_accuracy=_greedy(chat),
        pass_at_1=_pass_at_1(found),
        chat_pass_at_1=_pass_at_1(chat),
    )


def require(asked: Asked, variant: str, config: ExportConfig) -> None:
    """ExportError if the variant is right less often than its source, by more than is allowed.

    A share of few problems counts as the next whole problem: rounding may turn a near tie.
    """
    lost = round((asked.source_greedy_accuracy - asked.greedy_accuracy) * asked.problems)
    if lost > math.ceil(round(config.max_accuracy_loss * asked.problems, 6)):
        raise ExportError(
            f"{variant}: of {asked.problems} held-out problems {asked.greedy_accuracy:.1%} are "
            f"right greedily through its own files, {asked.source_greedy_accuracy:.1%} in the "
            f"source, further apart than export.max_accuracy_loss = {config.max_accuracy_loss}; "
            "train the model further, or raise that setting"
        )


def _ask(
    model: Transformer,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    config: ExportConfig,
    tokenizer: Tokenizer,
    seed: int,
) -> list[Answered]:
    room = model.config.max_position_embeddings - config.max_new_tokens
    if too_long := next((one for one in prompts if len(one.token_ids) > room), None):
        raise ExportError(
            f"problem {too_long.problem.id}: the chat template makes {len(too_long.token_ids)} "
            f"tokens of it, which with export.max_new_tokens = {config.max_new_tokens} exceed the "
            f"context of {model.config.max_position_embeddings}; lower the second, or set "
            "export.problems = 0"
        )
    answered: list[Answered] = []
    for part in ask(
        sampler_of(model),
        prompts,
        sampling,
        samples_per_problem=config.samples_per_problem,
        seed=seed,
        answer_text=partial(answer_text, tokenizer, end_tokens=sampling.stop_tokens),
    ):
        answered += part
    return answered


def _greedy(answered: Sequence[Answered]) -> float:
    return sum(one.greedy_correct for one in answered) / len(answered)


def _pass_at_1(answered: Sequence[Answered]) -> float:
    rates = [
        pass_at_k(num_samples=len(one.correct), num_correct=sum(one.correct), k=1)
        for one in answered
    ]
    return sum(rates) / len(rates)


def _pieces(tokenizer: Tokenizer, row_S: list[int]) -> Iterator[str]:
    """The text of each document of a row, also of those whose begin or end is in another row."""
    body: list[int] = []
    for token in (*row_S, EOS_ID):
        if token not in (BOS_ID, EOS_ID):
            body.append(token)
        elif body:
            yield tokenizer.decode(body, skip_special_tokens=False)
            body = []
