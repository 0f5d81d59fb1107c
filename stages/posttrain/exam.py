"""Held-out problems that the policy is asked before, during and after its training.

They are for measuring alone: nothing that is trained depends on them. Each time the same problems
are asked with the same seeds, so that two measurements differ by what was learned between them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.generation import GenerationPool, Sample, Sampling
from configs.errors import TrainingError
from configs.seed import derive
from stages.answers import Answered, ask, greedy_accuracy, pass_values
from stages.estimators import Estimate, mean_over_problems
from stages.prompts import Prompt
from stages.telemetry import BEST_STEP, HELD_OUT

PASS_AT_1, GREEDY_ACCURACY = f"{HELD_OUT}pass_at_1", f"{HELD_OUT}greedy_accuracy"


@dataclass(frozen=True, slots=True)
class Exam:
    """What is asked, and how."""

    prompts: Sequence[Prompt]
    sampling: Sampling
    samples_per_problem: int
    seed: int
    """Its draws', apart from those of training and of the evaluate stage."""
    answer_text: Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class Measured:
    """How the policy did after a step; 0 is before the first."""

    step: int
    pass_at_1: Estimate
    greedy_accuracy: Estimate

    def figures(self, earlier: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """As the step log has it, given the log's records so far: `best_step` is the step with
        the highest pass@1 up to here, the first of equals."""
        best_step, best = self.step, self.pass_at_1.mean
        for record in sorted(earlier, key=lambda record: -record["step"]):
            if record.get(PASS_AT_1, -1.0) >= best:
                best_step, best = record["step"], record[PASS_AT_1]
        return {
            **_spread(PASS_AT_1, self.pass_at_1),
            **_spread(GREEDY_ACCURACY, self.greedy_accuracy),
            BEST_STEP: best_step,
        }


def exam_seed(seed: int) -> int:
    """The seed by which held-out problems are chosen and answers to them drawn."""
    return derive(seed, "posttrain", "held_out")


def measure(samplers: GenerationPool, exam: Exam, step: int) -> Measured:
    """pass@1 and greedy accuracy of the policy after `step`, with 95 % intervals over problems.

    TrainingError if an answer was drawn by other weights than those.
    """

    def sample(prompts: list[list[int]], sampling: Sampling, seeds: list[int]) -> list[Sample]:
        samples = samplers.sample(prompts, sampling, seeds)
        if others := {found.version for found in samples} - {step}:
            raise TrainingError(
                f"a held-out problem was answered by version {min(others)}, but the policy is at "
                f"version {step}; update the samplers' weights"
            )
        return samples

    answered: list[Answered] = []
    for part in ask(
        sample,
        exam.prompts,
        exam.sampling,
        samples_per_problem=exam.samples_per_problem,
        seed=exam.seed,
        answer_text=exam.answer_text,
    ):
        answered += part
    return Measured(step, mean_over_problems(pass_values(answered, 1)), greedy_accuracy(answered))


def tell(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the measurements of a step log come to, in one line; no line if there are none."""
    measured = [record for record in records if PASS_AT_1 in record]
    if not measured:
        return
    first, last = measured[0], measured[-1]
    best = next(record for record in measured if record["step"] == last[BEST_STEP])
    yield (
        f"held-out pass@1: {_show(first)} before post-training, {_show(last)} after "
        f"{last['step']} steps, which is what the checkpoint holds; the best was "
        f"{best[PASS_AT_1]:.1%} after step {best['step']}"
    )


def best_step(records: Sequence[Mapping[str, Any]]) -> int | None:
    """The step after which held-out pass@1 was highest; none if it was not measured."""
    found = [record[BEST_STEP] for record in records if BEST_STEP in record]
    return found[-1] if found else None


def _spread(name: str, found: Estimate) -> dict[str, float]:
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


def _show(record: Mapping[str, Any]) -> str:
    low, high = record[f"{PASS_AT_1}_low"], record[f"{PASS_AT_1}_high"]
    return f"{record[PASS_AT_1]:.1%} [{low:.1%}, {high:.1%}]"
