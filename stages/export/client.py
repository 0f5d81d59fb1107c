"""A client of a variant's folder: text to ids and back, by the files that servers read.

It shares nothing with how the line itself encodes: the tokenizer is read as it is, the chat
template is rendered as transformers renders one, and sampling is as the generation config says.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from cluster.generation import Sampling
from configs.errors import ArtifactError
from stages.drawn import read_drawing
from stages.names import CHAT_TEMPLATE, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG
from stages.templates import DEFAULT, compile_template, named_templates, render


class Client:
    """Speaks to a model by the files of its folder, as servers and transformers do."""

    def __init__(self, folder: Path) -> None:
        """Read the files; ArtifactError if a template or how to sample cannot be."""
        self.tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        self._config = json.loads((folder / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
        self.generation = json.loads((folder / GENERATION_CONFIG).read_text(encoding="utf-8"))
        self.tokenizer.encode_special_tokens = self._config.get("split_special_tokens", False)
        self._splitting = Tokenizer.from_str(self.tokenizer.to_str())
        self._splitting.encode_special_tokens = True
        self._drawing = read_drawing(self.generation, folder / GENERATION_CONFIG)
        found = template_of(folder, self._config)
        if found is None:
            raise ArtifactError(
                f"{folder / TOKENIZER_CONFIG}: chat_template holds no default, and there is no "
                f"{CHAT_TEMPLATE}; give one"
            )
        text, self.place = found
        """Where its chat template stands."""
        self._template = compile_template(text, self.place)

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
        """The ids of a conversation, up to where the model is to go on; errors as of `render`."""
        text = self.render(messages)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of a conversation; ExportError if the template refuses it."""
        return render(self._template, messages, self._config, self.place)

    def sampling(self, max_new_tokens: int) -> Sampling:
        """How servers sample by default, by the generation config."""
        drawing = self._drawing
        return Sampling(
            max_new_tokens, drawing.temperature, self.end_tokens, drawing.top_k, drawing.top_p
        )


def template_of(folder: Path, config: Mapping[str, Any]) -> tuple[str, str] | None:
    """The default chat template and where it stands; transformers takes that of the file first.

    `config` is the tokenizer's. None if there is no default.
    """
    if (folder / CHAT_TEMPLATE).is_file():
        return (folder / CHAT_TEMPLATE).read_text(encoding="utf-8"), str(folder / CHAT_TEMPLATE)
    place = f"{folder / TOKENIZER_CONFIG}: chat_template"
    found = named_templates(config.get("chat_template"), place)
    return (found[DEFAULT], place) if DEFAULT in found else None
