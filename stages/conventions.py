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

from configs.errors import ArtifactError, ExportError
from stages.drawn import not_imitated, read_drawing
from stages.framing import BOS_ID, EOS_ID
from stages.names import (
    BROUGHT_FILES,
    CHAT_TEMPLATE,
    CONFIG,
    GENERATION_CONFIG,
    MORE_TEMPLATES,
    TOKENIZER,
    TOKENIZER_CONFIG,
)
from stages.templates import (
    DEFAULT,
    SPECIAL_TOKENS,
    TOKEN_GROUPS,
    compile_template,
    named_templates,
    render,
    spelling,
)

PROVENANCE = "imported.json"
"""What was taken of a folder made elsewhere, and what was not: see `Brought`."""
_ADDED = "added_tokens_decoder"
LEFT_TO_TOKENIZER = frozenset(
    {
        *("add_bos_token", "add_eos_token", "add_prefix_space", "auto_map", "from_slow", "legacy"),
        *("name_or_path", "sp_model_kwargs", "tokenizer_file", "tokenizer_object", "vocab_file"),
        *("tokenizer_padding", "tokenizer_truncation", "use_default_system_prompt", _ADDED),
    }
)
"""Fields by which loaders would change, or look elsewhere for, what `tokenizer.json` holds."""
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
    said: tuple[str, ...]
    """What of the files was left out or is not as servers have it; one line each."""


def read_conventions(folder: Path, tokenizer: Tokenizer, *, max_tokens: int) -> Conventions:
    """Those of the model in `folder`, which has this tokenizer and a context of `max_tokens`.

    ArtifactError names the file and field that cannot be read.
    """
    begin, end = (str(tokenizer.id_to_token(number)) for number in (BOS_ID, EOS_ID))
    said: list[str] = []
    end_tokens, brought = read_end_tokens(folder), _read_brought(folder)
    sampling = {"do_sample": True, "temperature": 1.0} if brought is None else {}
    generation = {
        "bos_token_id": BOS_ID,
        "pad_token_id": EOS_ID,
        **sampling,
        **_within(_read_table(folder / GENERATION_CONFIG), _vocab_size(folder), said),
        "eos_token_id": as_field(end_tokens),
    }
    read_drawing(generation, folder / GENERATION_CONFIG)
    if found := not_imitated(generation):
        said.append(
            f"{GENERATION_CONFIG}: {', '.join(found)} changes what servers answer, but no answer "
            "that is measured here"
        )
    config = {
        "eos_token": end,
        "pad_token": end,
        "model_max_length": max_tokens,
        "clean_up_tokenization_spaces": False,
        **_settled(folder / TOKENIZER_CONFIG, tokenizer, said),
        "bos_token": begin,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if not isinstance(split := config.get("split_special_tokens", False), bool):
        raise ArtifactError(
            f"{folder / TOKENIZER_CONFIG}: split_special_tokens = {split!r} is neither true nor "
            "false; give one, or take it away"
        )
    templates = _settle_templates(folder, config, said)
    return Conventions(end_tokens, generation, config, templates, brought, tuple(said))


def read_end_tokens(folder: Path) -> tuple[int, ...]:
    """The ids that end an answer of the model in `folder`, by its config and generation config."""
    found, size = {EOS_ID}, _vocab_size(folder)
    for name in (CONFIG, GENERATION_CONFIG):
        value = _read_table(folder / name).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if wrong := [one for one in ids if not _is_id(one, size)]:
            raise ArtifactError(
                f"{folder / name}: eos_token_id = {value!r} holds {wrong[0]!r}, which is no token "
                f"id{_below(size)}; give one whole number, or a list of them"
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


def _vocab_size(folder: Path) -> int | None:
    """How many tokens the model has, if its config is there and says so."""
    found = _read_table(folder / CONFIG).get("vocab_size")
    return found if isinstance(found, int) else None


def _is_id(value: Any, size: int | None) -> bool:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return is_number and value >= 0 and (size is None or value < size)


def _below(size: int | None) -> str:
    return "" if size is None else f" below vocab_size = {size}"


def _within(generation: Mapping[str, Any], size: int | None, said: list[str]) -> dict[str, Any]:
    """A generation config without ids of tokens that the model has no embedding for."""
    kept = {name: value for name, value in generation.items() if value is not None}
    # End tokens are read by themselves: without one of them, answers would not end.
    for name in [name for name in kept if name.endswith("_token_id") and name != "eos_token_id"]:
        value = kept[name]
        if not all(_is_id(one, size) for one in (value if isinstance(value, list) else [value])):
            del kept[name]
            said.append(
                f"{GENERATION_CONFIG}: {name} = {value!r} is left out: it is no token id"
                f"{_below(size)}"
            )
    return kept


def _settled(path: Path, tokenizer: Tokenizer, said: list[str]) -> dict[str, Any]:
    """A `tokenizer_config.json` that leaves to `tokenizer.json` what that file says.

    Loaders would rebuild the post-processor by `add_bos_token`, and add tokens that the model has
    no embedding for, or that are words like others to it.
    """
    config = {name: value for name, value in _read_table(path).items() if value is not None}
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    dropped: list[str] = []

    def kept(tokens: Mapping[Any, Any], group: str = "") -> dict[Any, str]:
        """Those of the tokens that the tokenizer adds, by their text."""
        spelt = {}
        for place, token in tokens.items():
            field, text = f"{group}[{place!r}]" if group else place, spelling(token)
            if text is None:
                raise ArtifactError(f"{path}: {field} = {token!r} is no token; give its text")
            if text in known:
                spelt[place] = text
            else:
                dropped.append(f"{field} {text!r}")
        return spelt

    settled: dict[str, Any] = {}
    for name, value in config.items():
        if name in TOKEN_GROUPS and isinstance(value, list):
            settled[name] = [*kept(dict(enumerate(value)), name).values()]
        elif name in TOKEN_GROUPS and isinstance(value, Mapping):
            settled[name] = kept(value, name)
        elif name == _ADDED and isinstance(value, Mapping):
            kept({number: token for number, token in value.items() if spelling(token)}, name)
        elif name not in LEFT_TO_TOKENIZER:
            named = name in (*TOKEN_GROUPS, *SPECIAL_TOKENS) or name.endswith("_token")
            is_token = named and not isinstance(value, bool)
            settled |= kept({name: value}) if is_token else {name: value}
    if dropped:
        said.append(
            f"{TOKENIZER_CONFIG}: {', '.join(dropped[:20])}{', ...' if dropped[20:] else ''} is "
            f"left out: {TOKENIZER}, as the model has it, adds no such token, and clients would"
        )
    return settled


def _settle_templates(folder: Path, config: dict[str, Any], said: list[str]) -> dict[str, str]:
    """The files of chat templates, by relative name; where none is the default, the plain one is.

    It stands in `config`, the tokenizer's, or in a file. ArtifactError if it is no template.
    """
    field = f"{TOKENIZER_CONFIG}: chat_template"
    files = _read_templates(folder)
    named = named_templates(config.pop("chat_template", None), str(folder / field))
    place = CHAT_TEMPLATE if CHAT_TEMPLATE in files else field
    default = files.get(CHAT_TEMPLATE) or named.get(DEFAULT)
    if default is None and (others := [*named, *files]):
        said.append(
            f"{place}: of the chat templates {', '.join(others)} none is the default; the plain "
            "one is, which lays one turn behind the other"
        )
    default = default or PLAIN_TEMPLATE
    if files:
        # Where there are such files, transformers takes no template from elsewhere.
        files[CHAT_TEMPLATE] = default
    else:
        named[DEFAULT] = default
    if named:
        listed = [{"name": name, "template": template} for name, template in named.items()]
        config["chat_template"] = default if [*named] == [DEFAULT] else listed
    template = compile_template(default, str(folder / place))
    try:
        render(template, [{"role": "user", "content": "1"}], config, place)
    except ExportError as error:
        said.append(str(error))
    return files


def _read_brought(folder: Path) -> Brought | None:
    if not (folder / PROVENANCE).is_file():
        return None
    record = _read_table(folder / PROVENANCE)
    return Brought(**{name: tuple(record[name]) for name in ("carried", "left", "tokenizer")})


def _read_templates(folder: Path) -> dict[str, str]:
    """The files that hold chat templates, by relative name; empty ones are none."""
    found = {}
    for path in (folder / CHAT_TEMPLATE, *sorted((folder / MORE_TEMPLATES).glob("*.jinja"))):
        if not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(
                f"{path}: cannot be read as text in UTF-8 ({error}); mend it, or take it away"
            ) from None
        if text:
            found[path.relative_to(folder).as_posix()] = text
    return found


def _read_table(path: Path) -> dict[str, Any]:
    """A JSON table; empty if there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
        # JSON can spell half a surrogate pair, which no encoding writes.
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path}: cannot be read as JSON ({error}); mend it, or take it away"
        ) from None
    if not isinstance(found, dict):
        raise ArtifactError(f"{path}: holds a {type(found).__name__}, not a table; mend it")
    return found
