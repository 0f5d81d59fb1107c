"""Held-out measurements: their figures, the best of them, and what the user is told."""

from collections.abc import Sequence
from typing import Any

import pytest

from cluster.generation import Sample, Sampling
from configs.errors import TrainingError
from stages.estimators import Estimate, mean_over_problems
from stages.posttrain.exam import Exam, Measured, exam_seed, measure, tell
from stages.prompts import Prompt
from stages.verifiers import Problem

PROMPTS = [
    Prompt(Problem(id=f"p{n}", prompt=f"{n}=", answer=str(n), source="arithmetic"), (0, n))
    for n in range(5)
]
EXAM = Exam(
    prompts=PROMPTS,
    sampling=Sampling(4, 0.5, (1,)),
    samples_per_problem=4,
    seed=11,
    answer_text=lambda token_ids: str(token_ids[0]),
)
EVEN = Estimate(0.5, 0.4, 0.6)


class Samplers:
    """Knows the problems below `knows` and, of the others, every second drawn answer.

    Greedy answers are right for the known problems only. All bear `version`; every call is kept.
    """

    def __init__(self, *, knows: int, version: int) -> None:
        self.knows, self.version = knows, version
        self.calls: list[tuple[Sampling, tuple[int, ...]]] = []

    def sample(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Sample]:
        self.calls.append((sampling, tuple(seeds)))
        found = []
        for place, (_, number) in enumerate(prompts):
            lucky = sampling.temperature > 0 and place % 2 == 0
            right = number < self.knows or lucky
            found.append(Sample([number if right else 99], [0.0], self.version, True))
        return found


def test_pass_at_1_and_greedy_accuracy_are_means_over_problems_with_intervals() -> None:
    samplers: Any = Samplers(knows=3, version=40)
    found = measure(samplers, EXAM, 40)
    assert found.pass_at_1 == mean_over_problems([1.0, 1.0, 1.0, 0.5, 0.5])
    assert found.pass_at_1.mean == pytest.approx(0.8)
    assert found.greedy_accuracy == mean_over_problems([1.0, 1.0, 1.0, 0.0, 0.0])
    figures = found.figures([])
    assert set(figures) == {
        *(f"held_out_pass_at_1{end}" for end in ("", "_low", "_high")),
        *(f"held_out_greedy_accuracy{end}" for end in ("", "_low", "_high")),
        "best_step",
    }
    low, mean, high = (figures[f"held_out_pass_at_1{end}"] for end in ("_low", "", "_high"))
    assert 0 < low < mean < high <= 1


def test_draws_are_the_same_at_every_step_and_apart_from_those_of_other_seeds() -> None:
    samplers: Any = Samplers(knows=3, version=1)
    measure(samplers, EXAM, 1)
    samplers.version = 2
    measure(samplers, EXAM, 2)
    assert samplers.calls[:2] == samplers.calls[2:]
    (greedy, _), (drawn, seeds) = samplers.calls[:2]
    assert greedy == Sampling(4, 0.0, (1,))
    assert drawn == EXAM.sampling
    assert len(set(seeds)) == 20
    assert len({exam_seed(0), exam_seed(1), 0, 1}) == 4


@pytest.mark.parametrize("version", [6, 8])
def test_answers_of_other_weights_are_refused(version: int) -> None:
    samplers: Any = Samplers(knows=3, version=version)
    told = f"answered by version {version}, but the policy is at version 7"
    with pytest.raises(TrainingError, match=told):
        measure(samplers, EXAM, 7)


@pytest.mark.parametrize(
    ("earlier", "mean", "best_step"),
    [
        ([], 0.1, 9),
        ([(0, 0.5), (3, 0.2)], 0.4, 0),
        ([(0, 0.1), (3, 0.2)], 0.4, 9),
        ([(0, 0.1), (3, 0.4), (6, 0.4)], 0.4, 3),  # the first of equals
        ([(0, 0.0)], 0.0, 0),
    ],
)
def test_the_best_step_is_the_first_with_the_highest_pass_at_1(
    earlier: list[tuple[int, float]], mean: float, best_step: int
) -> None:
    records: list[dict[str, Any]] = [
        {"step": step, "held_out_pass_at_1": value} for step, value in earlier
    ]
    records.insert(1, {"step": 1, "loss": 0.5})
    found = Measured(9, Estimate(mean, 0.0, 1.0), EVEN).figures(records)
    assert found["best_step"] == best_step


def test_the_user_is_told_where_it_began_ended_and_was_best() -> None:
    records: list[dict[str, Any]] = []
    for step, mean in ((0, 0.25), (20, 0.75), (30, 0.5)):
        measured = Measured(step, Estimate(mean, mean - 0.1, mean + 0.1), EVEN)
        records.append({"step": step, **measured.figures(records)})
        records.append({"step": step + 1, "loss": 0.1})
    assert list(tell(records)) == [
        "held-out pass@1: 25.0% [15.0%, 35.0%] before post-training, 50.0% [40.0%, 60.0%] after "
        "30 steps, which is what the checkpoint holds; the best was 75.0% after step 20"
    ]
    assert list(tell([{"step": 1, "loss": 0.1}])) == []
