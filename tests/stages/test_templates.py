"""Chat templates of strangers become the text that transformers makes of them, or an error."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from configs.errors import ArtifactError, ExportError
from stages.templates import DEFAULT, compile_template, named_templates, named_tokens, render
from tests.stages.bundles import make_tokenizer

TURNS = [
    {"role": "user", "content": "1+1="},
    {"role": "assistant", "content": "2 <é>"},
    {"role": "user", "content": "2+2="},
]
TOKENS: dict[str, Any] = {
    "bos_token": "<|begin_of_text|>",
    "eos_token": {"__type": "AddedToken", "content": "<|end_of_text|>", "special": True},
    "unk_token": "<|end_of_text|>",
    "cls_token": {"__type": "AddedToken", "content": "<|begin_of_text|>", "special": True},
    "image_token": "<|end_of_text|>",
    "extra_special_tokens": {"video_token": "<|begin_of_text|>", "ear": "<|end_of_text|>"},
}
ALL_NAMES = (
    "{% for one in [bos_token, eos_token, pad_token, unk_token, sep_token, cls_token, mask_token,"
    " image_token, video_token, ear] %}{{ one if one is defined else 'none' }}|{% endfor %}"
)
GENERATION = (
    "{% set x = 'out' %}{% for m in messages %}{% if m.role == 'assistant' %}\n"
    "{% generation %}\n  {% set x = m.content %}{{ x }}{{ loop.index }}\n{% endgeneration %}\n"
    "{% else %}{{ m.content }}{% endif %}{{ x }}{% endfor %}"
)


@pytest.mark.parametrize(
    "template",
    [
        ALL_NAMES,
        GENERATION,
        "{%- generation -%} a {%- endgeneration -%} b",
        "{{ messages | tojson(indent=1) }}{% if tools is none %}no tools{% endif %}",
    ],
)
@pytest.mark.parametrize("tokens", [TOKENS, {}, {"unk_token": None, "sep_token": None}])
def test_a_conversation_becomes_what_transformers_makes_of_it(
    tmp_path: Path, template: str, tokens: dict[str, Any]
) -> None:
    make_tokenizer(tmp_path / "tokenizer.json")
    config = {**tokens, "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    compiled = compile_template(template, "mine")
    assert render(compiled, TURNS, tokens, "mine") == expected
    assert named_tokens(tokens) == theirs.special_tokens_map


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no') }}", r"\(no\)"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ range(10 ** 9) | list }}", "OverflowError"),
        ("{{ strftime_now() }}", "TypeError"),
        ("{{ [].pop() }}", r"SecurityError|\(.*pop"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{{ messages | tojson(indent='x' * 2, cls=1) }}", "TypeError"),
    ],
)
def test_whatever_a_template_raises_is_an_error_that_says_where_it_stands(
    template: str, said: str
) -> None:
    compiled = compile_template(template, "mine")
    with pytest.raises(ExportError, match=rf"mine: the chat template refuses .*({said})"):
        render(compiled, TURNS, {}, "mine")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("a\n{% for %}", "at line 2"),
        ("{% break %}", "outside loop"),
        ("{% generation %}", "at line 1"),
        ("{{ x | nosuch }}", "at line 1: No filter named"),
    ],
)
def test_what_is_no_template_is_named_by_where_it_stands(template: str, said: str) -> None:
    with pytest.raises(ArtifactError, match=f"mine is no template, .*{said}"):
        compile_template(template, "mine")


def test_templates_have_names_and_a_single_one_is_the_default() -> None:
    listed = [{"name": "tool", "template": "a"}, {"name": DEFAULT, "template": "b"}]
    assert named_templates(listed, "mine") == {"tool": "a", DEFAULT: "b"}
    assert named_templates({"tool": "a"}, "mine") == {"tool": "a"}
    assert named_templates("b", "mine") == {DEFAULT: "b"}
    nothings: list[object] = [None, "", [], {}, [{"name": DEFAULT, "template": ""}]]
    for nothing in nothings:
        assert named_templates(nothing, "mine") == {}


@pytest.mark.parametrize("odd", [["x"], 5, True, [{"name": "a"}], [{"template": "a"}], {"a": 1}])
def test_a_field_that_holds_no_templates_is_named(odd: Any) -> None:
    with pytest.raises(ArtifactError, match=r"mine = .* is neither a template nor a list"):
        named_templates(odd, "mine")
