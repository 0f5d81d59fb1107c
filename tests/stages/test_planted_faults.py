"""Faults planted in every exporter are caught by parity, and named, and nothing is committed.

The exporter runs for real; what it wrote is damaged before it is proved, as by an exporter with
that fault. Variants that are added later are tried without a word here: formats say what there is.
"""

import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest

from configs.base import Frozen
from configs.delivery import ExportConfig, ExportSpec, Target, Variant
from configs.errors import ExportError
from configs.parallel import StoreConfig
from configs.seed import derive
from pipeline.graph import make_graph
from stages.artifacts import Bundle, Checkpoint, Corpus
from stages.contract import Workspace, stage
from stages.export import bundle
from stages.export.face import export as face
from stages.export.formats import Format
from stages.export.tensors import TensorFolder
from stages.export.variants import formats
from tests.conftest import Recorder, workspace_at
from tests.pipeline.fakes import World, failed, outcomes
from tests.stages import faults
from tests.stages.bundles import MODEL, MODELS, files_of, make_checkpoint, make_corpus
from tests.stages.faults import Fault, Written

SEED = 18
TARGETS: tuple[Target, ...] = get_args(Target)
VARIANTS: tuple[Variant, ...] = get_args(Variant)


def _every(family: str) -> ExportConfig:
    """All variants that the family has; FP4 is V4's alone."""
    return ExportConfig(variants=tuple(v for v in VARIANTS if v != "fp4" or family == "v4"))


COMBINATIONS = [
    (family, target, form.variant)
    for family, model in MODELS.items()
    for target in TARGETS
    for form in formats(target, model, _every(family))
]
V3 = "model.layers.1.mlp.experts.3"
V4 = "layers.1.ffn.experts.3"
LOSES_ANSWERS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] != 'assistant' %}{{ m['content'] }}"
    "{% endif %}{% endfor %}"
)
LAST_TURN = "{{ bos_token }}{{ messages[-1]['content'] }}"
NO_BOS = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def _drop_merges(record: dict[str, Any]) -> None:
    del record["model"]["merges"][-40:]


def _exchange_words(record: dict[str, Any]) -> None:
    words = record["model"]["vocab"]
    one, other = list(words)[-2:]
    words[one], words[other] = words[other], words[one]


def _flip_row(rows: dict[str, Any]) -> str:
    """The weight of one expert alone, with its scale: a Linear that is whole, of another type."""
    name = next(one for one in rows if "experts.5." in one and one.endswith(".weight"))
    rows[name] = "FLOAT"
    return name


NAMED: dict[str, tuple[str, Target, str, Fault]] = {
    "a dropped expert": ("v3", "cuda", "bf16", faults.without(f"{V3}.")),
    "a dropped expert, FP8": ("v4", "cuda", "fp8", faults.without(f"{V4}.")),
    "a dropped expert, INT8": ("v32", "ascend", "w8a8", faults.without(f"{V3}.")),
    "experts exchanged": ("v3", "cuda", "fp8", faults.exchanged(".experts.2.", ".experts.6.")),
    "gates and up-projections exchanged": (
        "v4",
        "ascend",
        "w8a8",
        faults.exchanged(".w1.", ".w3."),
    ),
    "a swapped scale": (
        *("v3", "ascend", "w8a8"),
        faults.exchanged(f"{V3}.gate_proj.weight_scale", f"{V3}.up_proj.weight_scale"),
    ),
    "a transposed block": (
        *("v3", "cuda", "fp8"),
        faults.altered(f"{V3}.up_proj.weight", faults.transposed),
    ),
    "a missing indexer": ("v32", "cuda", "fp8", faults.without(".indexer.")),
    "a missing indexer, INT8": ("v4", "ascend", "w8a8", faults.without(".indexer.")),
    "a missing MTP layer": ("v32", "ascend", "bf16", faults.without("model.layers.3.")),
    "a stale tokenizer, of other merges": (
        *("v3", "cuda", "bf16"),
        faults.tokenizer(_drop_merges, "merge"),
    ),
    "a stale tokenizer, of another vocabulary": (
        *("v4", "ascend", "w8a8"),
        faults.tokenizer(_exchange_words, "token"),
    ),
    "a tokenizer without its added tokens": (
        *("v3", "ascend", "bf16"),
        faults.tokenizer(lambda record: record["added_tokens"].pop(), "added token"),
    ),
    "missing BOS": (
        *("v32", "cuda", "fp8"),
        faults.tokenizer(lambda record: record.update(post_processor=None), "its post_processor"),
    ),
    "missing BOS in the template": (
        *("v3", "cuda", "bf16"),
        faults.field("tokenizer_config.json", "chat_template", NO_BOS),
    ),
    "a template that loses the model's turns": (
        *("v3", "ascend", "w8a8"),
        faults.field("tokenizer_config.json", "chat_template", LOSES_ANSWERS),
    ),
    "a template that has the last turn alone": (
        *("v4", "cuda", "bf16"),
        faults.field("tokenizer_config.json", "chat_template", LAST_TURN),
    ),
    "a tokenizer's config that rebuilds the post-processor": (
        *("v3", "cuda", "bf16"),
        faults.field("tokenizer_config.json", "add_bos_token", False),
    ),
    "answers that end elsewhere": (
        *("v32", "ascend", "w8a8"),
        faults.field("generation_config.json", "eos_token_id", 7),
    ),
    "fewer experts a token": (
        *("v3", "cuda", "fp8"),
        faults.field("config.json", "num_experts_per_tok", 1),
    ),
    "scales that nothing announces": (
        *("v3", "cuda", "fp8"),
        faults.field("config.json", "quantization_config", None),
    ),
    "a matrix of another type than what it is joined with": (
        *("v3", "ascend", "w8a8"),
        faults.description(_flip_row),
    ),
    "a row of the description twice": ("v32", "ascend", "w8a8", faults.row_twice),
    "a second index that knows less": ("v3", "ascend", "w8a8", faults.second_index),
}
"""By what an exporter did wrong: a model, an exporter, and its fault."""
DRAWS = [(*combination, number) for combination in COMBINATIONS for number in range(2)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("planted")


@cache
def _parts(root: Path, family: str) -> tuple[Checkpoint, Corpus]:
    """A source of each family, made once."""
    checkpoint = make_checkpoint(root / f"checkpoint-{family}", MODELS[family])
    return checkpoint, make_corpus(root / "corpus", rows=2)


def _spec(target: str, variant: str) -> ExportSpec:
    """One variant, compared on as little as can be: the fault is not in the figures."""
    settings = {"variants": (variant,), "parity_prompts": 1, "problems": 0, "max_new_tokens": 1}
    settings |= {"calibration_rows": 2, "max_bits_per_byte_rise": 9}
    loose = {"min_top1_agreement": 0, "max_kl_nats": 9, "min_greedy_agreement": 0}
    config = ExportConfig.model_validate(settings | loose)
    return ExportSpec.model_validate({"seed": 1, "target": target, "export": config})


def plant(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> list[set[str]]:
    """Have the exporter's folder damaged once it is written; the names come to the list."""
    real, planted = bundle._write, []

    def write(*args: Any, **kwargs: Any) -> Any:
        made = real(*args, **kwargs)
        (form,) = (one for one in args if isinstance(one, Format))
        (work,) = (one for one in args if isinstance(one, Workspace))
        (source,) = (one for one in args if isinstance(one, TensorFolder))
        folder = Path(work.out, form.variant)
        planted.append(fault(Written(folder, form, tuple(source.names))))
        return made

    monkeypatch.setattr(bundle, "_write", write)
    return planted


def assert_caught(
    monkeypatch: pytest.MonkeyPatch,
    root: Path,
    out: Path,
    where: tuple[str, str, str],
    fault: Fault,
) -> None:
    family, target, variant = where
    checkpoint, corpus = _parts(root, family)
    planted = plant(monkeypatch, fault)
    work = workspace_at(out, Recorder())
    with pytest.raises(ExportError) as caught:
        bundle.export(_spec(target, variant), work, corpus=corpus, checkpoint=checkpoint)
    (names,) = planted
    said = str(caught.value)
    assert said.startswith(variant) or f"/{variant}/" in said
    assert any(re.search(rf"{re.escape(name)}(?![\w.])", said) for name in names), (said, names)


@pytest.mark.parametrize("what", NAMED)
def test_a_fault_is_caught_and_named(
    what: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, target, variant, fault = NAMED[what]
    assert_caught(monkeypatch, root, tmp_path, (family, target, variant), fault)


@pytest.mark.parametrize(("family", "target", "variant", "number"), DRAWS)
def test_a_drawn_fault_is_caught_and_named(
    family: str,
    target: str,
    variant: str,
    number: int,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault = faults.drawn(derive(SEED, family, target, variant, number))
    assert_caught(monkeypatch, root, tmp_path, (family, target, variant), fault)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "target", "variant"), COMBINATIONS)
def test_many_drawn_faults_are_caught_and_named(
    family: str,
    target: str,
    variant: str,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for number in range(2, 22):
        fault = faults.drawn(derive(SEED, family, target, variant, number))
        with monkeypatch.context() as patch:
            where = (family, target, variant)
            assert_caught(patch, root, tmp_path / str(number), where, fault)
        shutil.rmtree(tmp_path / str(number))


def test_there_are_faults_enough_and_half_of_them_are_drawn() -> None:
    assert len(NAMED) + len(DRAWS) >= 20
    assert len(DRAWS) * 2 >= len(NAMED) + len(DRAWS)
    tried = {tuple(where) for *where, _ in NAMED.values()} | set(COMBINATIONS)
    assert tried == set(COMBINATIONS)
    assert {(target, variant) for _, target, variant in COMBINATIONS} >= {
        *(("cuda", "bf16"), ("cuda", "fp8"), ("ascend", "bf16"), ("ascend", "w8a8")),
    }


class _Made(Frozen):
    """The config of a stage that hands on what a test made."""

    folder: str


@stage(revision=1)
def gathered(config: _Made, work: Workspace) -> Corpus:
    """The corpus, in a store."""
    return make_corpus(Path(work.out), rows=2)


@stage(revision=1)
def trained(config: _Made, work: Workspace) -> Checkpoint:
    """The checkpoint in `config.folder`, in a store."""
    shutil.copytree(files_of(Path(config.folder)), work.out, dirs_exist_ok=True)
    return Checkpoint(uri=work.out, step=7, sequences_seen=112, model=MODEL, final_loss=None)


def test_a_bundle_that_fails_is_not_committed_and_its_run_says_why(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, _ = _parts(root, "v3")
    folder = str(checkpoint.path().parents[1])
    corpus, model = gathered(_Made(folder="")), trained(_Made(folder=folder))
    line = {
        "data": corpus,
        "train": model,
        "export": face(_spec("cuda", "fp8"), corpus=corpus, checkpoint=model),
    }
    world = World(StoreConfig(url=str(tmp_path / "store")))
    name = f"{V3}.down_proj.weight"

    def committed() -> Iterator[Path]:
        return (tmp_path / "store").glob("artifacts/export/*/*/manifest.json")

    with monkeypatch.context() as patch:
        plant(patch, faults.altered(name, lambda x: x.roll(1, 0)))
        run = world.run(graph=make_graph(line, world.store.hashes))
    assert outcomes(run) == {"data": "built", "train": "built", "export": "failed"}
    assert name in str(failed(run, "export"))
    assert not list(committed())
    run = world.run(graph=make_graph(line, world.store.hashes))
    assert outcomes(run) == {"data": "reused", "train": "reused", "export": "built"}
    (manifest,) = committed()
    assert isinstance(Bundle.load(str(manifest.parent)), Bundle)
