"""What a model says is shown letter by letter, whatever it says."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from stages.markdown import code, code_cell, plain, row

AWKWARD = [
    "`",
    "a`b``c```",
    "``",
    " ",
    " a ",
    "|",
    "a|b|",
    "\\",
    "a\\",
    "a\\|b",
    "\\\\|",
    "`|`",
    "<script>alert(1)</script>",
    "<b>&amp;",
    "&#124;",
    "**bold** [x](http://y) ![z](w)",
    "# h",
    "- item",
    "---",
    "$x$",
    "~~~",
    "03+04=",
    "1. one",
]
"""Each means something to some reader of Markdown."""


def shown(tokens: list[Token]) -> list[str]:
    """The text of each table cell or paragraph, as a reader sees it."""
    found = []
    for token in tokens:
        if token.type == "inline":
            children = token.children or []
            assert {one.type for one in children} <= {"text", "code_inline", "text_special"}
            found.append("".join(one.content for one in children))
        assert not token.type.startswith("html")
    return found


def in_table(*cells: str) -> list[str]:
    reader = MarkdownIt("commonmark").enable("table")
    lines = [row(*["head"] * len(cells)), "|" + "---|" * len(cells), row(*cells), ""]
    return shown(reader.parse("\n".join(lines)))[len(cells) :]


def alone(text: str) -> list[str]:
    return shown(MarkdownIt("commonmark").parse(f"It says {text}."))


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_is_read_as_it_is(text: str) -> None:
    assert alone(code(text)) == [f"It says {text}."]
    cells = in_table(code_cell(text), plain(text), "next")
    assert [cells[0].strip(), *cells[1:]] == [text.strip(), text.strip(), "next"]


@settings(deadline=None, derandomize=True)
@given(st.text(st.sampled_from("`|\\ a<&*_[\n"), min_size=1, max_size=12))
def test_no_text_breaks_a_row(text: str) -> None:
    visible = text.replace("\n", "⏎")
    cells = in_table(code_cell(text), "next")
    assert [cells[0].strip(), *cells[1:]] == [visible.strip(), "next"]


def test_what_cannot_be_seen_is_marked_and_stays_on_one_line() -> None:
    assert code("a\nb\tc\r\x00\u2028") == "`a⏎b⇥c���`"
    assert plain("a\nb\u2029") == "a&#9166;b&#65533;"


def test_a_bar_after_a_backslash_is_in_no_code() -> None:
    """Of two backslashes before a bar, GitHub's reader and MLflow's take the first for the other's
    escape, so that the bar ends the cell; the reader of these tests does not."""
    assert code_cell("a\\|b") == "a&#92;&#124;b"


def test_an_empty_answer_is_seen_to_be_empty() -> None:
    assert code("") == "(empty)"


def test_a_long_answer_is_cut() -> None:
    assert code("x" * 100) == f"`{'x' * 48}…`"
