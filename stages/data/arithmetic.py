"""Generates arithmetic problems with answers, some of which training never sees."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from configs.data import SLIP_STEPS, ArithmeticSource
from configs.errors import DataError
from configs.seed import derive
from stages.verifiers import Problem


@dataclass(frozen=True, slots=True)
class Split:
    """The problems of one source."""

    train: list[Problem]
    held_out: list[Problem]


@dataclass(frozen=True, slots=True)
class _Sum:
    """An operation on two operands, before it is written down."""

    operation: str
    left: int
    right: int

    def result(self) -> int:
        match self.operation:
            case "+":
                return self.left + self.right
            case "-":
                return self.left - self.right
            case _:
                return self.left * self.right

    def key(self) -> str:
        """The same for a problem and its mirror image, 3+4 and 4+3."""
        operands = [self.left, self.right]
        if self.operation != "-":
            operands.sort()
        return f"{operands[0]}{self.operation}{operands[1]}"


def make_problems(sources: Mapping[str, ArithmeticSource], *, seed: int) -> dict[str, Split]:
    """Every source's problems, in a drawn order, training and held-out parted by hash.

    A problem and its mirror image fall on the same side, and what one source holds out no other
    trains on: a held-out answer was never shown in any form. DataError if a side is empty.
    """
    sums = {name: list(_sums(name, source, seed=seed)) for name, source in sorted(sources.items())}
    held_keys = {
        key
        for name, source in sources.items()
        for key in {one.key() for one in sums[name]}
        if derive(seed, "problems", key) / 2**63 < source.held_out_share
    }
    splits = {}
    for name, source in sorted(sources.items()):
        train: list[Problem] = []
        held_out: list[Problem] = []
        for one in sums[name]:
            (held_out if one.key() in held_keys else train).append(_write(name, source, one))
        if not train or not held_out:
            raise DataError(
                f"data.sources.{name}.held_out_share = {source.held_out_share}: of "
                f"{len(sums[name])} problems {len(held_out)} are held out and {len(train)} left; "
                f"change it, or raise data.sources.{name}.digits = {source.digits}"
            )
        splits[name] = Split(train, held_out)
    return splits


def training_documents(
    problems: Sequence[Problem], source: ArithmeticSource, *, seed: int
) -> list[str]:
    """Prompt and answer of each problem, with a slip in `source.slip_share` of the documents.

    Slips are spread evenly: each problem has the same number of right and wrong documents, so a
    model can learn which answer is likeliest but not which problems to distrust.
    """
    if not source.slip_share:
        return [problem.prompt + problem.answer for problem in problems]
    rng = np.random.default_rng(derive(seed, "slips"))
    wrong = _wrong_variants(source)
    return [
        problem.prompt + (_slip(problem.answer, rng) if variant < wrong else problem.answer)
        for problem in problems
        for variant in range(SLIP_STEPS)
    ]


def wrong_share(source: ArithmeticSource) -> float:
    """Part of the training documents that is wrong: `slip_share`, as nearly as it is met."""
    return _wrong_variants(source) / SLIP_STEPS


def _wrong_variants(source: ArithmeticSource) -> int:
    return round(SLIP_STEPS * source.slip_share)


def _slip(answer: str, rng: np.random.Generator) -> str:
    """The answer with one digit raised or lowered by one, modulo ten."""
    place = int(rng.integers(len(answer)))
    digit = (int(answer[place]) + int(rng.choice((1, 9)))) % 10
    return f"{answer[:place]}{digit}{answer[place + 1 :]}"


def _sums(name: str, source: ArithmeticSource, *, seed: int) -> Iterator[_Sum]:
    """All distinct sums, or an equal draw from each operation when they exceed `max_problems`."""
    rng = np.random.default_rng(derive(seed, "data", name, "operands"))
    bound = 10**source.digits
    limit = source.max_problems // len(source.operations)
    found = []
    for operation in source.operations:
        total = bound * (bound + 1) // 2 if operation == "-" else bound * bound
        if total <= limit:
            pairs = product(range(bound), repeat=2)
            found += [_Sum(operation, a, b) for a, b in pairs if operation != "-" or a >= b]
        else:
            found += _drawn(operation, bound, limit, rng)
    for index in rng.permutation(len(found)):
        yield found[index]


def _drawn(operation: str, bound: int, count: int, rng: np.random.Generator) -> list[_Sum]:
    """`count` distinct sums of the operation."""
    distinct: dict[_Sum, None] = {}
    while len(distinct) < count:
        for a, b in rng.integers(bound, size=(count, 2)).tolist():
            if operation != "-" or a >= b:
                distinct.setdefault(_Sum(operation, a, b))
    return list(distinct)[:count]


def _write(name: str, source: ArithmeticSource, one: _Sum) -> Problem:
    digits = source.digits
    answer_digits = {"+": digits + 1, "-": digits, "*": 2 * digits}[one.operation]
    width, answer_width = (digits, answer_digits) if source.zero_padded else (1, 1)
    prompt = f"{one.left:0{width}}{one.operation}{one.right:0{width}}="
    answer = f"{one.result():0{answer_width}}"
    if source.answer_order == "least-significant-first":
        answer = answer[::-1]
    return Problem(id=f"{name}/{prompt}", prompt=prompt, answer=answer, source=source.type)
