"""Proof that the files beside a variant's weights are right, of which a server believes every word.

- the indexes: all names under which one is written say what the first says;
- `quant_model_description.json`: one row for each stored tensor, of a type that a server knows and
  that fits how the tensor is stored; one type for all matrices that a server makes into one;
- `tokenizer.json`: the source's vocabulary, merges and added tokens, and begin-of-text in front;
- `config.json`, `generation_config.json`, `tokenizer_config.json`: the source's model, the tokens
  that end an answer, and no field that makes a client encode or decode otherwise.

Nothing here is computed by what wrote these files, but for the fields that `Conventions` settles.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from configs.errors import ExportError, IngotError
from configs.model import ModelConfig
from model.weights.config import read_config
from model.weights.families import fused
from stages.conventions import LEFT_TO_TOKENIZER, Conventions
from stages.export.ascend import DESCRIPTION
from stages.export.companions import OF_INTEGERS
from stages.export.formats import Format
from stages.export.tensors import TensorFolder
from stages.framing import BOS_ID
from stages.names import CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG

LEAVES: Mapping[str, frozenset[str]] = {
    "FLOAT": frozenset(),
    **{kind: frozenset({"weight", *leaves}) for kind, leaves in OF_INTEGERS.items()},
}
"""The types of rows, and what a Linear of each must have stored."""
_GLOBALS = frozenset({"model_quant_type", "version", "group_size", "metadata", "optional"})
_MORE_GLOBALS = frozenset({"kv_quant_type", "kv_cache_type", "fa_quant_type", "reduce_quant_type"})
_PROBE = "Plain words, 12 + 34 = 46."


def prove_indexes(folder: Path, form: Format) -> None:
    """ExportError unless every index says what the first says, which the weights are held to."""
    first, *others = form.index_names
    expected = _read(folder / first, form)
    for name in others:
        found = _read(folder / name, form)
        if found != expected:
            key = _first_apart(found.get("weight_map"), expected["weight_map"]) or "its metadata"
            raise ExportError(
                f"{form.variant}/{name}: disagrees with {first} about {key}; export again"
            )


def prove_description(stored: TensorFolder, form: Format, model: ModelConfig) -> None:
    """ExportError names the row that is missing, unknown, or not as its tensor is stored."""
    place = f"{form.variant}/{DESCRIPTION}"
    rows = _read(stored.folder / DESCRIPTION, form)
    types = {name: kind for name, kind in rows.items() if name not in _GLOBALS | _MORE_GLOBALS}
    if missing := sorted(set(stored.names) - types.keys()):
        raise ExportError(f"{place}: no row for tensor {missing[0]}; export again")
    if strange := sorted(types.keys() - set(stored.names)):
        raise ExportError(f"{place}: row {strange[0]} stands for no stored tensor; export again")
    if missing := sorted(_GLOBALS - rows.keys()):
        raise ExportError(f"{place}: no row {missing[0]}; export again")
    for name, kind in (*types.items(), ("model_quant_type", rows["model_quant_type"])):
        if kind not in LEAVES:
            raise ExportError(
                f"{place}: row {name} has the type {kind!r}, which is none of {', '.join(LEAVES)}; "
                "export again"
            )
    _prove_types(stored, types, place)
    _prove_alike(_joint(model, stored.names), types, place)
    if rows["model_quant_type"] not in types.values():
        raise ExportError(
            f"{place}: row model_quant_type = {rows['model_quant_type']!r}, but no tensor has that "
            "type; export again"
        )


def _prove_types(stored: TensorFolder, types: Mapping[str, str], place: str) -> None:
    """Each Linear has what its type needs, all under that type; what is FLOAT is no integer."""
    leaves: dict[str, set[str]] = {}
    for name in stored.names:
        module, _, leaf = name.rpartition(".")
        leaves.setdefault(module, set()).add(leaf)
    for name in stored.names:
        module, _, leaf = name.rpartition(".")
        kind = types[name]
        owner = types.get(f"{module}.weight", kind)
        if kind != owner and (kind != "FLOAT" or leaf in LEAVES[owner]):
            raise ExportError(
                f"{place}: row {name} says {kind}, row {module}.weight {owner}; export again"
            )
        if kind == "FLOAT":
            if stored.kind(name) == "I8":
                raise ExportError(f"{place}: row {name} says FLOAT of int8; export again")
        elif lacking := sorted(LEAVES[kind] - leaves[module]):
            raise ExportError(
                f"{place}: row {name} says {kind}, which needs {module}.{lacking[0]}; export again"
            )
        elif leaf not in LEAVES[kind]:
            raise ExportError(
                f"{place}: row {name} says {kind}, whose tensors are "
                f"{', '.join(sorted(LEAVES[kind]))}; export again"
            )
        elif leaf == "weight" and stored.kind(name) != "I8":
            raise ExportError(
                f"{place}: row {name} says {kind} of {stored.kind(name)}; export again"
            )


def _joint(model: ModelConfig, names: Sequence[str]) -> Iterable[tuple[str, ...]]:
    """Stored weights of which a server looks up one row for all."""
    yield from fused(model, names)
    experts: dict[str, list[str]] = {}
    for name in names:
        if found := re.fullmatch(r"(.*\.experts)\.\d+\.\w+\.weight", name):
            experts.setdefault(found[1], []).append(name)
    yield from map(tuple, experts.values())


def _prove_alike(joint: Iterable[tuple[str, ...]], types: Mapping[str, str], place: str) -> None:
    for first, *others in joint:
        for name in others:
            if types[name] != types[first]:
                raise ExportError(
                    f"{place}: row {name} says {types[name]}, row {first} {types[first]}, but "
                    "servers make one matrix of them; export again"
                )


def prove_tokenizer(folder: Path, source: Path, variant: str) -> None:
    """ExportError unless `tokenizer.json` in `folder` has the source's tokens and begins texts."""
    place = f"{variant}/{TOKENIZER}"
    found, expected = (
        json.loads((one / TOKENIZER).read_text("utf-8-sig")) for one in (folder, source)
    )
    for what, apart in (
        ("token", _first_apart(found["model"].get("vocab"), expected["model"].get("vocab"))),
        ("merge", _first_apart(found["model"].get("merges"), expected["model"].get("merges"))),
        (
            "added token",
            _first_apart(found.get("added_tokens"), expected.get("added_tokens") or []),
        ),
        ("field", _first_apart(_rest(found), _rest(expected))),
    ):
        if apart is not None:
            raise ExportError(
                f"{place}: {what} {apart} is not as in the source's {TOKENIZER}: a stale file, or "
                "another model's; export again"
            )
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    plain = tokenizer.encode(_PROBE, add_special_tokens=False).ids
    if (framed := tokenizer.encode(_PROBE).ids) != [BOS_ID, *plain]:
        raise ExportError(
            f"{place}: its post_processor makes {framed[:3]} ... {framed[-1:]} of a text of "
            f"{plain[:2]} ... {plain[-1:]}, but training put begin-of-text, {BOS_ID}, in front and "
            "nothing behind; export again"
        )


def _rest(record: Mapping[str, Any]) -> dict[str, Any]:
    """What else of a tokenizer bears on which tokens a text becomes, and on the way back."""
    rest = {f"model.{name}": value for name, value in record["model"].items()}
    rest |= {name: record.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")}
    switched_off = {"model.vocab", "model.merges", "model.dropout"}
    return {name: value for name, value in rest.items() if name not in switched_off}


def prove_configs(folder: Path, form: Format, source: Path, conventions: Conventions) -> None:
    """ExportError names the file and field by which a server would do what the source does not.

    Templates are left to `prove_templates`: what they lose is to be said first.
    """
    _prove_model(folder, form)
    generation = _read(folder / GENERATION_CONFIG, form)
    ends = list(conventions.end_tokens)
    for name, record in ((CONFIG, _read(folder / CONFIG, form)), (GENERATION_CONFIG, generation)):
        value = record.get("eos_token_id")
        if (value if isinstance(value, list) else [value]) != ends:
            raise ExportError(
                f"{form.variant}/{name}: eos_token_id = {value!r}, but answers end with {ends}; "
                "export again"
            )
    _hold(generation, conventions.generation, f"{form.variant}/{GENERATION_CONFIG}")
    tokenizer, place = _read(folder / TOKENIZER_CONFIG, form), f"{form.variant}/{TOKENIZER_CONFIG}"
    settled = {k: v for k, v in conventions.tokenizer.items() if k != "chat_template"}
    _hold(tokenizer, settled, place)
    if misleading := sorted(LEFT_TO_TOKENIZER & tokenizer.keys()):
        raise ExportError(
            f"{place}: {misleading[0]} = {tokenizer[misleading[0]]!r} would have clients encode "
            f"otherwise than {TOKENIZER} says; export again"
        )


def prove_templates(folder: Path, form: Format, conventions: Conventions) -> None:
    """ExportError unless every chat template is there word for word, those for tools too."""
    found = _read(folder / TOKENIZER_CONFIG, form).get("chat_template")
    if found != conventions.tokenizer.get("chat_template"):
        raise ExportError(
            f"{form.variant}/{TOKENIZER_CONFIG}: chat_template is not the source's; export again"
        )
    for name, template in conventions.templates.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != template:
            raise ExportError(f"{form.variant}/{name} is not the source's; export again")


def _prove_model(folder: Path, form: Format) -> None:
    """`config.json` describes the variant's model, and its variant's quantisation if it has one."""
    place = f"{form.variant}/{CONFIG}"
    try:
        found = dict(read_config(folder))
    except IngotError as error:
        raise ExportError(f"{place}: {error}; export again") from None
    expected = dict(form.model)
    for name, value in expected.items():
        if found.get(name) != value:
            raise ExportError(
                f"{place}: {name} = {found.get(name)!r}, in the source {value!r}; export again"
            )
    config = _read(folder / CONFIG, form)
    _hold(config, form.config_entries, place)
    if "quantization_config" in config.keys() - form.config_entries.keys():
        raise ExportError(f"{place}: quantization_config, but nothing is quantised; export again")


def _hold(found: Mapping[str, Any], expected: Mapping[str, Any], place: str) -> None:
    """ExportError unless `found` has every field of `expected`, as it is there."""
    for name, value in expected.items():
        if found.get(name) != value:
            raise ExportError(
                f"{place}: {name} = {str(found.get(name))[:60]!r}, but must be "
                f"{str(value)[:60]!r}; export again"
            )


def _first_apart(found: Any, expected: Any) -> str | None:
    """The first key or place at which two tables or lists are apart; none if they are equal."""
    if found == expected:
        return None
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = (key for key in {**expected, **found} if found.get(key) != expected.get(key))
        return repr(next(keys, "their order"))
    if isinstance(found, list) and isinstance(expected, list):
        pairs = enumerate(zip(found, expected, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(found), len(expected)))
        return str(at)
    return "list"


def _read(path: Path, form: Format) -> dict[str, Any]:
    """A JSON table, in which no field may stand twice."""
    place = f"{form.variant}/{path.name}"

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ExportError(f"{place}: {twice} stands there twice; export again")
        return made

    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=table)
    except (OSError, ValueError) as error:
        raise ExportError(f"{place}: cannot be read as JSON ({error}); export again") from None
    if not isinstance(found, dict):
        raise ExportError(f"{place}: holds a {type(found).__name__}, no table; export again")
    return found
