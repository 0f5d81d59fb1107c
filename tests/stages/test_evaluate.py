"""The evaluate stage: scores against plain sums, the whole with fake models and samplers."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from cluster.generation import Sample, Sampling
from cluster.supply import Supply
from cluster.workers import WorkerDied
from configs.delivery import EvaluateConfig, EvaluateSpec
from configs.errors import DataError, VerifierError
from configs.model import V3Config
from configs.parallel import ClusterConfig
from model.fp8.scheme import Numerics
from model.transformer import Transformer
from stages.answers import choose
from stages.artifacts import Checkpoint, Corpus
from stages.contract import Workspace
from stages.evaluate import loop
from stages.evaluate.face import reported
from stages.evaluate.ngram import best_bits, count_pairs
from stages.evaluate.text import byte_lengths, score_text, size
from stages.framing import BOS_ID, BOS_TOKEN, EOS_ID, EOS_TOKEN
from stages.plots import Bars, read_plots
from stages.samples import read_samples
from stages.shards import consumed_rows, write_rows
from stages.verifiers import Problem, write_problems
from tests.conftest import workspace_at

SEED = 7
TEXT = "def naïve(x):\n    return x + 12  # 東京 🙂\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A small byte-level BPE with digits split singly."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        show_progress=False,
        special_tokens=[BOS_TOKEN, EOS_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    made.train_from_iterator([TEXT] * 4, trainer)
    return made


@pytest.fixture
def lengths(tokenizer: Tokenizer, tmp_path: Path) -> Any:
    """Bytes of each token id."""
    tokenizer.save(str(tmp_path / "saved.json"))
    return byte_lengths(tmp_path / "saved.json")


def test_byte_lengths_of_tokens_add_up_to_the_texts_bytes(
    tokenizer: Tokenizer, lengths: np.ndarray
) -> None:
    assert len(lengths) == tokenizer.get_vocab_size() > 258
    assert lengths[[BOS_ID, EOS_ID]].tolist() == [0, 0]
    for text in (TEXT, "é", "🙂 12", "\x00\t "):
        ids = tokenizer.encode(text).ids
        assert int(lengths[ids].sum()) == len(text.encode())
    assert lengths[tokenizer.encode(TEXT).ids].max() > 1


def test_tokens_added_to_a_vocabulary_count_as_they_are_spelt(tmp_path: Path) -> None:
    made = Tokenizer(models.BPE(vocab={"a": 0, "｜b｜": 1, "c": 2}, merges=[]))
    made.add_special_tokens(["a"])
    made.add_tokens(["｜b｜", "東d"])
    made.save(str(tmp_path / "added.json"))
    assert byte_lengths(tmp_path / "added.json").tolist() == [0, 7, 1, 4]


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.BPE({"東": 0}, []))
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(DataError, match="outside the byte-level alphabet"):
        byte_lengths(tmp_path / "words.json")


def test_bits_are_summed_over_every_target_but_begin_of_text() -> None:
    table_VV = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    rows = np.array([[0, 2, 3, 1, 0, 4], [5, 1, 0, 2, 2, 0]])
    lengths_V = np.array([0, 0, 1, 2, 3, 4])
    found = score_text(lambda tokens, _: table_VV[tokens], rows, lengths_V)
    pairs = [(0, 2), (2, 3), (3, 1), (0, 4), (5, 1), (0, 2), (2, 2)]
    bits = 0.0
    for previous, target in pairs:
        weights = table_VV[previous].double().exp()
        bits -= math.log2(weights[target] / weights.sum())
    assert found.bits == pytest.approx(bits, rel=1e-6)
    assert (found.bytes, found.targets) == (1 + 2 + 0 + 3 + 0 + 1 + 1, 7)
    assert found.bits_per_byte == pytest.approx(bits / 8, rel=1e-6)


def test_batches_do_not_change_the_score() -> None:
    table_VV = torch.randn(9, 9, generator=torch.Generator().manual_seed(0))
    rows = np.random.default_rng(0).integers(0, 9, (5, 3000))
    seen = []

    def forward(tokens: Tensor, segments: Tensor) -> Tensor:
        seen.append(tokens.shape[0])
        return table_VV[tokens]

    whole = score_text(forward, rows, np.ones(9, np.int64))
    parts = [score_text(forward, row[None], np.ones(9, np.int64)) for row in rows]
    assert seen == [1] * 10
    assert whole.bits == pytest.approx(sum(part.bits for part in parts))


def test_weights_that_are_not_numbers_are_an_error() -> None:
    with pytest.raises(DataError, match="costs nan nats"):
        score_text(
            lambda tokens, _: torch.full((*tokens.shape, 4), math.nan),
            np.array([[0, 2, 3]]),
            np.ones(4, np.int64),
        )


def small_model(vocab_size: int, *, context_tokens: int = 64) -> V3Config:
    return V3Config(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        q_lora_rank=None,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        intermediate_size=32,
        moe_intermediate_size=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        num_nextn_predict_layers=0,
        max_position_embeddings=context_tokens,
        initializer_range=0.3,
    )


def test_a_document_costs_the_same_whatever_is_packed_before_it() -> None:
    model = Transformer(small_model(12)).initialize(0).eval()
    first, second = [0, 5, 6, 7, 1], [0, 8, 9, 2, 1]
    lengths_V = np.ones(12, np.int64)
    packed = score_text(model, np.array([first + second]), lengths_V)
    apart = [score_text(model, np.array([row]), lengths_V) for row in (first, second)]
    assert packed.targets == sum(part.targets for part in apart)
    assert packed.bits == pytest.approx(sum(part.bits for part in apart), rel=1e-5)
    backwards = score_text(model, np.array([second + first]), lengths_V)
    assert packed.bits == pytest.approx(backwards.bits, rel=1e-5)


@dataclass
class Notebook:
    """A tracker that remembers."""

    steps: int = 0
    logged: dict[int, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def start(self, *, steps: int, unit: str) -> None:
        self.steps = steps

    def log(self, metrics: Mapping[str, Any], *, step: int) -> None:
        self.logged[step] = dict(metrics)

    def note(self, message: str) -> None:
        self.notes.append(message)

    def tag(self, name: str, value: str) -> None:
        pass


@dataclass
class Lab:
    """A corpus and two checkpoints on disk, with fake models and samplers behind the stage.

    The model "before" is uniform over the vocabulary, the model "after" knows the last token of
    a document is followed by end-of-text. Samplers give `wrong` before and the right answer after.
    """

    folder: Path
    tokenizer: Tokenizer
    corpus: Corpus
    train_rows: np.ndarray
    held_out: dict[str, np.ndarray]
    problems: list[Problem]
    tracker: Notebook = field(default_factory=Notebook)
    wrong: str = "0"
    knows_greedily: bool = False
    """Whether the model "before" is right where it takes the likeliest tokens."""
    end_tokens: tuple[int, ...] = (EOS_ID,)
    asked: dict[str, list[tuple[tuple[int, ...], int]]] = field(default_factory=dict)
    """What was sampled."""
    greedy: dict[str, list[tuple[tuple[int, ...], int]]] = field(default_factory=dict)
    loaded: list[str] = field(default_factory=list)
    same: dict[str, str] = field(default_factory=dict)
    """By name of a model, which other one it is."""
    opened: list[str] = field(default_factory=list)
    """The model that each pool began with."""
    dies_at: int | None = None
    """The call of the pool at which a sampler dies."""
    calls: int = 0
    models: tuple[str, ...] = ("before", "after")
    has_baseline: bool = True

    @property
    def work(self) -> Workspace:
        return workspace_at(self.folder / "out", self.tracker)

    def checkpoint(self, name: str, *, context_tokens: int = 64, seen: int = 5) -> Checkpoint:
        return Checkpoint(
            uri=str(self.folder / name),
            step=1,
            sequences_seen=seen,
            model=small_model(self.corpus.vocab_size, context_tokens=context_tokens),
            final_loss=1.0,
        )

    def load_pretrained(self, path: Path, *, device: str) -> Any:
        assert device == "cpu"
        self.loaded.append(path.name)
        vocab_size = self.corpus.vocab_size

        def forward(tokens: Tensor, segments: Tensor) -> Tensor:
            logits = torch.zeros(*tokens.shape, vocab_size)
            logits[..., EOS_ID] = 1.0 if path.name == "after" else 0.0
            return logits

        return forward

    @contextmanager
    def open_generation(
        self,
        machines: ClusterConfig,
        path: Path,
        *,
        logs: Path,
        supply: Supply,
        precision: Numerics,
    ) -> Iterator["Pool"]:
        assert (precision.precision, precision.compute) == ("high", torch.float32)
        assert not self.asked or self.dies_at is not None
        assert logs == self.work.beside("logs")
        pool = Pool(self)
        pool.load(path)
        self.opened.append(path.name)
        yield pool

    def run(self, seen: int = 5, context_tokens: int = 64, **settings: Any) -> Any:
        asked = {"problems": 6, "samples_per_problem": 4, "pass_at": (1, 4), "max_new_tokens": 4}
        return loop.evaluate(
            EvaluateSpec(
                seed=SEED,
                evaluate=EvaluateConfig.model_validate(asked | settings),
                order=self.models,
                has_baseline=self.has_baseline,
            ),
            self.work,
            corpus=self.corpus,
            **{
                # Names are in no order when a stage is called.
                name: self.checkpoint(
                    self.same.get(name, name), context_tokens=context_tokens, seen=seen
                )
                for name in sorted(self.models)
            },
        )

    def report(self) -> Any:
        return json.loads(self.work.path("report.json").read_text(encoding="utf-8"))


@dataclass
class Pool:
    """A sampler that remembers what it was asked and answers as its lab says."""

    lab: Lab
    name: str = ""

    def load(self, path: Path) -> None:
        # What scores text is done by then: no two models are in memory at a time.
        names = [self.lab.same.get(name, name) for name in self.lab.models]
        assert self.lab.loaded[-len(names) :] == names
        assert path.name not in self.lab.asked or self.lab.dies_at or self.lab.same
        self.lab.asked.setdefault(path.name, [])
        self.name = path.name

    def sample(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[int]
    ) -> list[Sample]:
        self.lab.calls += 1
        if self.lab.calls == self.lab.dies_at:
            raise WorkerDied("sampler 1 died: killed")
        greedy = sampling.temperature == 0.0
        expected = Sampling(max_new_tokens=4, temperature=1.0, stop_tokens=self.lab.end_tokens)
        assert sampling == replace(expected, temperature=0.0 if greedy else 1.0)
        found = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            asked = self.lab.greedy if greedy else self.lab.asked
            asked.setdefault(self.name, []).append((tuple(prompt), seed))
            text = self.lab.tokenizer.decode(prompt[1:])
            right = {problem.prompt: problem.answer for problem in self.lab.problems}[text]
            knows = self.name == "after" or (greedy and self.lab.knows_greedily)
            reply = right if knows else self.lab.wrong
            ids = [*self.lab.tokenizer.encode(reply).ids, self.lab.end_tokens[-1]]
            found.append(Sample(token_ids=ids, logprobs=[0.0] * len(ids), version=0, stopped=True))
        return found


def pack(tokenizer: Tokenizer, texts: Sequence[str], sequence_tokens: int) -> np.ndarray:
    stream = [t for text in texts for t in (BOS_ID, *tokenizer.encode(text).ids, EOS_ID)]
    rows = -(-len(stream) // sequence_tokens)
    stream += [BOS_ID] * (rows * sequence_tokens - len(stream))
    return np.array(stream).reshape(rows, sequence_tokens)


OVERLAP = {
    "compared": "windows of 50 characters",
    "text_share_in_training_before": 0.0764,
    "text_share_in_training_after": 0.0,
    "problems": 10,
    "problems_in_training_before": 3,
    "problems_in_training_after": 0,
    "cut_share_of_training_text": 0.0232,
}
"""What the corpus records of its held-out data."""


@pytest.fixture
def lab(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    folder = tmp_path / "corpus"
    problems = [
        Problem(id=f"sums/{n}+1=", prompt=f"{n}+1=", answer=str(n + 1), source="arithmetic")
        for n in range(10, 20)
    ]
    train_rows = pack(tokenizer, [TEXT, "1+1=2", "return 12"] * 3, 16)
    held_out = {
        "code": pack(tokenizer, ["return naïve(x)", TEXT], 16),
        "sums": pack(tokenizer, [p.prompt + p.answer for p in problems], 16),
    }
    write_rows(folder / "train", train_rows, rows_per_shard=4)
    for source, rows in held_out.items():
        write_rows(folder / "held_out" / source, rows)
    write_problems(folder / "problems" / "held_out.parquet", problems)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "statistics.json").write_text(json.dumps({"held_out_in_training": OVERLAP}))
    corpus = Corpus(
        uri=str(folder),
        train_rows=len(train_rows),
        held_out_rows={source: len(rows) for source, rows in held_out.items()},
        sequence_tokens=16,
        vocab_size=tokenizer.get_vocab_size(),
        train_problems=0,
        held_out_problems=len(problems),
    )
    made = Lab(tmp_path, tokenizer, corpus, train_rows, held_out, problems)
    monkeypatch.setattr(loop, "load_pretrained", made.load_pretrained)
    monkeypatch.setattr(loop, "open_generation", made.open_generation)
    return made


def test_the_report_sets_both_models_side_by_side(lab: Lab) -> None:
    report = lab.run()
    figures = report.headline
    assert figures["before_pass_at_1"] == figures["before_pass_at_4"] == 0.0
    assert figures["after_pass_at_1"] == figures["after_pass_at_4"] == 1.0
    assert figures["after_pass_at_1_gain"] == figures["after_pass_at_4_gain"] == 1.0
    assert figures["before_pass_at_1_low"] == 0.0
    assert figures["before_pass_at_1_high"] < figures["after_pass_at_1_low"] < 1.0
    assert figures["before_greedy_accuracy"] == figures["before_all_of_4"] == 0.0
    assert figures["after_greedy_accuracy"] == figures["after_all_of_4"] == 1.0
    assert figures["after_greedy_accuracy_gain"] == figures["after_all_of_4_gain"] == 1.0
    assert 0.5 < figures["after_pass_at_1_gain_low"] < figures["after_pass_at_1_gain_high"] == 1.0
    assert figures["after_bits_per_byte"] < figures["before_bits_per_byte"]
    assert lab.report()["headline"] == figures
    assert len(lab.report()["problems"]) == 6
    text = lab.work.path("report.md").read_text()
    assert "| pass@4 | 0.0% [0.0%, " in text
    assert "| right greedily | 0.0% [0.0%, " in text
    assert "| all 4 samples right | 0.0% [0.0%, " in text
    assert "| +100.0 [" in text
    assert "Documents are scored one by one" in text


def test_a_sampler_that_dies_costs_the_answers_of_its_model_alone(lab: Lab) -> None:
    calm = lab.run().headline
    calls = lab.calls
    # In the second half: the first model has answered, the second one not to the end.
    lab.asked, lab.greedy, lab.calls, lab.dies_at = {}, {}, 0, calls
    lab.opened.clear()
    assert lab.run().headline == calm
    assert lab.opened == ["before", "after"]
    assert lab.calls == calls + calls // 2
    assert lab.tracker.notes[-1] == "sampler 1 died: killed; starting the workers anew"


def test_a_model_under_two_names_is_asked_itself_each_time(lab: Lab) -> None:
    lab.models, lab.same = ("before", "after", "again"), {"again": "before"}
    figures = lab.run().headline
    assert figures["after_pass_at_1"] == 1.0
    assert figures["again_pass_at_1"] == figures["before_pass_at_1"] == 0.0


def test_every_other_model_is_compared_with_the_first(lab: Lab) -> None:
    lab.models = ("base", "sft", "after")
    report = lab.run()
    figures = report.headline
    assert {name: figures[f"{name}_pass_at_1"] for name in lab.models} == {
        "base": 0.0,
        "sft": 0.0,
        "after": 1.0,
    }
    assert (figures["sft_pass_at_1_gain"], figures["after_pass_at_1_gain"]) == (0.0, 1.0)
    assert "base_pass_at_1_gain" not in figures
    key = ["base_pass_at_1", "after_pass_at_1", "after_bits_per_byte"]
    assert list(report.key_figures()) == key
    text = lab.work.path("report.md").read_text()
    assert "|  | base | sft | after | bigram + unigram |" in text
    assert "| gain over base | sft | after |" in text
    (plot,) = read_plots(lab.work.path())
    assert all(isinstance(panel, Bars) for panel in plot.panels)
    assert [list(panel.bars) for panel in plot.panels if isinstance(panel, Bars)] == [
        ["base", "sft", "after"]
    ] * len(plot.panels)
    entry = lab.report()["problems"][0]
    assert list(entry["answers"]) == ["base", "sft", "after"]


def test_a_single_model_is_measured_without_gains(lab: Lab) -> None:
    lab.models = ("model",)
    figures = lab.run().headline
    assert figures["model_pass_at_1"] == 0.0
    assert not [name for name in figures if "gain" in name]
    assert "gain over" not in lab.work.path("report.md").read_text()


@pytest.mark.parametrize("models", [("model",), ("before", "after"), ("base", "sft", "after")])
@pytest.mark.parametrize("has_baseline", [True, False])
def test_the_face_knows_every_figure_that_is_reported(
    lab: Lab, models: tuple[str, ...], has_baseline: bool
) -> None:
    lab.models, lab.has_baseline = models, has_baseline
    asked = EvaluateConfig(samples_per_problem=4, pass_at=(1, 4))
    spec = EvaluateSpec(seed=SEED, evaluate=asked, order=models, has_baseline=has_baseline)
    assert list(lab.run().headline) == list(reported(spec, has_problems=True))


def test_a_model_of_another_corpus_has_no_baseline_and_the_report_says_why(lab: Lab) -> None:
    lab.has_baseline = False
    assert "ngram_bits_per_byte" not in lab.run().headline
    text = lab.work.path("report.md").read_text()
    assert "no n-gram baseline: not all that the first model was pretrained on" in text


def test_the_report_says_what_its_intervals_cover_and_what_they_do_not(lab: Lab) -> None:
    lab.run()
    text = lab.work.path("report.md").read_text()
    assert "They cover the choice of problems" in text
    assert "another training seed" in text
    assert "Gains are paired" in text


def test_the_report_says_how_much_held_out_data_stood_in_training_text(lab: Lab) -> None:
    lab.run()
    text = lab.work.path("report.md").read_text()
    assert "Of the held-out text 7.64% stood in documents to train on too" in text
    assert "and 0.00% after it was cut there" in text
    assert "Of 10 held-out problems 3 stood there with an answer" in text
    assert lab.report()["held_out_in_training"] == OVERLAP


def test_a_skill_that_sampling_hides_is_seen_greedily(lab: Lab) -> None:
    lab.knows_greedily = True
    figures = lab.run().headline
    assert figures["before_greedy_accuracy"] == 1.0
    assert figures["before_pass_at_1"] == 0.0
    assert figures["after_greedy_accuracy_gain"] == 0.0
    assert (
        figures["after_greedy_accuracy_gain_low"] < 0 < figures["after_greedy_accuracy_gain_high"]
    )
    assert lab.greedy["before"] == lab.greedy["after"]
    assert len(lab.greedy["before"]) == 6


def test_an_imported_model_has_no_baseline_and_the_report_says_why(lab: Lab) -> None:
    figures = lab.run(seen=0).headline
    assert "ngram_bits_per_byte" not in figures
    assert lab.report()["ngram"] == {}
    assert lab.report()["no_ngram"] == "what the imported model consumed is not known"
    text = lab.work.path("report.md").read_text()
    assert "There is no n-gram baseline: what the imported model consumed is not known." in text
    assert "tokens that the model consumed, and its weight" not in text
    assert "bigram + unigram" not in text
    assert "What an imported model was trained on before is not known here." in text


def test_every_end_token_of_a_model_ends_its_answers(lab: Lab) -> None:
    lab.end_tokens = (1, 5)
    for name in ("before", "after"):
        (lab.folder / name).mkdir()
        (lab.folder / name / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    assert lab.run().headline["after_pass_at_1"] == 1.0


def test_bits_per_byte_join_all_sources_by_their_bytes(lab: Lab, lengths: np.ndarray) -> None:
    figures = lab.run().headline
    sizes = [size(rows, lengths) for rows in lab.held_out.values()]
    num_bytes, targets = (sum(column) for column in zip(*sizes, strict=True))
    uniform = targets * math.log2(lab.corpus.vocab_size) / num_bytes
    assert figures["before_bits_per_byte"] == pytest.approx(uniform, rel=1e-6)
    text = "".join(["return naïve(x)", TEXT, *(p.prompt + p.answer for p in lab.problems)])
    unscored = sum(int(lengths[rows[:, 0]].sum()) for rows in lab.held_out.values())
    assert num_bytes + unscored == len(text.encode())  # a row's first token is nobody's target
    by_source = lab.report()["models"]["before"]["text"]
    assert {name: entry["bytes"] for name, entry in by_source.items()} == {
        name: size(rows, lengths)[0] for name, rows in lab.held_out.items()
    }


@pytest.mark.parametrize("seen", [3, 12, 31])
def test_the_baseline_is_counted_on_exactly_the_rows_that_the_model_consumed(
    lab: Lab, seen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_ROWS_PER_COUNT", 5)
    lab.run(seen=seen)
    diet = lab.train_rows[consumed_rows(len(lab.train_rows), seen, seed=SEED)]
    counts = count_pairs([diet], vocab_size=lab.corpus.vocab_size)
    for source, rows in lab.held_out.items():
        bits, weight = best_bits(counts, rows)
        entry = lab.report()["ngram"][source]
        assert (entry["bits"], entry["bigram_weight"]) == pytest.approx((bits, weight))
        assert entry["targets"] == lab.report()["models"]["before"]["text"][source]["targets"]


def test_both_models_are_asked_the_same_with_seeds_of_problem_and_sample(lab: Lab) -> None:
    lab.run(problems=6)
    few = lab.asked["before"]
    assert few == lab.asked["after"]
    assert len({seed for _, seed in few}) == len(few) == 24
    lab.asked.clear()
    lab.greedy.clear()
    lab.run(problems=9)
    assert set(few) < set(lab.asked["before"])


def test_a_problem_that_spells_a_special_token_is_asked_as_text(lab: Lab) -> None:
    sly = Problem(id="sly", prompt=f"{EOS_TOKEN}1+1=", answer="2", source="arithmetic")
    lab.problems = [sly]
    write_problems(lab.corpus.path("problems", "held_out.parquet"), lab.problems)
    lab.corpus = lab.corpus.model_copy(update={"held_out_problems": 1})
    lab.run(problems=1)
    assert len(lab.asked["before"]) == 4
    for prompt, _ in lab.asked["before"]:
        assert prompt[0] == BOS_ID
        assert not {BOS_ID, EOS_ID} & set(prompt[1:])


def test_progress_counts_the_problems_of_both_models(lab: Lab) -> None:
    lab.run()
    assert lab.tracker.steps == 12
    before = {"before_greedy_accuracy": 0.0, "before_pass_at_1": 0.0, "before_pass_at_4": 0.0}
    after = {"after_greedy_accuracy": 1.0, "after_pass_at_1": 1.0, "after_pass_at_4": 1.0}
    assert lab.tracker.logged == {6: before, 12: after}


def test_fewer_problems_than_asked_for_are_all_asked_and_said(lab: Lab) -> None:
    lab.run(problems=50)
    assert len(lab.report()["problems"]) == 10
    assert lab.tracker.notes[0] == "evaluate.problems = 50, but 10 are held out: all asked"


def test_a_prompt_longer_than_the_context_fails_before_any_model_is_loaded(lab: Lab) -> None:
    with pytest.raises(DataError, match=r"prompt of 6 tokens and max_new_tokens = 20 .* of 24"):
        lab.run(context_tokens=24, max_new_tokens=20)
    assert not lab.loaded
    assert not lab.asked


def test_rows_longer_than_the_context_are_an_error_with_both_numbers(lab: Lab) -> None:
    with pytest.raises(DataError, match="rows of 16 tokens exceed the model's context of 12"):
        lab.run(context_tokens=12)


def test_no_more_held_out_tokens_are_scored_than_asked_for(lab: Lab) -> None:
    lab.run(max_held_out_tokens=20)
    targets = {
        name: entry["targets"] for name, entry in lab.report()["models"]["before"]["text"].items()
    }
    assert targets == {
        name: size(rows[:1], np.zeros(999, np.int64))[1] for name, rows in lab.held_out.items()
    }


def test_an_answer_that_cannot_be_judged_is_an_error_not_a_wrong_answer(lab: Lab) -> None:
    odd = [problem.model_copy(update={"source": "chess"}) for problem in lab.problems]
    write_problems(lab.corpus.path("problems", "held_out.parquet"), odd)
    with pytest.raises(VerifierError):
        lab.run()


def test_a_corpus_without_problems_is_measured_on_its_text(lab: Lab) -> None:
    lab.corpus = lab.corpus.model_copy(update={"held_out_problems": 0})
    figures = lab.run().headline
    assert figures.keys() == {"before_bits_per_byte", "after_bits_per_byte", "ngram_bits_per_byte"}
    assert not lab.asked
    assert "no answers are measured" in lab.work.path("report.md").read_text()


def test_a_corpus_without_held_out_text_is_an_error(lab: Lab) -> None:
    lab.corpus = lab.corpus.model_copy(update={"held_out_rows": {"code": 0}})
    with pytest.raises(DataError, match="0 held-out rows"):
        lab.run()


def test_some_answers_are_kept_to_be_read_with_the_verdict_on_each(lab: Lab) -> None:
    lab.knows_greedily = True
    made = lab.run()
    found = read_samples(made.path())
    report = lab.report()["problems"]
    assert len(found) == 4 * len(report)
    assert {(one.model, one.drawn) for one in found} == {
        (model, drawn) for model in ("before", "after") for drawn in ("greedy", "sampled")
    }
    for one in found:
        (problem,) = (entry for entry in report if entry["prompt"] == one.prompt)
        told = problem["answers"][one.model]
        assert one.answer == (told["greedy"] if one.drawn == "greedy" else told["answers"][0])
        assert one.right_answer == problem["answer"]
        assert one.reward == (one.answer.strip() == problem["answer"])
        assert one.reason == "exact" or "instead of" in one.reason
    assert {one.reward for one in found} == {0.0, 1.0}


def test_nothing_a_model_says_breaks_the_table(lab: Lab) -> None:
    lab.wrong = "|`\n\r\u2028<b>" + "x" * 200
    lab.run()
    lines = lab.work.path("report.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if "xxx" in line]
    assert len(rows) == 6
    code = "``\\|`⏎��<b>xxx"
    assert all(row.replace("\\|", "").count("|") == 7 and code in row for row in rows)
    assert all(len(row) < 300 for row in rows)


def test_problems_are_chosen_by_the_seed_and_never_twice() -> None:
    problems = [Problem(id=str(n), prompt="?", answer="!", source="arithmetic") for n in range(40)]
    chosen = choose(problems, 10, seed=1)
    assert chosen == choose(problems, 12, seed=1)[:10] != choose(problems, 10, seed=2)
    assert len({problem.id for problem in chosen}) == 10
