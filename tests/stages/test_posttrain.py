"""The loop of post-training does what it says, by every call that it made of its pools."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster import checkpoint
from cluster.generation import Sampling
from configs.errors import DataError, LeaseLost, TrainingError
from model.fp8.drift import Drift
from model.transformer import Transformer
from model.weights.files import load_pretrained
from stages.artifacts import Checkpoint
from stages.contract import Workspace
from stages.posttrain import loop
from stages.posttrain.run import prepare
from stages.posttrain.step import _choose
from stages.telemetry import SAVES, MetricsFile, begin_metrics
from tests.conftest import Recorder, steal, workspace_at
from tests.stages.pools import Book, Call, DeafSamplers, LocalPools, digest
from tests.stages.rl_lab import END_TOKENS, HELD_OUT, MODEL, SEED, TRAIN, Lab, make_lab, text_of
from tests.stages.rl_paper import Answered, logprobs_of, objective

STEPS, GROUPS, SIZE, PARTS, TEMPERATURE, RATE = 5, 4, 4, 2, 0.7, 3e-3
MEASURED = (0, 2, 4, 5)
ANSWERS = {problem.prompt: problem.answer for problem in (*TRAIN, *HELD_OUT)}


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A corpus, a base and pools, of this test's own."""
    return make_lab(tmp_path / "lab", monkeypatch)


@dataclass(frozen=True)
class Calm:
    """A run that nothing disturbed."""

    lab: Lab
    book: Book
    work: Workspace
    recorder: Recorder
    made: Checkpoint
    log: list[dict[str, Any]]

    def drawn(self) -> list[Call]:
        """What was sampled to learn from, step by step."""
        return [call for call in self.book.of("sample") if is_training(call)]

    def asked(self) -> list[tuple[Call, Call]]:
        """What was sampled to measure, each time greedily and then by drawing."""
        calls = [call for call in self.book.of("sample") if not is_training(call)]
        return list(zip(calls[::2], calls[1::2], strict=True))

    def learned(self) -> list[list[Call]]:
        """The forward_backward calls of each step."""
        calls = self.book.of("forward_backward")
        return [calls[at : at + PARTS] for at in range(0, len(calls), PARTS)]


def is_training(call: Call) -> bool:
    return len(call.arguments["prompts"]) == GROUPS * SIZE


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calm]:
    folder, recorder = tmp_path_factory.mktemp("calm"), Recorder()
    with pytest.MonkeyPatch.context() as patch:
        lab = make_lab(folder / "lab", patch)
        work = workspace_at(folder / "slot", recorder)
        made = lab.run(work)
        yield Calm(lab, lab.book, work, recorder, made, lab.log(work))


def model_of(state: dict[str, Tensor]) -> Transformer:
    """The weights that the trainer held."""
    model = Transformer(MODEL, precision="high")
    model.load_state_dict(state)
    return model.eval()


def test_a_step_samples_learns_hands_over_measures_and_saves_in_this_order(calm: Calm) -> None:
    part = ["reference", "forward_backward", "optim_step"]
    exam = ["sample", "sample"]
    expected = ["open_trainers", "open_generation", *exam]
    for step in range(1, STEPS + 1):
        expected += ["sample", *part * PARTS, "weights", "update_weights"]
        expected += exam if step in MEASURED else []
        expected += ["save"] if step in (2, 4, 5) else []
    assert calm.book.verbs() == expected


def test_answers_are_drawn_by_the_weights_that_the_step_before_ended_with(calm: Calm) -> None:
    after = [call.weights for call in calm.book.of("optim_step")][PARTS - 1 :: PARTS]
    start = digest(load_pretrained(calm.lab.base.path()))
    assert [call.weights for call in calm.drawn()] == [start, *after[:-1]]
    assert len({start, *after}) == STEPS + 1, "a step changed nothing"
    updates = calm.book.of("update_weights")
    assert [call.weights for call in updates] == after
    assert [call.arguments["version"] for call in updates] == [1, 2, 3, 4, 5]
    assert [line["policy_version"] for line in calm.log[1:]] == [0, 1, 2, 3, 4]


def test_answers_of_a_policy_that_fell_behind_are_refused(lab: Lab, workspace: Workspace) -> None:
    lab.pools = LocalPools(samplers=DeafSamplers)
    told = "sampled by version 0, but the policy is at version 1"
    with pytest.raises(TrainingError, match=told):
        lab.run(workspace, evaluate_problems=0)
    assert len(lab.book.of("optim_step")) == PARTS


def test_a_measurement_of_a_policy_that_fell_behind_is_refused(
    lab: Lab, workspace: Workspace
) -> None:
    lab.pools = LocalPools(samplers=DeafSamplers)
    with pytest.raises(TrainingError, match="held-out problem was answered by version 0"):
        lab.run(workspace, evaluate_every_steps=1)


def test_sampling_is_as_configured_and_stops_at_the_models_end_tokens(calm: Calm) -> None:
    wanted = Sampling(max_new_tokens=3, temperature=TEMPERATURE, stop_tokens=END_TOKENS)
    assert {call.arguments["sampling"] for call in calm.drawn()} == {wanted}
    for greedy, drawn in calm.asked():
        assert greedy.arguments["sampling"] == replace(wanted, temperature=0.0)
        assert drawn.arguments["sampling"] == wanted
    ends = Counter(found.token_ids[-1] for call in calm.drawn() for found in call.result)
    assert ends[END_TOKENS[0]] > 0


def test_every_step_chooses_problems_anew_from_all_that_may_be_trained_on(calm: Calm) -> None:
    chosen = [
        [text_of(prompt) for prompt in call.arguments["prompts"][::SIZE]] for call in calm.drawn()
    ]
    assert len({tuple(prompts) for prompts in chosen}) == STEPS
    for call, prompts in zip(calm.drawn(), chosen, strict=True):
        repeated = [text_of(prompt) for prompt in call.arguments["prompts"]]
        assert repeated == [prompt for prompt in prompts for _ in range(SIZE)]


def test_problems_are_drawn_evenly(calm: Calm) -> None:
    spec = calm.lab.spec(prompts_per_step=13, minibatches=1)
    run = prepare(spec, calm.work, calm.lab.corpus, calm.lab.base)
    assert len(TRAIN) == 13
    counts = Counter(one.problem.id for step in range(400) for one in _choose(run, step))
    assert set(counts) == {problem.id for problem in TRAIN}
    # 400 expected each, with a deviation of 19.
    assert all(300 < count < 500 for count in counts.values())


def test_no_two_answers_share_a_draw(calm: Calm) -> None:
    seeds = [seed for call in calm.drawn() for seed in call.arguments["seeds"]]
    assert len(set(seeds)) == len(seeds) == STEPS * GROUPS * SIZE
    exam = {seed for _, drawn in calm.asked() for seed in drawn.arguments["seeds"]}
    assert not exam & set(seeds)


def test_every_answer_is_learned_from_once(calm: Calm) -> None:
    for drawn, parts in zip(calm.drawn(), calm.learned(), strict=True):
        prompts, answers = drawn.arguments["prompts"], drawn.result
        expected = [
            (*prompt, *found.token_ids) for prompt, found in zip(prompts, answers, strict=True)
        ]
        assert rows_of(parts) == expected
        logprobs = [
            tuple(row[mask].tolist())
            for part in parts
            for row, mask in zip(
                part.arguments["batch"]["behaviour_logprobs"],
                part.arguments["batch"]["mask"],
                strict=True,
            )
        ]
        for found, sampled in zip(logprobs, answers, strict=True):
            assert found == pytest.approx(sampled.logprobs, rel=1e-6)


def rows_of(parts: list[Call]) -> list[tuple[int, ...]]:
    """Prompt and answer of each row of the batches."""
    rows = []
    for part in parts:
        batch = part.arguments["batch"]
        for tokens, mask in zip(batch["tokens"], batch["mask"], strict=True):
            rows.append(tuple(tokens[: int(mask.nonzero().max()) + 2].tolist()))
    return rows


def test_advantages_are_rewards_less_the_mean_of_their_own_group(calm: Calm) -> None:
    spread = 0
    for number, (drawn, parts) in enumerate(zip(calm.drawn(), calm.learned(), strict=True), 1):
        rewards = rewards_of(drawn)
        expected = []
        for at in range(0, len(rewards), SIZE):
            group = rewards[at : at + SIZE]
            expected += [reward - sum(group) / SIZE for reward in group]
        found = torch.cat([part.arguments["batch"]["advantages"] for part in parts])
        assert found.tolist() == pytest.approx(expected)
        assert calm.log[number]["reward"] == pytest.approx(sum(rewards) / len(rewards))
        spread += sum(value != 0 for value in expected)
    assert spread > STEPS * SIZE, "hardly a group had rewards that differ"


def rewards_of(drawn: Call) -> list[float]:
    """1 for each answer that is the right one, by a table of all sums."""
    return [
        float(text_of(found.token_ids) == ANSWERS[text_of(prompt)])
        for prompt, found in zip(drawn.arguments["prompts"], drawn.result, strict=True)
    ]


def test_the_loss_of_every_minibatch_is_the_papers(calm: Calm) -> None:
    reference = load_pretrained(calm.lab.base.path()).eval()
    for drawn, parts in zip(calm.drawn(), calm.learned(), strict=True):
        answered = [
            Answered(
                prompt,
                tuple(found.token_ids),
                tuple(found.logprobs),
                logprobs_of(reference, prompt, found.token_ids, TEMPERATURE),
                reward,
            )
            for prompt, found, reward in zip(
                drawn.arguments["prompts"], drawn.result, rewards_of(drawn), strict=True
            )
        ]
        groups = [answered[at : at + SIZE] for at in range(0, len(answered), SIZE)]
        each = GROUPS // PARTS
        for number, part in enumerate(parts):
            found = objective(
                groups[number * each : (number + 1) * each],
                model_of(part.arguments["state"]),
                temperature=TEMPERATURE,
                epsilon=0.2,
                beta=0.05,
                delta=0.5,
            )
            assert part.result["loss"] == pytest.approx(-found, rel=1e-4, abs=1e-6)


def test_at_first_the_policy_is_the_sampler_and_later_it_moves_away_from_the_base(
    calm: Calm,
) -> None:
    for first, second in calm.learned():
        assert first.result["ratio_mean"] == pytest.approx(1, abs=1e-5)
        assert abs(second.result["ratio_mean"] - 1) > 1e-4
    divergences = [first.result["kl"] for first, _ in calm.learned()]
    assert divergences[0] == pytest.approx(0, abs=1e-9)
    assert all(kl > 1e-3 for kl in divergences[1:])


def test_without_a_weight_of_the_kl_there_is_no_reference(lab: Lab, workspace: Workspace) -> None:
    lab.run(workspace, steps=1, grpo={"kl_weight": 0.0})
    assert not lab.book.of("reference")
    assert not lab.book.of("open_trainers")[0].arguments["spec"].reference
    assert "kl" not in lab.log(workspace)[1]


def test_the_rate_warms_up_and_then_stays(calm: Calm) -> None:
    rates = [call.arguments["learning_rate"] for call in calm.book.of("optim_step")]
    shares = [1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1, 1, 1, 1, 1]
    assert rates == pytest.approx([RATE * share for share in shares])
    logged = [line["learning_rate"] for line in calm.log[1:]]
    assert logged == pytest.approx(rates[::PARTS])


def test_trainers_are_built_as_the_recipe_says(lab: Lab, workspace: Workspace) -> None:
    settings: dict[str, Any] = {"optim": {"learning_rate": 1e-3, "beta2": 0.9}}
    lab.run(workspace, steps=1, bias_update_speed=0.25, **settings)
    spec = lab.book.of("open_trainers")[0].arguments["spec"]
    assert (spec.optim.beta2, spec.balance.bias_update_speed, spec.seed) == (0.9, 0.25, SEED)
    assert spec.reference
    assert lab.book.of("open_generation")[0].arguments["precision"] == spec.precision


def test_the_artifact_holds_what_the_last_step_made(calm: Calm) -> None:
    made = load_pretrained(calm.made.path())
    assert digest(made) == calm.book.of("optim_step")[-1].weights
    saves = calm.book.of("save")
    assert [call.arguments["step"] for call in saves] == [2, 4, 5]
    kept = sorted(path.name for path in saves[0].arguments["root"].iterdir())
    assert kept == ["step-00000004", "step-00000005"]
    for name in ("tokenizer.json", "generation_config.json"):
        source = calm.lab.base.path(name)
        assert calm.made.path(name).read_bytes() == source.read_bytes()
    assert (calm.made.step, calm.made.sequences_seen) == (STEPS, 7)
    assert calm.made.final_loss == calm.log[-1]["loss"]


def test_each_step_is_told_once_and_the_measurement_before_it_too(calm: Calm) -> None:
    assert calm.recorder.started == [(STEPS, "step")]
    assert [step for step, _ in calm.recorder.logged] == list(range(STEPS + 1))
    assert [line["step"] for line in calm.log] == list(range(STEPS + 1))
    for (step, told), line in zip(calm.recorder.logged, calm.log, strict=True):
        assert told["loss"] == line["loss"] if step else "loss" not in told
    assert calm.recorder.tags == {
        "fp8.products": "high precision",
        "device": "cpu",
        "compute": "float32",
    }
    computed = {"products": "high precision", "device": "cpu", "compute": "float32"}
    assert calm.made.computed() == computed


def test_some_answers_of_each_step_stay_in_the_log_with_the_verdict_on_them(calm: Calm) -> None:
    for call, line in zip(calm.drawn(), calm.log[1:], strict=True):
        prompts = [text_of(ids) for ids in call.arguments["prompts"]][::SIZE]
        answers = [text_of(sample.token_ids) for sample in call.result][::SIZE]
        found = line["samples"]
        assert [one["prompt"] for one in found] == prompts
        assert [one["answer"] for one in found] == answers
        for one in found:
            assert one["right_answer"] == ANSWERS[one["prompt"]]
            assert one["reward"] == (one["answer"].strip() == one["right_answer"])
    assert "samples" not in calm.log[0]


def test_held_out_problems_are_asked_and_never_trained_on(calm: Calm) -> None:
    held_out = {problem.prompt for problem in HELD_OUT}
    for call in calm.drawn():
        assert not held_out & {text_of(prompt) for prompt in call.arguments["prompts"]}
    for parts in calm.learned():
        for row in rows_of(parts):
            assert not any(text_of(row).startswith(prompt) for prompt in held_out)
    asked = calm.asked()
    assert len(asked) == len(MEASURED)
    for greedy, drawn in asked:
        prompts = [text_of(prompt) for prompt in greedy.arguments["prompts"]]
        assert len(set(prompts)) == 4
        assert set(prompts) <= held_out
        twice = [text_of(prompt) for prompt in drawn.arguments["prompts"]]
        assert twice == [prompt for prompt in prompts for _ in range(2)]
        # The same questions and draws each time: what differs was learned.
        assert greedy.arguments["prompts"] == asked[0][0].arguments["prompts"]
        assert drawn.arguments["seeds"] == asked[0][1].arguments["seeds"]
        assert len(set(drawn.arguments["seeds"])) == 8


def test_what_was_measured_is_what_the_answers_say(calm: Calm) -> None:
    by_step = {line["step"]: line for line in calm.log}
    assert {s for s, line in by_step.items() if "held_out_pass_at_1" in line} == set(MEASURED)
    after = dict(enumerate([c.weights for c in calm.book.of("update_weights")], 1))
    after[0] = digest(load_pretrained(calm.lab.base.path()))
    best: dict[int, float] = {}
    for step, (greedy, drawn) in zip(MEASURED, calm.asked(), strict=True):
        line, right = by_step[step], rewards_of(drawn)
        assert greedy.weights == drawn.weights == after[step]
        best[step] = sum(right) / len(right)
        assert line["held_out_pass_at_1"] == pytest.approx(best[step])
        assert line["held_out_greedy_accuracy"] == pytest.approx(sum(rewards_of(greedy)) / 4)
        for name in ("held_out_pass_at_1", "held_out_greedy_accuracy"):
            assert 0 <= line[f"{name}_low"] <= line[name] <= line[f"{name}_high"] <= 1
            assert line[f"{name}_low"] < line[f"{name}_high"]
        assert line["best_step"] == max(best, key=lambda at: best[at])
    history = json.loads(calm.made.path("history.json").read_text())
    for name in ("step", "reward", "loss"):
        assert history[name] == [line[name] for line in calm.log[1:]]
    measured = [line for line in calm.log if "held_out_pass_at_1" in line]
    for name in ("step", "held_out_pass_at_1", "held_out_greedy_accuracy", "best_step"):
        assert history["held_out"][name] == [line[name] for line in measured]
    assert calm.made.best_step == line["best_step"]
    assert not any(name.endswith("_seconds") for name in (*history, *history["held_out"]))
    (note,) = calm.recorder.notes
    assert note.startswith(f"held-out pass@1: {best[0]:.1%} [")
    assert note.endswith(f"the best was {max(best.values()):.1%} after step {line['best_step']}")


def test_measuring_changes_nothing_of_what_is_trained(
    calm: Calm, lab: Lab, workspace: Workspace, recorder: Recorder
) -> None:
    made = lab.run(workspace, evaluate_problems=0)
    measured = {"best_step", "tags"}
    own = [
        {k: v for k, v in line.items() if not k.startswith("held_out_") and k not in measured}
        for line in calm.log[1:]
    ]
    assert [{k: v for k, v in line.items() if k != "tags"} for line in lab.log(workspace)] == own
    assert digest(load_pretrained(made.path())) == digest(load_pretrained(calm.made.path()))
    assert recorder.notes == []


def test_fewer_held_out_problems_than_asked_for_are_all_asked_and_told(
    lab: Lab, workspace: Workspace, recorder: Recorder
) -> None:
    lab.run(workspace, steps=1, evaluate_problems=50)
    assert len(HELD_OUT) == 7
    assert recorder.notes[0] == ("posttrain.evaluate_problems = 50, but 7 are held out: all asked")
    assert len(lab.book.of("sample")[0].arguments["prompts"]) == 7


def test_a_corpus_without_problems_is_refused(lab: Lab, workspace: Workspace) -> None:
    lab.corpus = lab.corpus.model_copy(update={"train_problems": 0})
    told = 'train_problems = 0, .*; add a source of type = "arithmetic" or "problems" to data'
    with pytest.raises(DataError, match=told):
        lab.run(workspace)


def test_fp8_is_counted_in_the_first_minibatch_of_the_steps_that_count(
    lab: Lab, workspace: Workspace, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Drift, "alarms", lambda drift, tallies: ["gradients: it drifts"])
    lab.run(workspace, steps=2, precision="fp8", fp8={"telemetry_every_steps": 2})
    flags = [call.arguments["counting"] for call in lab.book.of("forward_backward")]
    assert flags == [True, False, True, False]
    assert [line.get("fp8_alarms") for line in lab.log(workspace)] == [None, 1, 1]
    told = [f"step {step}: warning: FP8: gradients: it drifts" for step in (1, 2)]
    assert recorder.notes[:2] == told


@pytest.mark.parametrize(
    ("verb", "number", "lines", "saves"),
    [
        ("sample", 1, [], []),
        ("forward_backward", 1, [0], []),
        ("update_weights", 2, [0, 1], []),
        ("optim_step", 6, [0, 1, 2], [2]),
        ("save", 3, [0, 1, 2, 3, 4, 5], [4, 5]),
    ],
)
def test_a_builder_that_lost_its_lease_writes_nothing_more(
    lab: Lab, workspace: Workspace, verb: str, number: int, lines: list[int], saves: list[int]
) -> None:
    lab.book.act(verb, number, lambda: steal(workspace))
    with pytest.raises(LeaseLost):
        lab.run(workspace)
    assert [line["step"] for line in lab.log(workspace)] == lines
    root = workspace.resumable(SAVES)[0]
    assert sorted(int(path.name[-8:]) for path in root.glob("step-*")) == saves
    assert list(Path(workspace.out).iterdir()) == []


def test_a_lease_that_is_lost_after_the_line_is_lost_to_the_save(
    lab: Lab, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = MetricsFile.append

    def append_and_lose(log: MetricsFile, metrics: Any, *, step: int) -> None:
        append(log, metrics, step=step)
        if step == 2:
            steal(workspace)

    monkeypatch.setattr(MetricsFile, "append", append_and_lose)
    with pytest.raises(LeaseLost):
        lab.run(workspace)
    assert checkpoint.latest(workspace.resumable(SAVES)[0]) is None
    assert not lab.book.of("save")


def test_a_save_that_comes_after_the_choice_is_no_beginning_of_post_training(
    lab: Lab,
    make_workspace: Callable[..., Workspace],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A late builder saves once more just as this one has looked what there is."""
    late = make_workspace("late")
    lab.book.fail("sample", 7, RuntimeError("cut"))
    with pytest.raises(RuntimeError, match="cut"):
        lab.run(late)
    saves = late.resumable(SAVES)[0]
    (first,) = saves.iterdir()
    begin = begin_metrics

    def save_late(work: Workspace, start: Any) -> Any:
        first.with_name("step-00000004").symlink_to(first)
        return begin(work, start)

    monkeypatch.setattr(loop, "begin_metrics", save_late)
    book = lab.fresh()
    work = replace(make_workspace("mine"), earlier=(str(late.beside()),))
    lab.run(work)
    (load,) = book.of("load")
    assert load.arguments == {"folder": first, "step": 2 * PARTS}
    assert [line["step"] for line in lab.log(work)] == [0, 1, 2, 3, 4, 5]
