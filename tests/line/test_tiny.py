"""The claims of docs/evidence.md, on the real `tiny` recipe: some eight minutes on two cores.

Run with `-s` to see the figures. The recipe is built once, in a temporary folder.
"""

import json
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config

from configs.model import V3Config
from model.transformer import Transformer
from stages.export import parity
from stages.export.bundle import formats
from stages.export.tensors import TensorFolder
from stages.shards import BOS_ID, EOS_ID, Rows
from tests.line.runs import artifact, ingot, metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@dataclass(frozen=True)
class Tiny:
    """A folder with everything that `ingot run tiny` makes."""

    folder: Path
    headline: dict[str, float]
    seconds: float
    """What the stages took, without set-up."""

    def bundle(self, target: str) -> Path:
        """The bundle of one target."""
        for path in (self.folder / ".ingot" / "artifacts" / "export").glob("*/*/manifest.json"):
            if json.loads(path.read_text())["facts"]["target"] == target:
                return path.parent
        raise AssertionError(f"no bundle for {target}")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    done = ingot(folder, "run", "tiny", timeout_seconds=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = (folder / ".ingot" / "runs").glob("*.json")
    outcomes = json.loads(record.read_text())["outcomes"]
    seconds = {node: outcome["seconds"] for node, outcome in outcomes.items()}
    print("\nseconds:", {node: round(taken, 1) for node, taken in seconds.items()})
    return Tiny(folder, artifact(folder, "evaluate")[1]["facts"]["headline"], sum(seconds.values()))


def test_the_stages_take_at_most_ten_minutes(tiny: Tiny) -> None:
    print(f"\nall stages: {tiny.seconds:.0f} s")
    assert tiny.seconds <= 600


def test_the_model_beats_the_bigram_and_learns_from_rewards(tiny: Tiny) -> None:
    figures = tiny.headline
    print("\n" + json.dumps(figures, indent=1))
    assert figures["before_bits_per_byte"] < figures["ngram_bits_per_byte"]
    assert figures["after_bits_per_byte"] < figures["ngram_bits_per_byte"]
    assert figures["after_pass_at_1"] - figures["before_pass_at_1"] >= 0.15
    assert figures["after_pass_at_1_low"] > figures["before_pass_at_1_high"]


def test_a_second_run_builds_nothing_and_ends_in_ten_seconds(tiny: Tiny) -> None:
    taken = []
    for _ in range(3):
        begin = time.monotonic()
        again = ingot(tiny.folder, "run", "tiny")
        taken.append(time.monotonic() - begin)
        assert again.returncode == 0
        assert "built" not in again.stdout
    print(f"\nsecond run: {sorted(taken)[1]:.1f} s (median of 3)")
    assert sorted(taken)[1] <= 10


def test_a_plan_says_beforehand_what_a_run_rebuilds(tiny: Tiny) -> None:
    def plan(*words: str) -> dict[str, str]:
        done = ingot(tiny.folder, "plan", "tiny", *words)
        assert done.returncode == 0, done.stderr
        lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()[1:]]
        return {line[0]: line[1] for line in lines if len(line) > 1}

    changed = plan("--set", "pretrain.steps=600")
    assert changed["data"] == "reuse"
    assert changed["pretrain"] == "build"
    assert changed["export.cuda"] != "reuse"
    forced = plan("--force", "export")
    assert (forced["export.cuda"], forced["export.ascend"]) == ("build", "build")
    assert {forced[node] for node in ("data", "pretrain", "posttrain", "evaluate")} == {"reuse"}
    since = plan("--from", "posttrain")
    assert (since["data"], since["pretrain"]) == ("reuse", "reuse")
    assert {since[node] for node in ("posttrain", "evaluate", "export.cuda")} == {"build"}
    only = plan("--only", "evaluate")
    assert only["evaluate"] == "reuse"
    done = ingot(tiny.folder, "run", "tiny", "--force", "export")
    assert done.returncode == 0
    built = [line for line in done.stdout.splitlines() if "│ built" in line]
    assert len(built) == 2


def test_each_step_is_recorded_once(tiny: Tiny) -> None:
    for stage in ("pretrain", "posttrain"):
        steps = [line["step"] for line in metrics(tiny.folder, stage)]
        assert steps == list(range(1, len(steps) + 1))


@dataclass(frozen=True)
class Both:
    """One CUDA variant as transformers reads it and as Ingot does."""

    theirs: Any
    info: dict[str, Any]
    ours: Transformer


@pytest.fixture(scope="module", params=["bf16", "fp8"])
def both(tiny: Tiny, request: pytest.FixtureRequest) -> Iterator[Both]:
    folder = tiny.bundle("cuda") / request.param
    widened: dict[str, Any] = {}
    if request.param == "fp8":
        widened = {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        theirs: Any
        theirs, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **widened
        )
    source, manifest = artifact(tiny.folder, "posttrain")
    config = V3Config.model_validate(manifest["facts"]["model"])
    form = next(form for form in formats("cuda", config) if form.variant == request.param)
    ours = parity.reload(TensorFolder(folder), form, TensorFolder(source).names)
    yield Both(theirs.float().eval(), info, ours)


@torch.no_grad()
def test_transformers_loads_both_cuda_bundles_and_agrees(tiny: Tiny, both: Both) -> None:
    mtp = f"model.layers.{both.ours.config.num_hidden_layers}."
    assert not both.info["missing_keys"]
    assert not both.info["mismatched_keys"]
    assert all(name.startswith(mtp) for name in both.info["unexpected_keys"])
    corpus = artifact(tiny.folder, "data")[0]
    rows = Rows(corpus / "held_out" / "stdlib")
    tokens = torch.from_numpy(rows.take(torch.arange(8).numpy()))
    error = float((both.theirs(tokens).logits - both.ours(tokens)).abs().max())
    print(f"\nlargest difference of logits: {error:.1e}")
    assert error <= 1e-4
    prompt = tokens[:1, :16]
    theirs = both.theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32, do_sample=False
    )
    ours = prompt
    while ours.shape[1] < 48 and int(ours[0, -1]) != EOS_ID:
        ours = torch.cat([ours, both.ours(ours)[:, -1:].argmax(-1)], dim=1)
    assert theirs.tolist() == ours.tolist()


def test_auto_tokenizer_encodes_a_thousand_held_out_lines_identically(tiny: Tiny) -> None:
    corpus = artifact(tiny.folder, "data")[0]
    ours = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    rows = Rows(corpus / "held_out" / "stdlib")
    tokens = rows.take(torch.arange(len(rows)).numpy()).flatten()
    text = ours.decode([int(t) for t in tokens if t not in (BOS_ID, EOS_ID)])
    lines = [line for line in text.splitlines() if line.strip()][:1000]
    assert len(lines) == 1000
    for variant in ("bf16", "fp8"):
        theirs = AutoTokenizer.from_pretrained(tiny.bundle("cuda") / variant)
        assert theirs(lines)["input_ids"] == [one.ids for one in ours.encode_batch(lines)]


def test_the_ascend_bundle_describes_every_tensor_and_agrees_with_its_source(tiny: Tiny) -> None:
    folder = tiny.bundle("ascend") / "w8a8"
    rows = json.loads((folder / "quant_model_description.json").read_text())
    names = set(TensorFolder(folder).names)
    assert names <= rows.keys()
    assert all("." not in name for name in rows.keys() - names)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    facts = json.loads((folder.parent / "manifest.json").read_text())["facts"]["parity"]["w8a8"]
    print(f"\nw8a8: top-1 agreement {facts['top1_agreement']:.4f}, KL {facts['mean_kl_nats']:.4f}")
    assert facts["top1_agreement"] >= 0.9
    assert facts["mean_kl_nats"] <= 0.05


def test_clean_lists_bytes_and_never_offers_the_latest(tiny: Tiny) -> None:
    listed = ingot(tiny.folder, "clean", "--dry-run")
    assert listed.returncode == 0
    for stage in ("data", "pretrain", "posttrain", "evaluate"):
        (line,) = (one for one in listed.stdout.splitlines() if f"{stage}/" in one)
        assert "keep" in line
