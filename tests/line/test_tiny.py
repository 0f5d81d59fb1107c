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
from transformers import AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config, PreTrainedModel

from configs.model import V3Config
from model.decode import sample
from model.drawing import Drawing
from model.transformer import Transformer
from model.weights.files import load_pretrained, save_pretrained
from stages.answers import choose
from stages.export import parity
from stages.export.cuda import Fp8Blocks
from stages.export.tensors import TensorFolder
from stages.export.variants import formats
from stages.framing import BOS_ID, EOS_ID
from stages.prompts import answer_text
from stages.shards import Rows
from stages.tokens import load_tokenizer
from stages.verifiers import read_problems, verify
from tests.line.runs import artifact, bundles, ingot, step_log
from tests.line.ui import our_answer, served, strangers_answer
from tests.model.transformers_twin import Generating, loaded

VARIANTS = (("cuda", "bf16"), ("cuda", "fp8"), ("ascend", "bf16"), ("ascend", "w8a8"))

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
        return bundles(self.folder)[target][0]


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
    assert figures["after_pass_at_1_gain_low"] > 0.15
    assert figures["after_all_of_8_gain_low"] > 0
    # What RL changes is the distribution, not the skill.
    assert min(figures[f"{side}_greedy_accuracy"] for side in ("before", "after")) > 0.95


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
        steps = [line["step"] for line in step_log(tiny.folder, stage)]
        assert steps == list(range(len(steps)))


def test_asking_held_out_problems_takes_little_of_post_training(tiny: Tiny) -> None:
    lines = step_log(tiny.folder, "posttrain")
    parts = ("sampling_seconds", "learning_seconds", "measuring_seconds")
    seconds = {part: sum(line.get(part, 0) for line in lines) for part in parts}
    share = seconds["measuring_seconds"] / sum(seconds.values())
    measured = [line for line in lines if "held_out_pass_at_1" in line]
    figures = {line["step"]: line["held_out_pass_at_1"] for line in measured}
    print(f"\nmeasuring took {share:.1%} of post-training's steps: {figures}")
    assert share <= 0.05
    assert figures[max(figures)] - figures[0] > 0.1


@dataclass(frozen=True)
class Both:
    """One CUDA variant as transformers reads it and as Ingot does."""

    theirs: PreTrainedModel
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
        theirs, info = loaded(
            AutoModelForCausalLM.from_pretrained, folder, dtype=torch.float32, **widened
        )
    source, manifest = artifact(tiny.folder, "posttrain")
    config = V3Config.model_validate(manifest["facts"]["model"])
    form = next(form for form in formats("cuda", config) if form.variant == request.param)
    ours = parity.reload(TensorFolder(folder), form, TensorFolder(source).names)
    theirs.float()
    yield Both(theirs, info, ours)


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
    assert isinstance(both.theirs, Generating)
    theirs = both.theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32, do_sample=False
    )
    ours = prompt
    while ours.shape[1] < 48 and int(ours[0, -1]) != EOS_ID:
        ours = torch.cat([ours, both.ours(ours)[:, -1:].argmax(-1)], dim=1)
    assert theirs.tolist() == ours.tolist()


def test_auto_tokenizer_encodes_a_thousand_held_out_lines_as_training_did(tiny: Tiny) -> None:
    corpus = artifact(tiny.folder, "data")[0]
    ours = load_tokenizer(corpus / "tokenizer.json")
    rows = Rows(corpus / "held_out" / "stdlib")
    tokens = rows.take(torch.arange(len(rows)).numpy()).flatten()
    text = ours.decode([int(t) for t in tokens if t not in (BOS_ID, EOS_ID)])
    lines = [line for line in text.splitlines() if line.strip()][:1000]
    assert len(lines) == 1000
    expected = [[BOS_ID, *one.ids] for one in ours.encode_batch(lines, add_special_tokens=False)]
    for target, variant in VARIANTS:
        theirs = AutoTokenizer.from_pretrained(tiny.bundle(target) / variant)
        assert theirs(lines)["input_ids"] == expected


@pytest.mark.parametrize(("target", "variant"), VARIANTS)
def test_two_hundred_sums_as_text_get_the_verdicts_of_our_greedy_decoding(
    tiny: Tiny, tmp_path: Path, target: str, variant: str
) -> None:
    """Text in, through AutoTokenizer and `generate`, against token ids through ours.

    transformers cannot read W8A8: its weights are widened for it, by the reader that is ours.
    """
    folder = tiny.bundle(target) / variant
    problems = read_problems(artifact(tiny.folder, "data")[0] / "problems" / "held_out.parquet")
    problems = choose(problems, 200, seed=1)
    ours = load_pretrained(folder)
    readable = folder
    if variant == "w8a8":
        save_pretrained(ours, tmp_path / "wide")
        readable = tmp_path / "wide"
    widened = {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        theirs: Any = AutoModelForCausalLM.from_pretrained(
            readable, dtype=torch.float32, **(widened if variant == "fp8" else {})
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer([one.prompt for one in problems], return_tensors="pt")
    answers = theirs.float().generate(**batch, max_new_tokens=6, do_sample=False)
    length = batch["input_ids"].shape[1]
    texts = tokenizer.batch_decode(answers[:, length:], skip_special_tokens=True)
    served = [verify(one, text).reward for one, text in zip(problems, texts, strict=True)]

    training = load_tokenizer(artifact(tiny.folder, "data")[0] / "tokenizer.json")
    prompts = [
        [BOS_ID, *training.encode(one.prompt, add_special_tokens=False).ids] for one in problems
    ]
    samples = sample(
        ours,
        prompts,
        max_new_tokens=6,
        drawing=Drawing(0.0),
        stop_tokens={EOS_ID},
        seeds=[0] * len(prompts),
    )
    measured = [
        verify(one, answer_text(training, found.token_ids)).reward
        for one, found in zip(problems, samples, strict=True)
    ]
    apart = sum(a != b for a, b in zip(served, measured, strict=True))
    print(
        f"\n{target} {variant}: {sum(served):.0f} of 200 right as text in transformers, "
        f"{sum(measured):.0f} by our greedy decoding, {apart} verdicts apart"
    )
    assert apart <= 2
    assert sum(measured) >= 190


def test_a_stranger_loads_the_model_by_its_name_and_adds_as_we_do(
    tiny: Tiny, tmp_path: Path
) -> None:
    prompt = "37+45="
    with served(tiny.folder) as link:
        answer = strangers_answer(link, "ingot-tiny@cuda", prompt, apart=tmp_path)
    # 082, its last digit first, as tiny's problems are written.
    assert answer == our_answer(tiny.folder, prompt) == "37+45=280"


def test_no_fused_block_scaled_row_of_the_fp8_bundle_is_read_wrongly(tiny: Tiny) -> None:
    model = V3Config.model_validate(artifact(tiny.folder, "posttrain")[1]["facts"]["model"])
    stored = TensorFolder(tiny.bundle("cuda") / "fp8")
    matrices = parity.prove_fused(stored, Fp8Blocks(model))
    print(f"\n{matrices} fused matrices read, 0 rows wrong")
    assert matrices > 50


def test_held_out_text_does_not_stand_in_training_text(tiny: Tiny) -> None:
    """By windows of 100 characters verbatim, of the texts as the rows hold them."""
    corpus = artifact(tiny.folder, "data")[0]
    statistics = json.loads((corpus / "statistics.json").read_text())["held_out_in_training"]
    tokenizer = load_tokenizer(corpus / "tokenizer.json")

    def documents(*names: str) -> list[str]:
        rows = Rows(corpus.joinpath(*names))
        ids = rows.take(torch.arange(len(rows)).numpy()).flatten().tolist()
        text = tokenizer.decode(ids, skip_special_tokens=False)
        begin, end = (str(tokenizer.id_to_token(one)) for one in (BOS_ID, EOS_ID))
        return str(text).replace(end, begin).split(begin)

    def windows(texts: list[str]) -> list[str]:
        return [text[i : i + 100] for text in texts for i in range(len(text) - 99)]

    held_out = windows(documents("held_out", "stdlib"))
    # Rows that begin inside a document are cut there, which joins nothing.
    shown = set(windows(documents("train")))
    share = sum(one in shown for one in held_out) / len(held_out)
    print(
        f"\nheld-out windows of 100 characters in training rows: {share:.4%} of {len(held_out):,}"
    )
    print(json.dumps(statistics, indent=1))
    assert share == 0
    assert statistics["text_share_in_training_before"] > 0.05
    assert statistics["text_share_in_training_after"] == 0
    assert statistics["cut_share_of_training_text"] <= 0.05


def test_the_ascend_bundle_describes_every_tensor_and_agrees_with_its_source(tiny: Tiny) -> None:
    folder = tiny.bundle("ascend") / "w8a8"
    rows = json.loads((folder / "quant_model_description.json").read_text())
    names = set(TensorFolder(folder).names)
    assert names <= rows.keys()
    assert all("." not in name for name in rows.keys() - names)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    facts = bundles(tiny.folder)["ascend"][1]["parity"]["w8a8"]
    print(f"\nw8a8: top-1 agreement {facts['top1_agreement']:.4f}, KL {facts['mean_kl_nats']:.4f}")
    assert facts["top1_agreement"] >= 0.9
    assert facts["mean_kl_nats"] <= 0.05


def test_clean_lists_bytes_and_never_offers_the_latest(tiny: Tiny) -> None:
    listed = ingot(tiny.folder, "clean", "--dry-run")
    assert listed.returncode == 0
    for stage in ("data", "pretrain", "posttrain", "evaluate"):
        (line,) = (one for one in listed.stdout.splitlines() if f"{stage}/" in one)
        assert "keep" in line
