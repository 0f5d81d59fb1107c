"""Recipes: TOML read left to right, merged deeply, validated whole."""

import codecs
import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, model_validator

from configs.base import Frozen, FrozenT
from configs.data import ArithmeticSource, DataConfig, DataSection
from configs.delivery import EvaluateSection, ExportSection
from configs.errors import ConfigError
from configs.merge import inherit, merge
from configs.model import AnyModelConfig
from configs.names import NodeName
from configs.parallel import ClusterConfig, StoreConfig, TrackingConfig
from configs.parity import ParityConfig
from configs.rl import PosttrainPhase, PosttrainSection
from configs.train import PretrainPhase, PretrainSection, check_fp8

_STAGES = frozenset({"pretrain", "posttrain", "evaluate", "export"})
"""Tables in whose place a recipe may say `false`."""
_NAMED_TABLES = {
    "data": ("corpora", ("sources", "train_tokens", "tokenizer")),
    "pretrain": ("phases", ("after",)),
    "posttrain": ("phases", ("after",)),
}
"""By section: its tables that have the section's settings where they say nothing else, and those
settings that each has of its own."""
_TAG_FIELDS = ("type", "family")
"""Fields of one fixed value, by which the members of a union are told apart."""


class NodeConfig(Frozen):
    """A node that the recipe adds to the line: a stage by import path, inputs by node name."""

    use: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """`package.module:stage`."""
    inputs: dict[str, str] = Field(default_factory=dict)
    """The stage's input names to the nodes that supply them."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The stage's own config table; its schema is the stage's, checked when the line is planned."""


class Recipe(Frozen):
    """Everything one run of the line asks for.

    A stage that has no table takes its defaults, but for `posttrain`, which is then left out;
    `evaluate = false` leaves a stage out too, and so for `pretrain`, `posttrain` and `export`.
    """

    name: str = Field(min_length=1)
    seed: int = Field(default=0, ge=0)
    base: str | None = Field(default=None, min_length=1)
    """A folder with a model in Hugging Face's form, to start from. `model` then means nothing, the
    corpora are encoded by that model's tokenizer, and pretraining is left out unless its phases
    are named."""
    model: AnyModelConfig
    data: DataSection
    pretrain: PretrainSection | None
    posttrain: PosttrainSection | None = None
    parity: ParityConfig | None = None
    """With it the recipe asks for another line: `pretrain` once in FP8 and once in high precision
    for each seed, and a report of how far their losses are apart. Nothing comes after pretraining,
    so `posttrain`, `evaluate` and `export` then mean nothing."""
    evaluate: EvaluateSection | None = EvaluateSection()
    export: ExportSection | None = ExportSection()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    store: StoreConfig = StoreConfig()
    nodes: dict[NodeName, NodeConfig] = Field(default_factory=dict)

    @property
    def pretraining(self) -> dict[str, PretrainPhase]:
        """The phases of pretraining by node, in the order of the recipe; none where a `base` stands
        in its place."""
        if self.pretrain is None or (self.base is not None and not self.pretrain.phases):
            return {}
        named = {f"pretrain.{name}": phase for name, phase in self.pretrain.phases.items()}
        return named or {"pretrain": self.pretrain}

    @property
    def posttraining(self) -> dict[str, PosttrainPhase]:
        """The phases of post-training by node, in the order of the recipe."""
        if self.posttrain is None:
            return {}
        named = {f"posttrain.{name}": phase for name, phase in self.posttrain.phases.items()}
        return named or {"posttrain": self.posttrain}

    @property
    def corpora(self) -> dict[str, DataConfig]:
        """The corpora by node, the one first whose tokenizer all have."""
        return {"data": self.data} | {
            f"data.{name}": corpus for name, corpus in self.data.corpora.items()
        }

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        for owner, phase in (self.pretraining | self.posttraining).items():
            self._corpus_of(_table(owner), phase.corpus)
        if self.parity is not None:
            self._check_parity()
        if self.base is None:
            self._check_pretraining()
        if self.parity is None:
            self._check_posttraining()
            self._check_delivery()
        return self

    def _corpus_of(self, owner: str, name: str | None) -> DataConfig:
        """The corpus that a table reads; ValueError if there is none of that name."""
        if name is None:
            return self.data
        if name not in self.data.corpora:
            near = difflib.get_close_matches(name, self.data.corpora, n=1)
            there = ", ".join(self.data.corpora) or "none; leave it out for the node data"
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {there}"
            raise ValueError(f"{owner}.corpus = {name!r} is none of data.corpora; {hint}")
        return self.data.corpora[name]

    def _check_parity(self) -> None:
        """What must agree where two precisions are compared."""
        if self.base is not None:
            raise ValueError(
                f"base = {self.base!r} takes pretraining's place, and parity compares pretraining "
                "with itself; drop one of the two"
            )
        if self.pretrain is None or self.pretrain.phases:
            what = "is left out" if self.pretrain is None else "has several phases"
            raise ValueError(
                f"pretrain {what}, but parity compares one training with itself; drop one of the "
                "two"
            )
        if self.pretrain.precision != "fp8":
            raise ValueError(
                f'pretrain.precision = "{self.pretrain.precision}", but parity compares "fp8" with '
                '"high", and this leaves nothing to compare; set it to "fp8"'
            )

    def _check_delivery(self) -> None:
        """What must agree where models are judged and bundles are written."""
        if self.evaluate is not None:
            self._corpus_of("evaluate", self.evaluate.corpus)
            self._require_model("evaluate")
        if self.export is None:
            return
        self._corpus_of("export", self.export.corpus)
        self._require_model("export")
        for target, own in (("cuda", "fp8"), ("ascend", "w8a8")):
            if target in self.export.targets and not {"bf16", own} & set(self.export.variants):
                raise ValueError(
                    f"export.variants = {list(self.export.variants)} has none for {target} of "
                    f"export.targets; add bf16 or {own}, or drop the target"
                )

    def _require_model(self, owner: str) -> None:
        if self.pretrain is None and self.base is None and not self.nodes:
            raise ValueError(
                f"pretrain = false leaves {owner} without a model; set {owner} = false too, or "
                "name a model's folder as base"
            )

    def _require_problems(self, owner: str, corpus: DataConfig) -> None:
        if not any(isinstance(source, ArithmeticSource) for source in corpus.sources.values()):
            raise ValueError(
                f"{owner} needs checkable problems, and its corpus has no source of them; add one "
                'of type = "arithmetic" to its sources'
            )

    def _check_posttraining(self) -> None:
        """What must agree where the model is post-trained."""
        workers = self.cluster.trainers
        for owner, phase in self.posttraining.items():
            table = _table(owner)
            self._require_model(table)
            minibatch = phase.prompts_per_step // phase.minibatches
            if minibatch * phase.group_size % workers:
                raise ValueError(
                    f"{table}.prompts_per_step / minibatches * group_size = "
                    f"{minibatch * phase.group_size} answers do not divide over "
                    f"cluster.trainers = {workers}; choose a multiple"
                )
            self._require_problems(table, self._corpus_of(table, phase.corpus))

    def _check_pretraining(self) -> None:
        """What must agree where the model is made here."""
        if self.parity is None:
            for owner, posttrained in self.posttraining.items():
                check_fp8(_table(owner), posttrained, self.model)
        workers, tokenizer = self.cluster.trainers, self.data.tokenizer
        if self.model.n_routed_experts % workers:
            raise ValueError(
                f"model.n_routed_experts = {self.model.n_routed_experts} does not divide over "
                f"cluster.trainers = {workers}; choose a divisor"
            )
        for owner, phase in self.pretraining.items():
            check_fp8(_table(owner), phase, self.model)
            self._check_phase(_table(owner), phase)
        if tokenizer.file is None and self.model.vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"model.vocab_size = {self.model.vocab_size} is below data.tokenizer.vocab_size = "
                f"{tokenizer.vocab_size}; raise the first"
            )
        for owner, corpus in self.corpora.items():
            if self.model.max_position_embeddings < corpus.sequence_tokens:
                raise ValueError(
                    f"model.max_position_embeddings = {self.model.max_position_embeddings} is "
                    f"below {_table(owner)}.sequence_tokens = {corpus.sequence_tokens}; raise the "
                    "first"
                )

    def _check_phase(self, table: str, phase: PretrainPhase) -> None:
        """What must agree in one phase of pretraining."""
        workers = self.cluster.trainers
        if phase.batch_sequences % workers:
            raise ValueError(
                f"{table}.batch_sequences = {phase.batch_sequences} does not divide over "
                f"cluster.trainers = {workers}; choose a multiple"
            )
        dense_steps, steps = phase.indexer.dense_steps, phase.steps
        if self.model.has_indexer and dense_steps >= steps:
            raise ValueError(
                f"{table}.indexer.dense_steps = {dense_steps} leaves none of {table}.steps = "
                f"{steps} in which attention is as sparse as it is when the model is used; lower "
                "the first"
            )


def _table(node: str) -> str:
    """The table of a recipe that a node of a stage's own is said in: `pretrain.phases.long`."""
    stage, dot, name = node.partition(".")
    return f"{stage}.{'corpora' if stage == 'data' else 'phases'}.{name}" if dot else stage


def shipped_recipes() -> list[str]:
    """Names of the recipes inside the package."""
    folder = resources.files("configs") / "recipes"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name: str, overlays: Sequence[str] = (), sets: Sequence[str] = ()) -> Recipe:
    """The recipe `name` (shipped name or path) under overlays and `a.b=c` settings, validated.

    Tables merge key by key, later files win; lists and scalars replace, and so does a table that
    changes `type`: it is another thing, to which the old one's fields mean nothing. A model whose
    `family` changes keeps its fields, and those that the new family lacks are refused: forgetting
    them would leave that family's full size. All settings together are one last overlay, so their
    order does not matter. Raises ConfigError with the field's path, its value and the nearest valid
    spelling.
    """
    tree = _read(name)
    for overlay in overlays:
        tree = merge(tree, _read(overlay))
    asked: dict[str, Any] = {}
    for assignment in sets:
        asked = merge(asked, _parse_set(assignment))
    tree = merge(tree, asked)
    try:
        return validate(Recipe, _laid_out(tree))
    except ValidationError as error:
        raise ConfigError(explain(error, Recipe, origin=name)) from None


def validate(schema: type[FrozenT], tree: Mapping[str, Any]) -> FrozenT:
    """A value of `schema` from what TOML says; pydantic's ValidationError if it is none.

    Nothing is converted: `"25"` is no number and `true` no 1. Only lists become tuples, which TOML
    cannot say.
    """
    return schema.model_validate_json(json.dumps(tree, default=str), strict=True)


def _laid_out(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe means: `false` for no table, and named tables with their section's settings."""
    meant = {k: None if k in _STAGES and value is False else value for k, value in tree.items()}
    for section, (tables, own) in _NAMED_TABLES.items():
        if section in meant:
            meant[section] = inherit(meant[section], tables, own=own)
    return meant


_WISHES = {
    "model_type": "should be a table",
    "model_attributes_type": "should be a table",
    "dict_type": "should be a table",
    "tuple_type": "should be a list, as [0, 1]",
    "list_type": "should be a list, as [0, 1]",
    "too_short": "should have at least 1 item",
    "bool_type": "should be true or false",
    "bool_parsing": "should be true or false",
    "int_type": "should be a whole number",
    "int_parsing": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_type": "should be a number",
    "float_parsing": "should be a number",
    "string_type": "should be text",
}
"""What is said in place of pydantic's words, which are a programmer's, by kind of fault."""
_NUMBERS = frozenset({"bool_type", "int_type", "float_type"})
"""Faults of what TOML writes without quotes."""


def explain(error: ValidationError, schema: type[BaseModel], *, origin: str) -> str:
    """One line per fault: the field's path, the value seen, what is allowed, the nearest name."""
    lines = []
    faults = error.errors()
    # What is wrong within a list is left out of its count, and would be told twice.
    within = {fault["loc"][:end] for fault in faults for end in range(len(fault["loc"]))}
    for fault in faults:
        if fault["type"] == "too_short" and fault["loc"] in within:
            continue
        # A fault of a key itself is told of what bears it.
        path = [step for step in fault["loc"] if step != "[key]"]
        where = _spelling(schema, path) or origin
        match fault["type"]:
            case "extra_forbidden":
                allowed = _fields_at(schema, path[:-1])
                near = difflib.get_close_matches(str(path[-1]), allowed, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(allowed)}"
                lines.append(f"{where} = {_short(fault['input'])}: no such field; {hint}")
            case "missing":
                lines.append(f"{where}: missing; add it to the recipe")
            case "union_tag_invalid" | "union_tag_not_found":
                lines.append(f"{where}{_unknown_tag(schema, path, fault['input'])}")
            case "value_error":
                message = fault["msg"].removeprefix("Value error, ")
                lines.append(f"{where}: {message}" if path else message)
            case kind:
                lines.append(f"{where} = {_short(fault['input'])}: {_wish(kind, fault)}")
    return f"recipe {origin}: " + "\n".join(lines)


def _wish(kind: str, fault: Any) -> str:
    """What should stand in place of what was seen."""
    found, message = fault["input"], str(fault["msg"])
    wish = _WISHES.get(kind, message[:1].lower() + message[1:])
    if isinstance(found, str) and kind in _NUMBERS:
        return f"{wish}, without quotes"
    if not isinstance(found, str | Mapping | list) and kind == "string_type":
        return f"{wish}, in quotes"
    return wish


def _unknown_tag(schema: type[BaseModel], path: Sequence[Any], found: object) -> str:
    """What is wrong with a table that says of itself to be none of the kinds there are."""
    tags = dict(tag for kind in _kinds_at(schema, path) for tag in _tags(kind))
    field, known = next(iter(tags.values())), list(tags)
    if not isinstance(found, Mapping):
        return f" = {_short(found)}: should be a table"
    if field not in found:
        return f".{field}: missing; known: {', '.join(known)}"
    near = difflib.get_close_matches(str(found[field]), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f".{field} = {_short(found[field])}: unknown; known: {', '.join(known)}{hint}"


def _spelling(schema: type[BaseModel], path: Sequence[Any]) -> str:
    """A location as a recipe spells it: without the tags that say which of a union was read."""
    kept, kinds = [], _unwrap(schema)
    for part in path:
        if not any(part in dict(_tags(kind)) for kind in kinds):
            kept.append(str(part))
        kinds = [inner for one in kinds for inner in _step(one, part)]
    return ".".join(kept)


def _read(name: str) -> dict[str, Any]:
    path = Path(name)
    shipped = resources.files("configs") / "recipes" / f"{name}.toml"
    if path.suffix == ".toml" and path.exists():
        text = _decoded(name, path)
    elif shipped.is_file():
        text = shipped.read_text(encoding="utf-8")
    else:
        near = difflib.get_close_matches(name, shipped_recipes(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"shipped: {', '.join(shipped_recipes())}"
        raise ConfigError(f"recipe {name!r}: neither a .toml file nor a shipped recipe; {hint}")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {name!r}: not valid TOML: {error}") from None


def _decoded(name: str, path: Path) -> str:
    """The text of a recipe's file, which may begin with the mark that some editors put there."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"recipe {name!r}: cannot be read ({error.strerror}); name a file that can"
        ) from None
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ConfigError(f"recipe {name!r}: is in UTF-16; save it as UTF-8, as TOML is")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"recipe {name!r}: byte 0x{raw[error.start]:02x} in line {line} is not UTF-8; save it "
            "as UTF-8, as TOML is"
        ) from None


def _parse_set(assignment: str) -> dict[str, Any]:
    """The tables that one `a.b=c` means: a value of TOML or, if it is none, text as it stands."""
    key, separator, text = (part.strip() for part in assignment.partition("="))
    if not separator or not key:
        raise ConfigError(f"--set {assignment!r}: expected key=value, as pretrain.steps=200")
    try:
        path = list(_path(tomllib.loads(f"{key} = 0")))
    except tomllib.TOMLDecodeError:
        raise ConfigError(
            f"--set {assignment!r}: {key!r} is no field's path; write words joined by single dots, "
            "as pretrain.steps=200"
        ) from None
    try:
        tree = tomllib.loads(f"{key} = {text}")
    except tomllib.TOMLDecodeError:
        tree = _nested(path, text)
    if "\n" in text and (tree != _nested(path, _at(tree, path)) or _at(tree, path) == text):
        raise ConfigError(
            f"--set {assignment!r}: a line break ends a value; give each setting a --set of its "
            "own, and put text that has line breaks into quotes as TOML has them"
        )
    return tree


def _path(tree: Mapping[str, Any]) -> Iterator[str]:
    """The keys down to the one leaf of nested tables."""
    for key, value in tree.items():
        yield key
        if isinstance(value, Mapping):
            yield from _path(value)


def _nested(path: Sequence[str], value: Any) -> dict[str, Any]:
    tree: Any = value
    for key in reversed(path):
        tree = {key: tree}
    return dict(tree)


def _at(tree: Any, path: Sequence[str]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _fields_at(schema: type[BaseModel], path: Sequence[Any]) -> list[str]:
    """Field names of the schema that stands at `path`, as pydantic names a location."""
    models = [kind for kind in _kinds_at(schema, path) if _is_model(kind)]
    return sorted({name for one in models for name in one.model_fields})


def _kinds_at(schema: type[BaseModel], path: Sequence[Any]) -> list[Any]:
    """The types of which one stands at `path`."""
    kinds = _unwrap(schema)
    for part in path:
        kinds = [inner for one in kinds for inner in _step(one, part)]
    return kinds


def _step(kind: Any, part: Any) -> list[Any]:
    if _is_model(kind):
        if part in kind.model_fields:
            return _unwrap(kind.model_fields[part].annotation)
        return [kind] if part in dict(_tags(kind)) else []
    if get_origin(kind) is dict:
        return _unwrap(get_args(kind)[1])
    return []


def _tags(kind: Any) -> list[tuple[str, str]]:
    """By what tag a union knows this member, and the field that holds it."""
    fields = kind.model_fields if _is_model(kind) else {}
    found = [(name, fields[name].annotation) for name in _TAG_FIELDS if name in fields]
    return [
        (str(get_args(annotation)[0]), name)
        for name, annotation in found
        if get_origin(annotation) is Literal
    ]


def _unwrap(annotation: Any) -> list[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _unwrap(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [inner for one in get_args(annotation) for inner in _unwrap(one)]
    return [annotation]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _short(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
