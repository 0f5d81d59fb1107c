"""What stages exchange: an address and facts, never bytes.

An artifact also says of itself what people want to know: the few figures by which it is known,
whether it is a data set or a model, under which alias it is delivered, and whether it fell short.
Its plots are data in its file `plots.json` (see `stages/plots.py`), its page is `report.md`. So
nothing above needs to know its kind, and a plugin's artifacts are shown as the line's own are.
"""

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from configs.base import Frozen
from configs.errors import ArtifactError, StoreError
from configs.model import AnyModelConfig
from stages.manifest import Manifest, generation_of, read_manifest
from stages.steps import METRICS, computed, each_step, read_metrics, scalars

PAGE = "report.md"
"""What an artifact has to say to people, in Markdown; many have no such file."""
RATE = "tokens_per_second"
"""A figure that tells of the machine and of what ran beside it, not of what was made."""


class Artifact(Frozen):
    """Base of the nouns. `uri` is the absolute folder of its files; the other fields are facts."""

    kind: ClassVar[str]
    is_dataset: ClassVar[bool] = False
    """Whether it is tracked as the data that the stages which take it were made of."""
    is_model: ClassVar[bool] = False
    """Whether it is tracked as a model."""
    uri: str

    @classmethod
    def load(cls, generation: str) -> Self:
        """The artifact committed at `generation`; ArtifactError if unfinished or another kind."""
        manifest = read_manifest(generation)
        if manifest.kind != cls.kind:
            raise ArtifactError(
                f"{generation} holds a {manifest.kind}, not a {cls.kind}; name another"
            )
        return cls(uri=f"{generation}/{manifest.address}", **manifest.facts)

    def facts(self) -> dict[str, Any]:
        """The fields that the manifest records, as JSON values."""
        return self.model_dump(mode="json", exclude={"uri"})

    def path(self, *names: str) -> Path:
        """A local path inside the artifact, which its manifest covers.

        ArtifactError for a name that leads out of it: what no hash covers may not be read.
        """
        if "://" in self.uri and not self.uri.startswith("file://"):
            raise StoreError(f"{self.uri}: only local folders hold artifacts so far; use a path")
        inner = Path(*names)
        if inner.is_absolute() or ".." in inner.parts:
            raise ArtifactError(
                f"{self.uri}: {inner} lies outside the {self.kind}, where no manifest covers it; "
                "name a file of the artifact"
            )
        return Path(self.uri.removeprefix("file://"), inner)

    def beside(self, *names: str) -> Path:
        """A local path in the builder's folder, which the manifest does not cover.

        For showing what happened, as the step log does; never for a stage's input.
        """
        return self.path().parent.joinpath(*names)

    def manifest(self) -> Manifest:
        """The manifest that makes this an artifact; ArtifactError as of `read_manifest`."""
        return read_manifest(generation_of(self.uri))

    def key_figures(self) -> dict[str, float]:
        """The few numbers by which people know it, the most telling first."""
        return {}

    def figures(self) -> dict[str, float]:
        """All that it measured: what is compared over seeds, and shown of a whole run."""
        return {name: value for name, value in self.key_figures().items() if name != RATE}

    def measured(self) -> dict[str, float]:
        """What it reports of models, with the bounds of intervals; nothing if it is no report."""
        return {}

    def computed(self) -> dict[str, str]:
        """What it was computed on and with, for the record of its making: `device`, `compute` (a
        type) and `products` (an FP8 backend, or high precision). Nothing if workers made none of
        it."""
        return {}

    def told(self) -> str | None:
        """Why it is not what was asked for, though it is there; none if it is."""
        return None

    def alias(self) -> str | None:
        """Under which alias a model is delivered; none if it is not."""
        return None

    def weights(self) -> Path | None:
        """The folder of a model's weights in plain form; none if it holds no model."""
        return None


def load_artifact(generation: str) -> Artifact:
    """The artifact committed at `generation`, of whichever kind that is loaded.

    ArtifactError as of `read_manifest`, or for a kind that only a plugin knows.
    """
    kinds = {one.kind: one for one in reversed(list(_below(Artifact)))}
    found = read_manifest(generation).kind
    if found not in kinds:
        raise ArtifactError(
            f"{generation} holds a {found}, which is none of {', '.join(sorted(kinds))}; name it "
            "by its node in a recipe whose stage makes it"
        )
    return kinds[found].load(generation)


def _below(kind: type[Artifact]) -> Iterator[type[Artifact]]:
    """The nouns that are made of `kind`, nearest first."""
    for one in kind.__subclasses__():
        yield one
    for one in kind.__subclasses__():
        yield from _below(one)


class Corpus(Artifact):
    """Packed shards, problems and a tokenizer.

    `train/*.arrow` and `held_out/<source>/*.arrow`: see `stages/shards.py`.
    `problems/train.parquet`, `problems/held_out.parquet`: see `stages/verifiers.py`.
    `tokenizer.json` (vocabulary of `vocab_size`), `statistics.json`, `data_card.html`.
    `drops/*.parquet`, `documents/*.parquet`, `duplicates.parquet`, `samples.jsonl`: what became of
    each document; see `stages/documents.py`.
    """

    kind: ClassVar[str] = "corpus"
    is_dataset: ClassVar[bool] = True
    train_rows: int
    held_out_rows: dict[str, int]
    """Packed held-out rows of each source."""
    sequence_tokens: int
    vocab_size: int
    train_problems: int
    held_out_problems: int

    def key_figures(self) -> dict[str, float]:
        """How much there is to train on."""
        tokens = self.train_rows * self.sequence_tokens
        return {"train_tokens": tokens, "train_problems": self.train_problems}


class Checkpoint(Artifact):
    """A model that any later stage can start from.

    `config.json`, `model*.safetensors` in float32 under Hugging Face names, `tokenizer.json`;
    if it was trained here, `history.json` (see `stages/telemetry.py`).
    """

    kind: ClassVar[str] = "checkpoint"
    is_model: ClassVar[bool] = True
    step: int
    sequences_seen: int
    """Pretraining rows consumed, in the order of `stages.shards.consumed_rows`."""
    model: AnyModelConfig
    final_loss: float | None
    """That of the last step; none if the weights were imported."""
    best_step: int | None = None
    """The step after which what was measured on held-out data was best, the first of equals: the
    loss on text in pretraining, pass@1 in post-training; none if nothing was. The weights are those
    of the last step all the same."""

    def key_figures(self) -> dict[str, float]:
        """Of the last step, and how quick training was; of an imported model, its size."""
        steps = [scalars(record) for record in read_metrics(self.beside(METRICS))]
        last: dict[str, float] = steps[-1] if steps else {}
        names: tuple[str, ...] = ("reward", "loss")
        chosen = {name: last[name] for name in names if name in last}
        if RATE in last:
            # One step may have counted, or waited, or begun with cold caches.
            chosen[RATE] = median(step[RATE] for step in steps if RATE in step)
        if chosen or self.final_loss is None:
            return chosen or {"parameters": self.model.parameters()}
        return {"loss": self.final_loss}

    def computed(self) -> dict[str, str]:
        """What workers said, the last time they began to train it."""
        return computed(each_step(self.beside(METRICS)))

    def weights(self) -> Path:
        """The checkpoint itself."""
        return self.path()


class Report(Artifact):
    """`report.json` and `report.md`: measurements of one or more checkpoints."""

    kind: ClassVar[str] = "report"
    headline: dict[str, float]
    """Figures, by metric name."""
    key: tuple[str, ...] = ()
    """Names of the few that tell most; if none is named, the first three are."""
    shortfall: str | None = None
    """Why what was measured is not what was asked for; none if it is. The report is there to be
    read all the same."""

    def key_figures(self) -> dict[str, float]:
        """The figures that it names as its most telling ones."""
        return {name: self.headline[name] for name in self.key or tuple(self.figures())[:3]}

    def figures(self) -> dict[str, float]:
        """All it measured but bounds of intervals, which speak of one choice of problems."""
        return {k: v for k, v in self.headline.items() if not k.endswith(("_low", "_high"))}

    def measured(self) -> dict[str, float]:
        """Its headline."""
        return self.headline

    def told(self) -> str | None:
        """Its shortfall."""
        return self.shortfall


class Parity(Frozen):
    """How closely one variant of a bundle reproduces its source on fixed prompts.

    Where nothing but logits was compared, the figures from `source_bits_per_byte` on are none.
    """

    positions: int
    max_abs_logit_error: float
    top1_agreement: float
    mean_kl_nats: float
    source_bits_per_byte: float | None = None
    """Of held-out text, which the source needs."""
    bits_per_byte: float | None = None
    """The same, which the variant needs."""
    greedy_agreement: float | None = None
    """The share of greedily taken tokens that are the source's, up to the first that is not. Texts
    are held-out ones, read by the variant's own tokenizer and chat template."""
    worst_tensor: str | None = None
    """Which rounding changes most, for its size."""
    worst_relative_error: float | None = None
    """By how much: |stored - source| / |source| of that tensor."""

    @property
    def bits_per_byte_rise(self) -> float | None:
        """How many more bits a byte the variant needs, as a share of the source's."""
        if self.bits_per_byte is None or self.source_bits_per_byte is None:
            return None
        return self.bits_per_byte / self.source_bits_per_byte - 1

    def measured(self) -> dict[str, float]:
        """Every figure that there is, by name."""
        rise = self.bits_per_byte_rise
        found = self.model_dump(exclude={"worst_tensor"}, exclude_none=True)
        return found if rise is None else found | {"bits_per_byte_rise": rise}


class Asked(Frozen):
    """How a variant answers held-out problems through its own tokenizer, template and settings."""

    problems: int
    source_greedy_accuracy: float
    """Of the checkpoint that the variant was made of, asked as the line asks."""
    greedy_accuracy: float
    greedy_verdicts_apart: int
    """Problems of which one of the two is right and the other wrong."""
    chat_greedy_accuracy: float
    """The same, asked through the chat template."""
    pass_at_1: float
    """Sampled as its generation config says."""
    chat_pass_at_1: float


class Bundle(Artifact):
    """A folder per variant, each loadable by servers of the target.

    cuda: `bf16/`, `fp8/` (Hugging Face layout). ascend: `bf16/`, `w8a8/` (ModelSlim description).
    """

    kind: ClassVar[str] = "bundle"
    is_model: ClassVar[bool] = True
    PLAIN: ClassVar[str] = "bf16"
    """The variant that holds plain weights."""
    target: Literal["cuda", "ascend"]
    parity: dict[str, Parity]
    """By variant."""
    asked: dict[str, Asked] = Field(default_factory=dict)
    """By variant; empty if the corpus holds no problems, or none were to be asked."""
    shortfall: str | None = None
    """Why its model is not what was asked for, by the gates of its evaluation; none if it is."""

    def key_figures(self) -> dict[str, float]:
        """How often each variant's likeliest token is its source's."""
        return {f"{name}_top1_agreement": one.top1_agreement for name, one in self.parity.items()}

    def told(self) -> str | None:
        """Its model's shortfall."""
        return self.shortfall

    def alias(self) -> str | None:
        """Its target, unless its model fell short."""
        return None if self.shortfall else self.target

    def weights(self) -> Path | None:
        """Its variant of plain weights, if it has that one."""
        return self.path(self.PLAIN) if self.PLAIN in self.parity else None
