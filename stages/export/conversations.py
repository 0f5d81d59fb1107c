"""Proof that a variant's chat template has every turn of a conversation, as its source's has them.

A template that leaves out a turn makes a server answer another conversation than the one it was
sent, with every weight right and no error. A model that was made elsewhere brought its template;
the variant's must then make the same of a conversation, character by character.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from configs.errors import ExportError
from stages.conventions import PLAIN_TEMPLATE, Conventions
from stages.export.client import Client, template_of
from stages.names import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG
from stages.templates import compile_template, render

Turns = Sequence[Mapping[str, str]]


def _turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    front = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant") * len(contents)
    return front + [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


CONVERSATIONS: tuple[Turns, ...] = (
    _turns("What is 12 + 34?"),
    _turns("What is 12 + 34?", "It is 46.", "And 5 + 5?"),
    _turns("What is 12 + 34?", "It is 46.", "And 5 + 5?", "That is 10.", "Which one is odd?"),
    _turns("What is 12 + 34?", "It is 46.", "And 5 + 5?", system="Answer with sums only."),
)
"""No text of a turn holds that of another, nor white space at its ends, which templates trim."""


class SourceChat:
    """How the source has a conversation: by the template that it brought, or else the plain one."""

    def __init__(self, folder: Path, conventions: Conventions) -> None:
        """Read the files of the model in `folder`; ArtifactError if its template is none."""
        text, self._place = PLAIN_TEMPLATE, "the plain template"
        config = {}
        if (folder / TOKENIZER_CONFIG).is_file():
            config = json.loads((folder / TOKENIZER_CONFIG).read_text(encoding="utf-8-sig"))
        if (found := template_of(folder, config)) is not None:
            text, self._place = found
        self._template = compile_template(text, self._place)
        self._config = conventions.tokenizer
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))

    def render(self, turns: Turns) -> str | None:
        """The text of a conversation, up to where the model is to go on; none if it is refused."""
        try:
            return render(self._template, turns, self._config, self._place)
        except ExportError:
            return None

    def encode(self, turns: Turns) -> list[int] | None:
        """The ids of that text."""
        if (text := self.render(turns)) is None:
            return None
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def prove_conversations(client: Client, source: SourceChat, variant: str) -> None:
    """ExportError names the template and the turn that it loses, or where it strays.

    What the source's own template refuses is not tried, and that it does without a system prompt is
    its maker's choice; that it loses what a user or the model said is not.
    """
    place = f"{variant}: {client.place}"
    for turns in CONVERSATIONS:
        if (expected := source.render(turns)) is None:
            continue
        found = client.render(turns)
        lost = _lost(found, turns)
        if lost is not None and (turns[lost]["role"] != "system" or _lost(expected, turns) != lost):
            raise ExportError(
                f"{place}: the chat template loses turn {lost + 1} of {len(turns)}, "
                f"{turns[lost]['content']!r} of the role {turns[lost]['role']!r}; mend the "
                f"template that the model brought, or take it away ({CHAT_TEMPLATE}, "
                f"chat_template in {TOKENIZER_CONFIG}) for the plain one"
            )
        if found != expected:
            at = next(
                (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
                min(len(found), len(expected)),
            )
            raise ExportError(
                f"{place}: the chat template makes {found[max(0, at - 20) : at + 20]!r} of a "
                f"conversation of {len(turns)} turns, where the source's makes "
                f"{expected[max(0, at - 20) : at + 20]!r}, from character {at} on; export again"
            )


def _lost(text: str, turns: Turns) -> int | None:
    """The first turn whose words are not in the text, behind those of the turns before it."""
    begin = 0
    for number, turn in enumerate(turns):
        at = text.find(turn["content"], begin)
        if at < 0:
            return number
        begin = at + len(turn["content"])
    return None
