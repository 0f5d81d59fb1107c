"""A client of a variant's folder: text to ids and back, by the files that servers read.

It shares nothing with how the line itself encodes: the tokenizer is read as it is, the chat
template is rendered as transformers renders one, and sampling is as the generation config says.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer

from cluster.generation import Sampling
from configs.errors import ArtifactError, ExportError
from stages.conventions import CHAT_TEMPLATE, GENERATION_CONFIG, TOKENIZER_CONFIG
from stages.tokens import TOKENIZER


class Client:
    """Speaks to a model by the files of its folder, as servers and transformers do."""

    def __init__(self, folder: Path) -> None:
        """Read the files; ArtifactError if a template cannot be."""
        self.tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        self._config = json.loads((folder / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
        self.generation = json.loads((folder / GENERATION_CONFIG).read_text(encoding="utf-8"))
        self.tokenizer.encode_special_tokens = self._config.get("split_special_tokens", False)
        self._splitting = Tokenizer.from_str(self.tokenizer.to_str())
        self._splitting.encode_special_tokens = True
        self._template = _compile(_template_of(folder, self._config))

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        found = self.generation["eos_token_id"]
        return tuple(found) if isinstance(found, list) else (found,)

    @property
    def added_tokens(self) -> tuple[AddedToken, ...]:
        """Tokens that a text becomes by spelling them, unless they are special and it is split."""
        return tuple(self.tokenizer.get_added_tokens_decoder().values())

    def encode(self, text: str, *, split_special_tokens: bool = False) -> list[int]:
        """The ids of a plain prompt; those of special tokens split, if the caller asks for it."""
        tokenizer = self._splitting if split_special_tokens else self.tokenizer
        ids: list[int] = tokenizer.encode(text).ids
        return ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a conversation, up to where the model is to go on.

        ExportError if the template refuses it.
        """
        names = {
            name: _content(self._config.get(name))
            for name in ("bos_token", "eos_token", "pad_token")
        }
        try:
            text = self._template.render(
                messages=messages, add_generation_prompt=True, tools=None, documents=None, **names
            )
        except jinja2.TemplateError as error:
            raise ExportError(
                f"the chat template refuses a conversation of one question ({error}); mend "
                f"{CHAT_TEMPLATE} or chat_template in {TOKENIZER_CONFIG}"
            ) from None
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def sampling(self, max_new_tokens: int) -> Sampling:
        """How servers sample by default, by the generation config."""
        asked = self.generation
        greedy = not asked.get("do_sample", False)
        return Sampling(
            max_new_tokens=max_new_tokens,
            temperature=0.0 if greedy else float(asked.get("temperature", 1.0)),
            stop_tokens=self.end_tokens,
            top_k=asked.get("top_k") or None,
            top_p=float(asked.get("top_p") or 1.0),
        )


def _template_of(folder: Path, config: Mapping[str, Any]) -> str:
    """The default chat template; transformers takes that of the file first."""
    if (folder / CHAT_TEMPLATE).is_file():
        return (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {one["name"]: one["template"] for one in found}.get("default")
    if not isinstance(found, str):
        raise ArtifactError(
            f"{folder / TOKENIZER_CONFIG}: chat_template is {type(found).__name__}, not text, and "
            f"there is no {CHAT_TEMPLATE}; give one"
        )
    return found


def _compile(template: str) -> jinja2.Template:
    """A template of strangers, in a sandbox, with what transformers offers templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = _no_clock
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ArtifactError(
            f"the chat template is no template, at line {error.lineno}: {error.message}; mend it"
        ) from None


def _no_clock(layout: str) -> str:
    """A template's date: none, so that two exports of one model ask the same."""
    return layout


def _content(token: Any) -> str:
    """How a token is spelt, which may stand in a table."""
    return str(token.get("content", "")) if isinstance(token, Mapping) else str(token or "")
