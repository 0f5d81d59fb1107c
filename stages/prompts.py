"""Problems to token ids, and token ids back to answers: what RL and evaluation share."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from configs.errors import DataError
from stages.framing import BOS_ID, EOS_ID
from stages.verifiers import Problem


@dataclass(frozen=True, slots=True)
class Prompt:
    """A problem as the model sees it: the begin-of-text token, then the problem's text."""

    problem: Problem
    token_ids: tuple[int, ...]


def encode_prompts(
    problems: Iterable[Problem], tokenizer: Tokenizer, *, context_tokens: int, max_new_tokens: int
) -> list[Prompt]:
    """Tokenise problems; DataError unless each leaves room in the context for its whole answer."""
    prompts = []
    for problem in problems:
        encoded = tokenizer.encode(problem.prompt, add_special_tokens=False).ids
        prompt = Prompt(problem=problem, token_ids=(BOS_ID, *encoded))
        if len(prompt.token_ids) + max_new_tokens > context_tokens:
            raise DataError(
                f"problem {problem.id}: its prompt of {len(prompt.token_ids)} tokens and "
                f"max_new_tokens = {max_new_tokens} exceed the model's context of "
                f"{context_tokens} tokens; shorten the problem, lower max_new_tokens, or raise "
                "model.max_position_embeddings"
            )
        prompts.append(prompt)
    return prompts


def answer_text(
    tokenizer: Tokenizer, token_ids: Sequence[int], end_tokens: Collection[int] = (EOS_ID,)
) -> str:
    """The text of an answer, without the token that ends it, one of `end_tokens`.

    Any other special token stays visible, so that an answer cannot pass by hiding one inside.
    """
    closed = bool(token_ids) and token_ids[-1] in end_tokens
    body = list(token_ids[:-1] if closed else token_ids)
    return tokenizer.decode(body, skip_special_tokens=False)
