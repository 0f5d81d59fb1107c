"""A recipe: everything that one run of the line asks for, and what of it must agree."""

import difflib
from typing import Any, Self

from pydantic import Field, model_validator

from configs.base import Frozen
from configs.data import CheckableSource, DataConfig, DataSection
from configs.delivery import VARIANTS, EvaluateSection, ExportSection
from configs.model import AnyModelConfig
from configs.names import NodeName
from configs.notify import NotifyConfig
from configs.parallel import ClusterConfig, StoreConfig, TrackingConfig
from configs.parity import ParityConfig
from configs.rl import PosttrainPhase, PosttrainSection
from configs.train import PretrainPhase, PretrainSection, check_fp8, check_indexer


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
    notify: NotifyConfig | None = None
    """Who is told when a run ends, fails or stalls; nobody without the table."""
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
        for name, section in (("pretrain", self.pretrain), ("posttrain", self.posttrain)):
            if section is not None and section.phases and section.after is not None:
                raise ValueError(
                    f"{name}.after = {section.after!r} means nothing beside {name}.phases; say it "
                    "in the first of them"
                )
        if self.parity is not None:
            self._check_parity()
        if self.base is None:
            self._check_pretraining()
        for owner, trained in self.pretraining.items():
            self._check_batch(_table(owner), trained)
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
        for field in ("corpus", "after"):
            if (asked := getattr(self.pretrain, field)) is not None:
                raise ValueError(
                    f"pretrain.{field} = {asked!r}, but parity compares trainings of the node data "
                    "from values drawn anew; drop it"
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
        asked, targets = self.export.variants, self.export.targets
        for target in targets:
            if not VARIANTS[target] & set(asked):
                rest = [other for other in targets if other != target] or "another"
                raise ValueError(
                    f"export.variants = {list(asked)} has none for {target} of export.targets; add "
                    f"one of {', '.join(sorted(VARIANTS[target]))}, or drop the target: "
                    f"export.targets = {rest}"
                )

    def _require_model(self, owner: str) -> None:
        if self.pretrain is None and self.base is None and not self.nodes:
            raise ValueError(
                f"pretrain = false leaves {owner} without a model; set {owner} = false too, or "
                "name a model's folder as base"
            )

    def _require_problems(self, owner: str, corpus: DataConfig) -> None:
        if not any(isinstance(source, CheckableSource) for source in corpus.sources.values()):
            raise ValueError(
                f"{owner} needs checkable problems, and its corpus has no source of them; add one "
                'of type = "arithmetic" or "problems" to its sources'
            )

    def _check_posttraining(self) -> None:
        """What must agree where the model is post-trained."""
        workers = self.cluster.stage_trainers
        for owner, phase in self.posttraining.items():
            table = _table(owner)
            self._require_model(table)
            minibatch = phase.prompts_per_step // phase.minibatches
            if minibatch * phase.group_size % workers:
                raise ValueError(
                    f"{table}.prompts_per_step / minibatches * group_size = "
                    f"{minibatch * phase.group_size} answers do not divide over "
                    f"{self.cluster.stage_settings} = {workers}; choose a multiple"
                )
            self._require_problems(table, self._corpus_of(table, phase.corpus))

    def _check_pretraining(self) -> None:
        """What must agree where the model is made here."""
        if self.parity is None:
            for owner, posttrained in self.posttraining.items():
                check_fp8(_table(owner), posttrained, self.model)
        tokenizer = self.data.tokenizer
        self._check_degrees()
        for owner, phase in self.pretraining.items():
            check_fp8(_table(owner), phase, self.model)
            check_indexer(_table(owner), phase, self.model)
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

    def _check_degrees(self) -> None:
        """Whether each pipeline stage has a layer, and each trainer as many experts as another."""
        cluster, layers = self.cluster, self.model.num_hidden_layers
        if cluster.pp > layers:
            raise ValueError(
                f"cluster.pp = {cluster.pp} is above model.num_hidden_layers = {layers}, which "
                "leaves pipeline stages without a layer; lower the first"
            )
        experts = self.model.n_routed_experts
        if fault := cluster.misfit(experts):
            remedy = "choose a divisor"
            if cluster.ep is None:
                remedy += ", or set cluster.ep to one that divides these trainers too"
            raise ValueError(f"model.n_routed_experts = {experts} {fault}; {remedy}")

    def _check_batch(self, table: str, phase: PretrainPhase) -> None:
        workers, parts = self.cluster.stage_trainers, self.cluster.micro_batches
        if phase.batch_sequences % (workers * parts):
            each = f" * cluster.micro_batches = {workers * parts}" if parts > 1 else f" = {workers}"
            lower = ", or lower cluster.micro_batches" if parts > 1 else ""
            raise ValueError(
                f"{table}.batch_sequences = {phase.batch_sequences} does not divide over "
                f"{self.cluster.stage_settings}{each}; choose a multiple{lower}"
            )


def _table(node: str) -> str:
    """The table of a recipe that a node of a stage's own is said in: `pretrain.phases.long`."""
    stage, dot, name = node.partition(".")
    return f"{stage}.{'corpora' if stage == 'data' else 'phases'}.{name}" if dot else stage
