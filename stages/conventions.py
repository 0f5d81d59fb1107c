"""How a model is spoken to: its chat template, the tokens that end an answer, how it is sampled.

A model that was made elsewhere brings these in files of its own, which go with it through every
stage into every bundle. One that was made here follows the line's conventions: a prompt is
begin-of-text and the text, an answer ends with end-of-text, and nothing stands between the turns
of a conversation but the end of one document and the beginning of the next.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from configs.errors import ArtifactError
from stages.shards import BOS_ID, EOS_ID
from stages.tokens import TOKENIZER, frame_texts

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
PROVENANCE = "imported.json"
"""What was taken of a folder made elsewhere, and what was not: see `Brought`."""
BROUGHT_FILES = (TOKENIZER_CONFIG, GENERATION_CONFIG, CHAT_TEMPLATE, MORE_TEMPLATES)
"""Files and folders beside weights, config and tokenizer that are carried through."""
_LEFT_TO_TOKENIZER = frozenset(
    {
        *("add_bos_token", "add_eos_token", "add_prefix_space", "auto_map", "from_slow", "legacy"),
        *("name_or_path", "sp_model_kwargs", "tokenizer_file", "tokenizer_object", "vocab_file"),
        *("tokenizer_padding", "tokenizer_truncation", "use_default_system_prompt"),
    }
)
"""Fields by which loaders would change, or look elsewhere for, what `tokenizer.json` holds."""
_TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ eos_token }}{{ bos_token }}"
    "{% endif %}{% endfor %}"
)
"""Turns as the corpus has documents: each question begins one, each finished answer ends one."""


@dataclass(frozen=True, slots=True)
class Brought:
    """What an imported folder brought besides the model."""

    carried: tuple[str, ...]
    """Files that go with the model."""
    left: tuple[str, ...]
    """Files that do not."""
    tokenizer: tuple[str, ...]
    """What was changed in its tokenizer, or is to be known of it."""

    def notes(self) -> list[str]:
        """One line for each thing that a user should know."""
        notes = [f"tokenizer.json: {line}" for line in self.tokenizer]
        if self.left:
            notes.append(f"not carried through: {', '.join(self.left)}")
        return notes


@dataclass(frozen=True, slots=True)
class Conventions:
    """How one model is spoken to."""

    end_tokens: tuple[int, ...]
    """Ids that end an answer, in rising order; end-of-text is among them."""
    generation: Mapping[str, Any]
    """`generation_config.json`."""
    tokenizer: Mapping[str, Any]
    """`tokenizer_config.json`."""
    templates: Mapping[str, str]
    """Files that hold chat templates, by relative name."""
    brought: Brought | None
    """None of a model that was made here."""


def read_conventions(folder: Path, *, max_tokens: int) -> Conventions:
    """Those of the model in a checkpoint's folder, whose context is `max_tokens` long.

    ArtifactError names the file and field that cannot be read.
    """
    begin, end = frame_texts(folder / TOKENIZER)
    end_tokens, templates = read_end_tokens(folder), _read_templates(folder)
    brought = _read_brought(folder)
    sampling = {"do_sample": True, "temperature": 1.0} if brought is None else {}
    generation = {
        "bos_token_id": BOS_ID,
        "pad_token_id": EOS_ID,
        **sampling,
        **_read_table(folder / GENERATION_CONFIG),
        "eos_token_id": as_field(end_tokens),
    }
    tokenizer = {
        "eos_token": end,
        "pad_token": end,
        "model_max_length": max_tokens,
        "clean_up_tokenization_spaces": False,
        **_settled(_read_table(folder / TOKENIZER_CONFIG), folder / TOKENIZER),
        "bos_token": begin,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if not templates and "chat_template" not in tokenizer:
        tokenizer["chat_template"] = PLAIN_TEMPLATE
    return Conventions(
        end_tokens=end_tokens,
        generation=generation,
        tokenizer=tokenizer,
        templates=templates,
        brought=brought,
    )


def read_end_tokens(folder: Path) -> tuple[int, ...]:
    """The ids that end an answer of the model in `folder`, by its config and generation config."""
    found = {EOS_ID}
    for name in (CONFIG, GENERATION_CONFIG):
        value = _read_table(folder / name).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if wrong := [one for one in ids if not isinstance(one, int) or isinstance(one, bool)]:
            raise ArtifactError(
                f"{folder / name}: eos_token_id = {value!r} holds {wrong[0]!r}, which is no token "
                "id; give one whole number, or a list of them"
            )
        found |= set(ids)
    return tuple(sorted(found))


def as_field(end_tokens: tuple[int, ...]) -> int | list[int]:
    """As `eos_token_id` has it: one number where there is one."""
    return end_tokens[0] if len(end_tokens) == 1 else list(end_tokens)


def carry(source: Path, folder: Path) -> None:
    """Copy what a model brought from one checkpoint's folder to the next."""
    for name in (TOKENIZER, PROVENANCE, *BROUGHT_FILES):
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name, dirs_exist_ok=True)
        elif (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def write_brought(folder: Path, brought: Brought) -> None:
    """Record what was taken of a folder made elsewhere."""
    record = {"carried": brought.carried, "left": brought.left, "tokenizer": brought.tokenizer}
    (folder / PROVENANCE).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _settled(config: Mapping[str, Any], tokenizer_json: Path) -> dict[str, Any]:
    """A `tokenizer_config.json` that leaves to `tokenizer.json` what that file says.

    Loaders would rebuild the post-processor by `add_bos_token`, and add tokens that the model has
    no embedding for.
    """
    known = Tokenizer.from_file(str(tokenizer_json)).get_vocab(with_added_tokens=True)
    kept = {name: value for name, value in config.items() if name not in _LEFT_TO_TOKENIZER}
    if isinstance(added := kept.get("added_tokens_decoder"), Mapping):
        kept["added_tokens_decoder"] = {
            number: token
            for number, token in added.items()
            if known.get(token.get("content")) == int(number)
        }
    for name in _TOKEN_LISTS:
        if isinstance(kept.get(name), list):
            kept[name] = [token for token in kept[name] if _content(token) in known]
    return kept


def _content(token: Any) -> str:
    """How a token is spelt, which may stand in a table."""
    return str(token.get("content") if isinstance(token, Mapping) else token)


def _read_brought(folder: Path) -> Brought | None:
    if not (folder / PROVENANCE).is_file():
        return None
    record = _read_table(folder / PROVENANCE)
    return Brought(**{name: tuple(record[name]) for name in ("carried", "left", "tokenizer")})


def _read_templates(folder: Path) -> dict[str, str]:
    paths = [folder / CHAT_TEMPLATE, *sorted((folder / MORE_TEMPLATES).glob("*.jinja"))]
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in paths
        if path.is_file()
    }


def _read_table(path: Path) -> dict[str, Any]:
    """A JSON table; empty if there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path}: cannot be read as JSON ({error}); mend it, or take it away"
        ) from None
    if not isinstance(found, dict):
        raise ArtifactError(f"{path}: holds a {type(found).__name__}, not a table; mend it")
    return found
