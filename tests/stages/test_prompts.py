"""Problems to token ids and back."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel

from configs.errors import DataError
from stages.framing import BOS_ID, BOS_TOKEN, EOS_ID, EOS_TOKEN
from stages.prompts import answer_text, encode_prompts
from stages.tokens import load_tokenizer
from stages.verifiers import Problem

PROBLEM = Problem(id="sum/12+34=", prompt="12+34=", answer="46", source="arithmetic")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One token a byte, after the two special ones."""
    names = [BOS_TOKEN, EOS_TOKEN, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = ByteLevel()
    made.add_special_tokens([BOS_TOKEN, EOS_TOKEN])
    return made


def test_a_prompt_is_begin_of_text_and_the_problems_text(tokenizer: Tokenizer) -> None:
    (prompt,) = encode_prompts([PROBLEM], tokenizer, context_tokens=10, max_new_tokens=3)
    assert prompt.token_ids[0] == BOS_ID
    assert tokenizer.decode(list(prompt.token_ids[1:])) == "12+34="
    assert prompt.problem == PROBLEM


def test_a_prompt_that_leaves_no_room_is_an_error_with_both_numbers(tokenizer: Tokenizer) -> None:
    message = r"sum/12\+34=: its prompt of 7 tokens and max_new_tokens = 3 .* of 9 tokens"
    with pytest.raises(DataError, match=message):
        encode_prompts([PROBLEM], tokenizer, context_tokens=9, max_new_tokens=3)


def test_an_answer_is_the_text_before_end_of_text(tokenizer: Tokenizer) -> None:
    body = tokenizer.encode("46").ids
    assert answer_text(tokenizer, [*body, EOS_ID]) == "46"
    assert answer_text(tokenizer, tuple(body)) == "46"
    assert answer_text(tokenizer, [EOS_ID]) == ""


def test_a_special_token_inside_an_answer_stays_visible(tokenizer: Tokenizer) -> None:
    four, six = tokenizer.encode("46").ids
    assert answer_text(tokenizer, [four, BOS_ID, six, EOS_ID]) == f"4{BOS_TOKEN}6"


def test_whichever_end_token_comes_ends_the_answer(tokenizer: Tokenizer) -> None:
    body = tokenizer.encode("46").ids
    assert answer_text(tokenizer, [*body, 5], (EOS_ID, 5)) == "46"
    assert answer_text(tokenizer, [*body, EOS_ID], (EOS_ID, 5)) == "46"
    assert answer_text(tokenizer, [*body, 5]) != "46"


def test_text_that_spells_a_special_token_stays_text_once_loaded(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    sly = PROBLEM.model_copy(update={"prompt": f"1{EOS_TOKEN}{BOS_TOKEN}2="})
    (prompt,) = encode_prompts([sly], loaded, context_tokens=99, max_new_tokens=3)
    assert not {BOS_ID, EOS_ID} & set(prompt.token_ids[1:])
    assert answer_text(loaded, prompt.token_ids[1:]) == sly.prompt
